"""The four models of step 3 and what surrounds them: tokenizer, rollout backend, scorer."""

import contextlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import deepspeed
from transformers import PreTrainedTokenizerBase

from step3_ppo.config import PpoConfig
from step3_ppo.score_function import ScoreFunction, function_scorer
from step3_ppo.scoring import Scorer, model_scorer, retokenizing_scorer
from training.config import ModelConfig
from training.engine import (
    DTYPES,
    frozen_engine,
    frozen_zero_stage,
    generation_mode,
    loading_options,
    train_engine,
)
from training.generation.backends import GENERATORS
from training.generation.interface import Endings, Generator
from training.models import (
    ScalarModel,
    check_same_tokenizer,
    eos_token_ids,
    holds_adapter,
    is_reward_model,
    load_causal_lm,
    load_scalar_model,
    load_scalar_model_on,
    load_tokenizer,
)
from training.untrusted import read_adapter


@dataclass(frozen=True)
class Models:
    """The actor and what works with it."""

    tokenizer: PreTrainedTokenizerBase
    actor: deepspeed.DeepSpeedEngine
    critic: deepspeed.DeepSpeedEngine | None
    """None with an estimator that needs no critic."""
    reference: Callable[[], AbstractContextManager[Any]]
    """A context that gives the reference: a frozen engine, or the actor with its adapter off."""
    scorer: Scorer
    score_function: ScoreFunction | None
    """Where the score comes from, if it is not a model."""
    reward_model: deepspeed.DeepSpeedEngine | None
    """Where the score comes from, if it reads the actor's ids."""
    score_scale: tuple[float, float]
    """(gain, bias) of the reward model's normalisation; (1, 0) for a function."""
    generator: Generator

    @property
    def trained(self) -> dict[str, deepspeed.DeepSpeedEngine]:
        """The engines that learn, by name."""
        return {"actor": self.actor} | ({} if self.critic is None else {"critic": self.critic})


def load_models(config: PpoConfig, tokenizer: PreTrainedTokenizerBase) -> Models:
    """Load and wrap all models. Every rank must call this.

    Raises:
        ValueError: tokenizers do not match, or a folder does not hold what it should.
    """
    base = _load_shared(config) if config.share_base else None
    score_function = _load_function(config, tokenizer)
    if score_function is None:
        scorer, reward_model, score_scale = _load_scorer(config, tokenizer, base)
    else:
        scorer, reward_model, score_scale = function_scorer(score_function), None, (1.0, 0.0)
    critic = _load_critic(config, tokenizer, base) if config.uses_critic else None
    actor_model = load_causal_lm(config.actor, *_loading(config)) if base is None else base
    actor = _train(actor_model, config, config.actor_optim)
    return Models(
        tokenizer=tokenizer,
        actor=actor,
        critic=critic,
        reference=_load_reference(config, actor),
        scorer=scorer,
        score_function=score_function,
        reward_model=reward_model,
        score_scale=score_scale,
        generator=_generator(config, tokenizer, actor),
    )


def _generator(config: PpoConfig, tokenizer: PreTrainedTokenizerBase, actor: deepspeed.DeepSpeedEngine) -> Generator:
    stop_sequences = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in config.sampling.stop]
    endings = Endings.of(eos_token_ids(config.actor, tokenizer), stop_sequences)
    open_module = partial(generation_mode, actor)
    options = {"cache_gib": config.kv_cache_gib, "keep_cache": config.keep_kv_cache}
    if config.generator == "hf":
        options = {}
    return GENERATORS[config.generator](open_module, endings, config.generation_batch_size, **options)


def critic_source(config: PpoConfig) -> ModelConfig:
    """What the trained weights of the critic stand on: where it starts, or the base that it shares."""
    return replace(_critic_start(config), path=config.actor.path) if config.share_base else _critic_start(config)


def _critic_start(config: PpoConfig) -> ModelConfig:
    """Where the critic starts: its own path, else the reward model, else the actor."""
    path = config.critic.path or config.reward.path or config.actor.path
    return ModelConfig(**{**vars(config.critic), "path": path})


def _load_shared(config: PpoConfig) -> Any:
    """The actor, before it is in an engine: the others take their frozen weights from it.

    Raises:
        ValueError: a folder stands on another model.
    """
    if holds_adapter(config.actor.path):
        raise ValueError(
            f"actor.path is {config.actor.path}, which holds adapters: share_base needs the whole model that step 2 "
            "started from (train step 1 with lora.merge_on_save), or leave share_base out"
        )
    if config.uses_critic:
        _check_stands_on(config.actor, _critic_start(config), "critic.path", may_be_base=True)
    if config.reward.function is None:
        _check_stands_on(config.actor, config.reward, "reward.path", may_be_base=False)
    return load_causal_lm(config.actor, *_loading(config))


