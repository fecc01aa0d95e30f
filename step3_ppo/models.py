"""The four models of step 3 and what surrounds them: tokenizer, rollout backend, scorer."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import deepspeed
from transformers import PreTrainedTokenizerBase

from step3_ppo.config import PpoConfig
from step3_ppo.scoring import Scorer, function_scorer, model_scorer, retokenizing_scorer
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
    check_same_tokenizer,
    eos_token_ids,
    is_reward_model,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
)


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
    scorer, reward_model, score_scale = _load_scorer(config, tokenizer)
    critic = _load_critic(config, tokenizer) if config.uses_critic else None
    actor = _train(load_causal_lm(config.actor, *_loading(config)), config, config.actor_optim)
    return Models(
        tokenizer=tokenizer,
        actor=actor,
        critic=critic,
        reference=_load_reference(config, actor),
        scorer=scorer,
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
    """What the critic starts from: its own path, else the reward model, else the actor."""
    path = config.critic.path or config.reward.path or config.actor.path
    return ModelConfig(**{**vars(config.critic), "path": path})


def _load_scorer(
    config: PpoConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Scorer, deepspeed.DeepSpeedEngine | None, tuple[float, float]]:
    if config.reward.function is not None:
        return function_scorer(config.reward.function, tokenizer, config.reward.function_minutes), None, (1.0, 0.0)
    reward_tokenizer = load_tokenizer(config.reward)
    if not config.reward.retokenize:
        remedy = (
            "train the reward model from the actor's model family, or set reward.retokenize True to decode each "
            "response and tokenize it again"
        )
        check_same_tokenizer(tokenizer, reward_tokenizer, "reward model", remedy)
    model = load_scalar_model(config.reward, *_loading(config, frozen=True), head="saved")
    engine = frozen_engine(model, config.engine)
    scale = (model.gain, model.bias)
    if config.reward.retokenize:
        return retokenizing_scorer(engine, config, tokenizer, reward_tokenizer), None, scale
    return model_scorer(engine), engine, scale


def _load_critic(config: PpoConfig, tokenizer: PreTrainedTokenizerBase) -> deepspeed.DeepSpeedEngine:
    source = critic_source(config)
    # The critic reads the actor's ids, whatever the reward model reads.
    remedy = "set critic.path to a model of the actor's model family"
    check_same_tokenizer(tokenizer, load_tokenizer(source), "critic", remedy)
    head = "saved" if is_reward_model(source) else "zero"
    return _train(load_scalar_model(source, *_loading(config), head=head), config, config.critic_optim)


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
