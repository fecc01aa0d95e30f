"""Runs of TRL's trainers on tiny random models, in float64 on the CPU, and what they computed on the way.

TRL writes most of PPO inside one function, `PPOTrainer.train`. What it computes is read from that function's variables
while it runs: the helpers that it calls are wrapped, and each wrapper looks at its caller.
"""

import copy
import importlib
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM, PhiForSequenceClassification, PreTrainedTokenizerFast

PAD, EOS, FIRST_WORD, VOCAB = 0, 1, 2, 40
RESPONSE_LENGTH = 12
TEMPERATURE = 0.7
ENVIRONMENT = """TRL 1.12.0 is needed, in an environment of its own:
    bash scripts/benchmark/peers.sh
    .venv-peers/bin/python -m scripts.benchmark.parity_trl"""


def peer(module: str) -> Any:
    """A module of TRL."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} cannot be imported ({error}). {ENVIRONMENT}") from error


def tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Words w2, w3, ... separated by spaces; id 0 pads, id 1 ends."""
    vocab = {"<pad>": PAD, "<eos>": EOS} | {f"w{index}": index for index in range(FIRST_WORD, VOCAB)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token=pad, padding_side="left")


def text(ids: list[int]) -> str:
    return " ".join(f"w{index}" for index in ids)


def word_ids(seed: int, lengths: list[int]) -> list[list[int]]:
    """Random sequences of the given lengths, without PAD and EOS."""
    drawn = random.Random(seed)
    return [[drawn.randrange(FIRST_WORD, VOCAB) for _ in range(length)] for length in lengths]


def language_model(seed: int, eos_logit: float = 0.0) -> nn.Module:
    """A random causal LM whose head has a bias, so that it never writes PAD and ends as often as asked for."""
    model = _random_model(PhiForCausalLM, seed)
    with torch.no_grad():
        model.lm_head.bias[PAD] = -50.0
        model.lm_head.bias[EOS] += eos_logit
    return model


def scalar_model(seed: int) -> nn.Module:
    """A random model with one number per sequence (for TRL) or position (its `model` and `score`)."""
    return _random_model(PhiForSequenceClassification, seed)


def _random_model(model_class: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    config = PhiConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, num_labels=1,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=EOS,
    )  # fmt: skip
    return model_class(config).double()


@contextmanager
def trainer_options(**options: Any) -> Iterator[dict[str, Any]]:
    """Options that every trainer gets: float64 on the CPU, no clipping, nothing saved; and no state left behind."""
    state = importlib.import_module("accelerate.state")
    # PPOTrainer would take a GPU whatever use_cpu says
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        yield {
            "output_dir": folder, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
            "learning_rate": 3e-3, "logging_steps": 1,
        } | options  # fmt: skip
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@dataclass
class Steps:
    """What an optimizer was given and what it made of it, one entry per step."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    def watch(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        optimizer.register_step_pre_hook(lambda *_: self.gradients.append(gradients(model)))
        optimizer.register_step_post_hook(lambda *_: self.weights.append(weights(model)))


@dataclass
class PpoRun(Steps):
    """A run of TRL's PPO.

    models: policy, reference, critic and reward model as they were at the start. rollout: the variables of
    `PPOTrainer.train` once its advantages are made. updates: its variables in each micro-batch. statistics: its
    *_stats, [epochs, mini-batches, micro-batches]. logged: its metrics. steps: optimizer steps of each iteration.
    """

    models: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    logged: list[dict[str, float]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def run_ppo(eos_logit: float = 1.5, iterations: int = 1, rows: int = 8, **options: Any) -> PpoRun:
    """Let TRL's PPO sample, score and update.

    Args:
        eos_logit: how much the policy likes to end.
        iterations: rollouts to make.
        rows: responses in each; prompts have 3 to 6 tokens and are padded on the left.
        options: fields of its PPOConfig.
    """
    module = peer("trl.experimental.ppo.ppo_trainer")
    run = PpoRun()
    np.random.seed(0)  # orders the rows of an update; PPOTrainer seeds torch alone
    run.models = {
        "policy": language_model(0, eos_logit), "reference": language_model(1, eos_logit),
        "critic": scalar_model(2), "reward": scalar_model(3),
    }  # fmt: skip
    models = copy.deepcopy(run.models)
    prompts = word_ids(0, [3 + index % 4 for index in range(rows * iterations)])

    def look_at_rollout(variables: dict[str, Any]) -> None:
        run.statistics |= {k: v.clone() for k, v in variables.items() if k.endswith("_stats")}
        if "advantages" in variables and not run.rollout:
            run.rollout = _tensors(variables)

    def look_at_update(variables: dict[str, Any]) -> None:
        place = tuple(variables[k] for k in ("update", "ppo_epoch_idx", "minibatch_idx", "gradient_accumulation_idx"))
        run.updates[place] = _tensors(variables)  # the last call of a micro-batch finds all of them

    def log(metrics: dict[str, float], *_: Any) -> None:
        run.logged.append(dict(metrics))
        run.steps.append(len(run.weights) - sum(run.steps))

    common = {
        "response_length": RESPONSE_LENGTH, "temperature": TEMPERATURE, "total_episodes": rows * iterations,
        "per_device_train_batch_size": rows, "num_sample_generations": 0,
    }  # fmt: skip
    with trainer_options(**common | options) as arguments:
        trainer = module.PPOTrainer(
            args=module.PPOConfig(**arguments),
            processing_class=tokenizer(),
            model=models["policy"],
            ref_model=models["reference"],
            reward_model=models["reward"],
            value_model=models["critic"],
            train_dataset=dataset([{"input_ids": ids} for ids in prompts]),
        )
        trainer.log = log
        run.watch(trainer.optimizer.optimizer, trainer.model)
        with (
            mock.patch.object(module, "empty_cache", _watched(module.empty_cache, look_at_rollout)),
            mock.patch.object(module, "masked_mean", _watched(module.masked_mean, look_at_update)),
        ):
            trainer.train()
    return run


def _watched(function: Callable, look: Callable[[dict[str, Any]], None]) -> Callable:
    """`function`, which shows the variables of its caller to `look` where that is `PPOTrainer.train`."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        if caller.f_code.co_name == "train":
            look(caller.f_locals)
        return function(*args, **kwargs)

    return wrapper