def _check_stands_on(actor: ModelConfig, source: ModelConfig, option: str, *, may_be_base: bool) -> None:
    """Refuse what is not adapters of a reward model over the actor's base, nor, if it `may_be_base`, that itself."""
    adapters = read_adapter(source.path) if holds_adapter(source.path) else None
    base, revision = source.path, source.revision
    if adapters is not None:
        base, revision = adapters["base_model_name_or_path"], adapters.get("revision")
    is_same = (os.path.realpath(base), revision) == (os.path.realpath(actor.path), actor.revision)
    if not is_same or not (may_be_base if adapters is None else is_reward_model(source)):
        found = "a whole model" if adapters is None else f"adapters ({adapters.get('task_type')}) over {base}"
        raise ValueError(
            f"{option} is {source.path}, {found}, but share_base needs adapters of a reward model over actor.path, "
            f"{actor.path}, at the same revision: train step 2 with lora.rank above 0 from that very model, or leave "
            "share_base out"
        )
    if adapters is not None and (adapters.get("bias") != "none" or adapters.get("init_lora_weights") is not True):
        raise ValueError(
            f"{option} is {source.path}, whose bias or init_lora_weights in adapter_config.json changes weights of the "
            "base itself: share_base needs adapters as step 2 trains them"
        )
    if adapters is not None and source.lora.rank > 0:
        _check_goes_on(source, adapters)


def _check_goes_on(source: ModelConfig, adapters: Mapping[str, Any]) -> None:
    """Refuse other options of LoRA than those of the adapters that are trained on."""
    lora, rank, alpha = source.lora, adapters.get("r"), adapters.get("lora_alpha")
    other_targets = lora.target_modules and {*lora.target_modules} != {*map(str, adapters.get("target_modules") or ())}
    if (lora.rank, lora.alpha) != (rank, alpha) or other_targets:
        raise ValueError(
            f"critic.lora is not that of {source.path}, with whose adapters the critic goes on under share_base: set "
            f"critic.lora.rank to {rank} and critic.lora.alpha to {alpha}, and leave out critic.lora.target_modules"
        )


def _load_function(config: PpoConfig, tokenizer: PreTrainedTokenizerBase) -> ScoreFunction | None:
    name = config.reward.function
    return None if name is None else ScoreFunction(name, tokenizer, config.reward.function_minutes)


def _load_scorer(
    config: PpoConfig, tokenizer: PreTrainedTokenizerBase, base: Any
) -> tuple[Scorer, deepspeed.DeepSpeedEngine | None, tuple[float, float]]:
    reward_tokenizer = load_tokenizer(config.reward)
    if not config.reward.retokenize:
        remedy = (
            "train the reward model from the actor's model family, or set reward.retokenize True to decode each "
            "response and tokenize it again"
        )
        check_same_tokenizer(tokenizer, reward_tokenizer, "reward model", remedy)
    model = _load_scalar(config, config.reward, base, head="saved", frozen=True)
    engine = frozen_engine(model, config.engine)
    scale = (model.gain, model.bias)
    if config.reward.retokenize:
        return retokenizing_scorer(engine, config, tokenizer, reward_tokenizer), None, scale
    return model_scorer(engine), engine, scale


def _load_critic(config: PpoConfig, tokenizer: PreTrainedTokenizerBase, base: Any) -> deepspeed.DeepSpeedEngine:
    source = _critic_start(config)
    # The critic reads the actor's ids, whatever the reward model reads.
    remedy = "set critic.path to a model of the actor's model family"
    check_same_tokenizer(tokenizer, load_tokenizer(source), "critic", remedy)
    head = "saved" if is_reward_model(source) else "zero"
    return _train(_load_scalar(config, source, base, head=head), config, config.critic_optim)


def _load_scalar(config: PpoConfig, source: ModelConfig, base: Any, *, head: str, frozen: bool = False) -> ScalarModel:
    """A critic or reward model, on the weights of `base` if that is not None."""
    if base is not None:
        return load_scalar_model_on(base, source, DTYPES[config.engine.precision])
    return load_scalar_model(source, *_loading(config, frozen), head=head)


def _load_reference(config: PpoConfig, actor: deepspeed.DeepSpeedEngine) -> Callable[[], AbstractContextManager[Any]]:
    own_start = config.reference_path in (None, config.actor.path)
    if own_start and config.actor.lora.rank > 0:
        return partial(_adapter_off, actor)
    source = replace(config.actor, path=config.reference_path or config.actor.path, lora=type(config.actor.lora)())
    engine = frozen_engine(load_causal_lm(source, *_loading(config, frozen=True)), config.engine)
    return partial(contextlib.nullcontext, engine)


@contextlib.contextmanager
def _adapter_off(actor: deepspeed.DeepSpeedEngine) -> Any:
    with actor.module.disable_adapter():
        yield actor


def _loading(config: PpoConfig, frozen: bool = False) -> tuple[Any, dict | None]:
    """(dtype, ZeRO-3 options or None) for the loaders."""
    stage = frozen_zero_stage(config.engine) if frozen else config.engine.zero_stage
    return DTYPES[config.engine.precision], loading_options(config.engine, stage)


def _train(model: Any, config: PpoConfig, optim: Any) -> deepspeed.DeepSpeedEngine:
    return train_engine(
        model,
        config.engine,
        optim,
        train_batch_size=config.train_batch_size,
        total_steps=config.iterations * config.steps_per_iteration,
    )