def _tensors(variables: dict[str, Any]) -> dict[str, Tensor]:
    arrays = {k: torch.as_tensor(v) for k, v in variables.items() if k == "micro_batch_inds"}
    return arrays | {k: v.detach().clone() for k, v in variables.items() if isinstance(v, Tensor)}


@dataclass
class TrainerRun(Steps):
    """A run of one of TRL's other trainers.

    model: as it was at the start. losses: what `compute_loss` returned, one for each micro-batch. eval_loss: held-out
    loss at the start.
    """

    model: Any = None
    losses: list[Tensor] = field(default_factory=list)
    eval_loss: float | None = None


def train(run: TrainerRun, trainer: Any) -> None:
    """Train, and note what each optimizer step was given."""
    compute_loss = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = compute_loss(*args, **kwargs)
        run.losses.append((result[0] if isinstance(result, tuple) else result).detach().clone())
        return result

    run.watch(trainer.create_optimizer(), trainer.model)
    trainer.compute_loss = watched
    trainer.train()


def run_reward(pairs: list[dict[str, Any]], pad: str = "<pad>", **options: Any) -> TrainerRun:
    """One step of TRL's RewardTrainer on all pairs, of `chosen_ids`, `rejected_ids` and perhaps `margin`."""
    trl, run = peer("trl"), TrainerRun(model=scalar_model(3))
    arguments = {"per_device_train_batch_size": len(pairs), "max_steps": 1} | options
    with trainer_options(**arguments) as common:
        trainer = trl.RewardTrainer(
            model=copy.deepcopy(run.model),
            args=trl.RewardConfig(**common),
            processing_class=tokenizer(pad),
            train_dataset=dataset(pairs),
        )
        train(run, trainer)
    return run


def run_sft(rows: list[dict[str, str]], **options: Any) -> TrainerRun:
    """One step of TRL's SFTTrainer on all rows, of `prompt` and `completion`, after a look at their held-out loss."""
    trl, run = peer("trl"), TrainerRun(model=language_model(0))
    with trainer_options(max_steps=1, **options) as common:
        trainer = trl.SFTTrainer(
            model=copy.deepcopy(run.model),
            args=trl.SFTConfig(**common),
            processing_class=tokenizer(),
            train_dataset=dataset(rows),
            eval_dataset=dataset(rows),
        )
        run.eval_loss = trainer.evaluate()["eval_loss"]
        train(run, trainer)
    return run


@dataclass
class GroupRun(TrainerRun):
    """A run of GRPO or RLOO: the reference, the score of each response, and TRL's batch of responses."""

    reference: Any = None
    scores: list[float] = field(default_factory=list)
    batch: dict[str, Tensor] = field(default_factory=dict)


def run_groups(method: str, **options: Any) -> GroupRun:
    """Two steps of TRL's GRPOTrainer or RLOOTrainer on one batch of 2 prompts with 4 responses each.

    A step has two micro-batches. Scores are random numbers; `beta` above 0 brings the reference in.
    """
    trl, run = peer("trl"), GroupRun(model=language_model(0, eos_logit=1.5), reference=language_model(1, 1.5))
    drawn = random.Random(5)

    def score(completions: list[str], **_: Any) -> list[float]:
        new = [drawn.gauss(0, 1) for _ in completions]
        run.scores += new
        return new

    arguments = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "num_iterations": 2,
        "max_steps": 2, "max_completion_length": RESPONSE_LENGTH, "temperature": TEMPERATURE,
    } | options  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, trainer_options(**arguments) as common:
        run.reference.save_pretrained(folder)  # TRL loads the reference from where the model came from
        model = copy.deepcopy(run.model)
        model.config._name_or_path = folder
        trainer = getattr(trl, f"{method}Trainer")(
            model=model,
            reward_funcs=score,
            args=getattr(trl, f"{method}Config")(**common),
            processing_class=tokenizer(),
            train_dataset=dataset([{"prompt": text(ids)} for ids in word_ids(6, [3, 6])]),
        )
        make_batch = trainer._generate_and_score_completions

        def watched(inputs: Any) -> Any:
            run.batch = make_batch(inputs)
            return run.batch

        trainer._generate_and_score_completions = watched
        train(run, trainer)
    return run


def dataset(rows: list[dict[str, Any]]) -> Any:
    return importlib.import_module("datasets").Dataset.from_list(rows)
