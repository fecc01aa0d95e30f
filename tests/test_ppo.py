"""Step 3 on tiny models: what must hold before, during and after its updates."""

import contextlib
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from step3_ppo import ppo
from step3_ppo.check import start_up_check
from step3_ppo.config import CriticConfig, KlConfig, PpoConfig, PpoRunConfig, RewardModelConfig
from step3_ppo.ema import MovingAverage
from step3_ppo.evaluate import Sample, compare, distinct_2, held_out_metrics, sample_held_out, win_rate
from step3_ppo.models import Models, load_models
from step3_ppo.ppo import actor_loss, minibatch_rows, update
from step3_ppo.progress import kl_controller
from step3_ppo.rollout import Experience, Rollout, make_experience, row_seeds, sample_responses
from step3_ppo.score_function import EarlyScores, ScoreFunction, function_scorer
from step3_ppo.scoring import OwnRows, Scorer, model_scorer, retokenizing_scorer
from step3_ppo.train import collect, rollout_metrics
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizers import EOS, PAD, VOCAB_SIZE, build_tokenizer, byte_ids
from training import distributed
from training.config import DataConfig, EngineConfig, LoraConfig, ModelConfig, OptimConfig
from training.data import Batch, collate
from training.engine import frozen_engine
from training.examples import PromptExample
from training.forward import response_logprobs
from training.generation.hf import HuggingFaceGenerator
from training.generation.interface import Completion, Endings, SamplingConfig
from training.models import load_causal_lm, load_scalar_model, load_tokenizer
from training.optim import lr_lambda
from training.rewards import AdaptiveKLController, FixedKLController

pytestmark = pytest.mark.usefixtures("process_group")

PROMPTS = [
    PromptExample(byte_ids(text), text, {"prompt": text, "row": row}, f"prompts.jsonl:{row + 1}")
    for row, text in enumerate(["a film", "so", "it was", "the end of the", "b", "why", "good?", "oh no"])
]
TOKENIZER = build_tokenizer(eos="<eos>")
SLOW = OptimConfig(lr=1e-30, schedule="constant", warmup_fraction=0.0)  # moves nothing: a learning rate of 0 is refused
FAST = OptimConfig(lr=3e-3, schedule="constant", warmup_fraction=0.0, eps=1e-5)

Folders = Callable[[str], str]


@pytest.fixture
def make_config(tiny_model: Folders, tiny_reward_model: Folders) -> Callable[..., PpoConfig]:
    def make(architecture: str = "llama", lora: LoraConfig | None = None, **options: Any) -> PpoConfig:
        defaults: dict[str, Any] = {
            "actor": ModelConfig(path=tiny_model(architecture), lora=lora or LoraConfig()),
            "data": DataConfig(paths=("prompts.jsonl",), format="prompt", template="plain"),
            "run": PpoRunConfig(output_dir="unused"),
            "reward": RewardModelConfig(path=tiny_reward_model("llama")),
            "engine": EngineConfig(zero_stage=0, precision="fp32"),
            "actor_optim": FAST,
            "critic_optim": FAST,
            "sampling": SamplingConfig(max_new_tokens=8, temperature=0.7),
            "iterations": 4,
            "rollout_batch_size": 8,
            "train_batch_size": 4,
            "micro_batch_size": 2,
        }
        return PpoConfig(**(defaults | options))

    return make


def load(config: PpoConfig) -> Any:
    return load_models(config, load_tokenizer(config.actor))


def start(config: PpoConfig) -> tuple[Any, Rollout, Experience]:
    """The models of a run and its first rollout."""
    models = load(config)
    rollout = collect(models, PROMPTS, config, 0)
    return models, rollout, make_experience(rollout, config, config.kl.coefficient)[0]


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# The start-up check


def check(models: Models, rollout: Rollout, config: PpoConfig) -> str:
    return start_up_check(models, rollout, config, {"generate": 2.0, "score": 1.0})


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)], ids=["whole", "adapters"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_before_the_first_update_ratio_is_1_and_kl_is_0(
    make_config: Callable[..., PpoConfig], architecture: str, lora: LoraConfig
) -> None:
    """L1, K2, F7, F9"""
    config = make_config(architecture, lora)
    models, rollout, _ = start(config)
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    line = check(models, rollout, config)
    assert "ratio 1.0000, kl 0.0000, sampler gap mean 0.0000 p99 0.0000 (rounding 0.0000)" in line
    tokens = sum(len(completion.response_ids) for completion in rollout.completions)
    assert f"generate {tokens / 2:.0f} tokens/s" in line


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)], ids=["whole", "adapters"])
def test_in_bf16_too_actor_and_reference_start_equal_to_the_bit(
    make_config: Callable[..., PpoConfig], lora: LoraConfig
) -> None:
    """K2: both see batches of the same shapes."""
    _, rollout, _ = start(make_config(lora=lora, engine=EngineConfig(zero_stage=0, precision="bf16")))
    assert rollout.logprobs[rollout.mask].count_nonzero() > 0
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)


def test_the_check_tells_how_far_the_trainer_is_from_itself_in_another_batch(
    make_config: Callable[..., PpoConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a forward whose log-probabilities are off by 0.01 for each row of its batch."""
    config = make_config()
    models, rollout, _ = start(config)
    own = response_logprobs

    def rounded(model: Any, batch: Batch, temperature: float) -> tuple[Tensor, None]:
        return own(model, batch, temperature)[0] + 0.01 * (len(batch) - ROWS), None

    ROWS = len(OwnRows(rollout.batch, config).micro_batches[0])
    monkeypatch.setattr("step3_ppo.check.response_logprobs", rounded)
    assert ROWS > 1
    assert f"(rounding {0.01 * (ROWS - 1):.4f})" in check(models, rollout, config)


def test_dropout_fails_the_check_and_is_named(make_config: Callable[..., PpoConfig]) -> None:
    """L1, F7"""
    config = make_config("gpt2")
    models = load(config)
    dropouts = [module for module in models.actor.module.modules() if isinstance(module, nn.Dropout)]
    assert dropouts
    for module in dropouts:
        module.p = 0.3
    rollout = collect(models, PROMPTS, config, 0)
    with pytest.raises(RuntimeError, match=r"log-ratios differ from 0 .*dropout"):
        check(models, rollout, config)


class Opened:
    """A context that gives what it was made with."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __enter__(self) -> Any:
        return self.value

    def __exit__(self, *_: Any) -> None: ...


def test_a_wrong_reference_fails_the_check(make_config: Callable[..., PpoConfig], tmp_path: Any) -> None:
    """K2"""
    config = make_config()
    other = load_causal_lm(ModelConfig(path=save_tiny_model(tmp_path, seed=9)), torch.float32)
    engine = frozen_engine(other, config.engine)
    models = replace(load(config), reference=lambda: Opened(engine))
    rollout = collect(models, PROMPTS, config, 0)
    with pytest.raises(RuntimeError, match=r"the kl is .*reference"):
        check(models, rollout, config)
    asked_for = replace(config, reference_path=str(tmp_path))
    assert "start-up check" in check(models, rollout, asked_for)


def test_differences_of_both_signs_do_not_cancel_in_the_check(make_config: Callable[..., PpoConfig]) -> None:
    """L1, K2: token by token 0.1 too high and too low by turns."""
    config = make_config()
    models, rollout, _ = start(config)
    by_turns = torch.zeros_like(rollout.logprobs)
    by_turns[rollout.mask] = 0.1 * torch.tensor([1.0, -1.0]).repeat(int(rollout.mask.sum()))[: int(rollout.mask.sum())]
    shaken = {name: getattr(rollout, name) + by_turns for name in ("logprobs", "ref_logprobs", "sampler_logprobs")}
    with pytest.raises(RuntimeError, match=r"log-ratios differ from 0 by 0\.1000"):
        check(models, replace(rollout, **shaken), config)
    with pytest.raises(RuntimeError, match=r"the kl is .* differ from 0 by 0\.1000"):
        check(models, replace(rollout, ref_logprobs=shaken["ref_logprobs"]), config)
    with pytest.raises(RuntimeError, match=r"differ from the trainer's by 0\.1000"):
        check(models, replace(rollout, sampler_logprobs=shaken["sampler_logprobs"]), config)


def test_a_sampler_of_other_probabilities_fails_the_check(make_config: Callable[..., PpoConfig]) -> None:
    """G2, K8"""
    config = make_config()
    models, rollout, _ = start(config)
    shifted = replace(rollout, sampler_logprobs=rollout.sampler_logprobs - 0.1)
    with pytest.raises(RuntimeError, match=r"the sampler.s log-probabilities differ"):
        check(models, shifted, config)
    restricted = replace(config, sampling=replace(config.sampling, top_k=3))
    assert "(not judged: top_k, top_p or min_new_tokens is set)" in check(models, shifted, restricted)


class AtTemperature1:
    """A generator that forgets the temperature that it is asked for."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def generate(self, prompt_ids: list[list[int]], sampling: SamplingConfig, seeds: list[int], **options: Any) -> Any:
        return self.generator.generate(prompt_ids, replace(sampling, temperature=1.0), seeds)


def test_a_sampler_of_another_temperature_fails_the_check_and_is_named(make_config: Callable[..., PpoConfig]) -> None:
    """K8, F6"""
    config = make_config()
    models = load(config)
    models = replace(models, generator=AtTemperature1(models.generator))
    rollout = collect(models, PROMPTS, config, 0)
    with pytest.raises(RuntimeError, match="Likely cause: the rollout backend computes other log-probabilities"):
        check(models, rollout, config)


def test_a_sampler_that_is_left_behind_shows_as_a_negative_kl_and_a_gap(make_config: Callable[..., PpoConfig]) -> None:
    """K8, G4: it goes on with the weights that the actor has left."""
    config = make_config(ppo_epochs=4, actor_optim=replace(FAST, lr=1e-2))
    models = load(config)
    old_weights = load_causal_lm(config.actor, torch.float32)

    @contextlib.contextmanager
    def open_old_weights() -> Iterator[nn.Module]:
        with torch.no_grad():
            yield old_weights

    for iteration in range(4):
        rollout = collect(models, PROMPTS, config, iteration)
        update(models, make_experience(rollout, config, 0.0)[0], config, iteration, None, None)
    left_behind = replace(models, generator=HuggingFaceGenerator(open_old_weights, Endings.of([EOS]), 8))
    right, wrong = (collect(m, PROMPTS, config, 4) for m in (models, left_behind))
    right_metrics, wrong_metrics = (rollout_metrics(r, torch.zeros(r.mask.shape), 0.0) for r in (right, wrong))
    assert right_metrics["rollout/kl"] > 3  # nats per response
    assert wrong_metrics["rollout/kl"] < -3
    assert right_metrics["rollout/logprob_gap"] < 1e-5
    assert wrong_metrics["rollout/logprob_gap"] > 0.1


# Updates


def test_the_first_step_finds_ratio_1_and_kl_0_and_clips_nothing(make_config: Callable[..., PpoConfig]) -> None:
    """L1: at a learning rate that moves, and in other micro-batches than were scored."""
    config = make_config(train_batch_size=8)
    models, _, experience = start(config)
    metrics = update(models, experience, config, 0, None, None)
    assert metrics["ppo/steps"] == 1
    assert metrics["ppo/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["ppo/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["ppo/clip_fraction"] == 0


def test_a_learning_rate_of_nothing_keeps_the_ratio_at_1(make_config: Callable[..., PpoConfig]) -> None:
    """L1, L2"""
    config = make_config(actor_optim=SLOW, critic_optim=SLOW, ppo_epochs=3)
    models, _, experience = start(config)
    metrics = update(models, experience, config, 0, None, None)
    assert metrics["ppo/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["ppo/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["ppo/clip_fraction"] == 0


def test_updates_move_the_ratio(make_config: Callable[..., PpoConfig]) -> None:
    config = make_config(ppo_epochs=3)
    models, _, experience = start(config)
    metrics = update(models, experience, config, 0, None, None)
    assert metrics["ppo/approx_kl"] > 1e-4
    assert metrics["ppo/ratio"] != 1


@pytest.mark.parametrize(("epochs", "train_batch_size"), [(1, 8), (1, 4), (3, 4), (2, 2)])
def test_optimizer_steps_are_epochs_times_minibatches(
    make_config: Callable[..., PpoConfig], epochs: int, train_batch_size: int
) -> None:
    """L6"""
    config = make_config(ppo_epochs=epochs, train_batch_size=train_batch_size)
    models, _, experience = start(config)
    metrics = update(models, experience, config, 0, None, None)
    steps = epochs * 8 // train_batch_size
    assert models.actor.global_steps == models.critic.global_steps == metrics["ppo/steps"] == steps
    assert config.steps_per_iteration == steps


def test_every_row_comes_once_per_epoch_in_a_new_order(make_config: Callable[..., PpoConfig]) -> None:
    """L6"""
    config = make_config(rollout_batch_size=16)
    orders = []
    for iteration in range(2):
        for epoch in range(3):
            parts = [minibatch_rows(16, config, iteration, 4 * epoch + part) for part in range(4)]
            assert [len(part) for part in parts] == [4] * 4
            order = torch.cat(parts).tolist()
            assert sorted(order) == list(range(16))
            orders.append(tuple(order))
    assert len(set(orders)) == 6
    again = torch.cat([minibatch_rows(16, config, 1, 8 + part) for part in range(4)]).tolist()
    assert tuple(again) == orders[-1]


def test_actor_and_critic_are_trained_on_every_row_once_per_epoch_in_a_new_order(
    make_config: Callable[..., PpoConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """L6"""
    seen: dict[str, list[tuple[int, ...]]] = {"actor_loss": [], "critic_loss": []}

    def sequences(batch: Batch) -> list[tuple[int, ...]]:
        return [tuple(ids[real].tolist()) for ids, real in zip(batch.input_ids, batch.attention_mask, strict=True)]

    def watched(name: str) -> Callable[..., Any]:
        loss = getattr(ppo, name)

        def loss_of(models: Models, micro: Experience, *rest: Any) -> Any:
            seen[name] += sequences(micro.batch)
            return loss(models, micro, *rest)

        return loss_of

    for name in seen:
        monkeypatch.setattr(ppo, name, watched(name))
    config = make_config(ppo_epochs=3)
    models, _, experience = start(config)
    update(models, experience, config, 0, None, None)
    rows = sorted(sequences(experience.batch))
    assert len(set(rows)) == 8
    for order in seen.values():
        epochs = [order[first : first + 8] for first in (0, 8, 16)]
        assert [sorted(epoch) for epoch in epochs] == [rows] * 3
        assert len(order) == 24 and len({tuple(epoch) for epoch in epochs}) == 3


def test_the_rows_of_a_minibatch_keep_what_belongs_to_them(make_config: Callable[..., PpoConfig]) -> None:
    """L6"""
    _, _, experience = start(make_config())
    index = torch.tensor([5, 1])
    part = experience.rows(index)
    time = part.batch.input_ids.shape[1]
    assert time == int(experience.batch.attention_mask[index].sum(1).max())
    for name in ("old_logprobs", "ref_logprobs", "advantages", "old_values", "returns"):
        assert torch.equal(getattr(part, name), getattr(experience, name)[index, :time])
    assert torch.equal(part.batch.input_ids, experience.batch.input_ids[index, :time])


def test_the_defaults_are_an_eps_of_1e_5_a_learning_rate_that_ends_at_0_and_a_clipped_norm(
    make_config: Callable[..., PpoConfig],
) -> None:
    """L7"""
    config = make_config()
    config = PpoConfig(actor=config.actor, data=config.data, run=config.run, reward=config.reward)
    assert config.engine.gradient_clipping == 1.0
    for optim in (config.actor_optim, config.critic_optim):
        assert optim.eps == 1e-5
        factor = lr_lambda(optim, 100)
        assert factor(99) > factor(100) == 0


def test_the_learning_rates_of_actor_and_critic_are_their_own_and_end_at_0(
    make_config: Callable[..., PpoConfig],
) -> None:
    """L4, L7: two iterations of two steps each."""
    actor, critic = (OptimConfig(lr=lr, schedule="linear", warmup_fraction=0.0, eps=1e-5) for lr in (1e-3, 4e-3))
    config = make_config(actor_optim=actor, critic_optim=critic, iterations=2)
    models, _, experience = start(config)
    for iteration, factor in enumerate((1.0, 0.5, 0.0)):
        assert models.actor.get_lr() == pytest.approx([factor * 1e-3] * 2, abs=1e-12)
        assert models.critic.get_lr() == pytest.approx([factor * 4e-3] * 2, abs=1e-12)
        if factor:
            metrics = update(models, experience, config, iteration, None, None)
            # Two steps, so the last one was taken half way between this iteration's rate and the next one's.
            assert metrics["ppo/actor_lr"] == pytest.approx((factor - 0.25) * 1e-3)
            assert metrics["ppo/critic_lr"] == pytest.approx((factor - 0.25) * 4e-3)
    for engine in (models.actor, models.critic):
        assert {group["eps"] for group in engine.optimizer.param_groups} == {1e-5}


def of_unequal_lengths(experience: Experience) -> Experience:
    """Row n keeps the first n + 1 tokens of its response."""
    mask = experience.batch.response_mask
    kept = mask & (mask.cumsum(1) <= torch.arange(1, len(mask) + 1, device=mask.device)[:, None])
    return replace(experience, batch=replace(experience.batch, response_mask=kept))


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)], ids=["whole", "adapters"])
def test_the_micro_batch_size_changes_no_update(make_config: Callable[..., PpoConfig], lora: LoraConfig) -> None:
    """L5: of actor and critic, and not clipped: a norm would hide that a gradient is too large."""
    results = []
    unclipped = EngineConfig(zero_stage=0, precision="fp32", gradient_clipping=0.0)
    gentle = replace(FAST, lr=1e-3, eps=1e-2)  # else Adam makes a whole step of a gradient that is only rounding
    for size in (1, 2, 4):
        options = {"actor_optim": gentle, "critic_optim": gentle, "entropy_coefficient": 0.1, "ppo_epochs": 2}
        config = make_config(
            lora=lora, engine=unclipped, micro_batch_size=size, kl=KlConfig(loss_coefficient=0.1), **options
        )
        torch.manual_seed(0)
        models, _, experience = start(config)
        metrics = update(models, of_unequal_lengths(experience), config, 0, None, None)
        results.append((metrics, weights(models.actor.module), weights(models.critic.module)))
    for metrics, actor, critic in results[1:]:
        for name, value in results[0][0].items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name
        for one, other in zip(actor + critic, results[0][1] + results[0][2], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_no_step_follows_the_one_that_moved_too_far(make_config: Callable[..., PpoConfig]) -> None:
    """L12: the first step has KL 0, the second one sees what the first has done."""
    config = make_config(ppo_epochs=4, target_kl=1e-9)
    models, _, experience = start(config)
    metrics = update(models, experience, config, 0, None, None)
    assert metrics["ppo/stopped_early"] == 1
    assert metrics["ppo/steps"] == models.actor.global_steps == models.critic.global_steps == 2


@pytest.mark.parametrize(("share", "steps"), [(0.99, 3), (1.01, 1)])
def test_updates_stop_above_one_and_a_half_times_the_target(
    make_config: Callable[..., PpoConfig], share: float, steps: int
) -> None:
    """L12: every log-ratio is 0.1, so the KL is exp(0.1) - 1 - 0.1."""
    kl = math.exp(0.1) - 1.1
    config = make_config(
        actor_optim=SLOW, critic_optim=SLOW, train_batch_size=8, ppo_epochs=3, target_kl=kl / (1.5 * share)
    )
    models, _, experience = start(config)
    moved = replace(experience, old_logprobs=experience.old_logprobs - 0.1)
    metrics = update(models, moved, config, 0, None, None)
    assert metrics["ppo/approx_kl"] == pytest.approx(kl, rel=1e-3)
    assert metrics["ppo/steps"] == models.actor.global_steps == models.critic.global_steps == steps


def test_a_target_that_is_kept_stops_nothing(make_config: Callable[..., PpoConfig]) -> None:
    """L12"""
    config = make_config(ppo_epochs=2, target_kl=1e3)
    models, _, experience = start(config)
    metrics = update(models, experience, config, 0, None, None)
    assert (metrics["ppo/stopped_early"], metrics["ppo/steps"]) == (0, 4)


def test_in_the_critics_warm_up_the_actor_stays_to_the_bit(make_config: Callable[..., PpoConfig]) -> None:
    config = make_config(critic_warmup_iterations=1, ema_decay=0.9)
    models, _, experience = start(config)
    average = MovingAverage(models.actor.module, 0.9)
    actor, critic = weights(models.actor.module), weights(models.critic.module)
    metrics = update(models, experience, config, 0, None, average)
    assert equal(weights(models.actor.module), actor)
    assert not equal(weights(models.critic.module), critic)
    assert metrics["ppo/value_loss"] > 0
    assert "ppo/policy_loss" not in metrics
    update(models, experience, config, 1, None, average)
    assert not equal(weights(models.actor.module), actor)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)], ids=["whole", "adapters"])
def test_the_reference_never_changes(make_config: Callable[..., PpoConfig], lora: LoraConfig) -> None:
    """F8, F9: also where it is the actor without its adapter, which is folded in and out again to sample."""
    config = make_config(lora=lora, ppo_epochs=2)
    models, rollout, experience = start(config)
    part = rollout.batch

    def reference_logprobs() -> Tensor:
        with torch.no_grad(), models.reference() as reference:
            return response_logprobs(reference, part, 0.7)[0]

    with models.reference() as reference:
        own = [p for name, p in reference.module.named_parameters() if "lora_" not in name]
    checksum = [parameter.detach().clone() for parameter in own]
    before = reference_logprobs()
    for iteration in range(2):
        update(models, experience, config, iteration, None, None)
        collect(models, PROMPTS, config, iteration)
        assert torch.equal(reference_logprobs(), before)
    assert equal(own, checksum)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in own)
    with torch.no_grad():
        assert not torch.allclose(response_logprobs(models.actor, part, 0.7)[0], before, atol=1e-3)
    separate = load_causal_lm(ModelConfig(path=config.actor.path), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(response_logprobs(separate, part, 0.7)[0], before, rtol=0, atol=1e-6)


def test_the_reward_model_never_changes(make_config: Callable[..., PpoConfig]) -> None:
    """F8"""
    config = make_config()
    models, rollout, experience = start(config)
    update(models, experience, config, 0, None, None)
    again = models.scorer(OwnRows(rollout.batch, config), rollout.prompts, rollout.completions)
    assert torch.equal(again, rollout.scores)


# Terms of the actor's loss


def ptx_batch() -> Batch:
    rows = [([*byte_ids("a film: good"), EOS], [False] * 8 + [True] * 5), (byte_ids("b: no"), [False] * 3 + [True] * 2)]
    return collate(rows, PAD)


def gradients(models: Models, micro: Experience, config: PpoConfig) -> list[Tensor]:
    models = replace(models, actor=models.actor.module)  # at stage 0 an engine's own backward is the only one allowed
    loss, _ = actor_loss(models, micro, config, micro.batch.response_mask.sum())
    return list(torch.autograd.grad(loss, list(models.actor.parameters())))


def test_the_ptx_gradient_is_added(make_config: Callable[..., PpoConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """L10: once for each optimizer step, whether in one micro-batch or in two."""
    unclipped = EngineConfig(zero_stage=0, precision="fp32", gradient_clipping=0.0)
    config = make_config(train_batch_size=8, engine=unclipped)
    models, _, experience = start(config)
    ptx = ptx_batch()
    alone = gradients(models, experience, config)
    logits = models.actor.module(input_ids=ptx.input_ids, attention_mask=ptx.attention_mask.long()).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, ptx.input_ids[:, 1:, None])[..., 0]
    loss = -chosen[ptx.response_mask[:, 1:]].mean()
    own = torch.autograd.grad(loss, list(models.actor.module.parameters()))
    assert max(float(gradient.abs().max()) for gradient in own) > 1e-2
    found: list[Tensor] = []
    monkeypatch.setattr(models.actor, "step", lambda: found.extend(p.grad for p in models.actor.module.parameters()))
    config = replace(config, ptx=replace(config.ptx, coefficient=0.3, paths=("x",)))
    rows = [ptx.rows(torch.tensor([row])) for row in (0, 1)]
    for parts in ([ptx], rows):
        found.clear()
        models.actor.module.zero_grad()
        metrics = update(models, experience, config, 0, iter([parts]), None)
        for a, b, c in zip(alone, own, found, strict=True):
            torch.testing.assert_close(c, a + 0.3 * b, rtol=1e-4, atol=1e-5)
        assert metrics["ppo/ptx_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_ptx_batches_are_used_once_per_step(make_config: Callable[..., PpoConfig]) -> None:
    """L10"""
    config = make_config(ppo_epochs=2)
    config = replace(config, ptx=replace(config.ptx, coefficient=0.3, paths=("x",)))
    models, _, experience = start(config)
    taken: list[int] = []

    def demonstrations() -> Iterator[list[Batch]]:
        while True:
            taken.append(1)
            yield [ptx_batch(), ptx_batch()]

    metrics = update(models, experience, config, 0, demonstrations(), None)
    assert len(taken) == metrics["ppo/steps"] == 4
    assert 1 < metrics["ppo/ptx_loss"] < 20


def test_the_entropy_bonus_is_subtracted(make_config: Callable[..., PpoConfig]) -> None:
    """L9"""
    config = make_config()
    models, _, experience = start(config)
    alone = gradients(models, experience, config)
    on = gradients(models, experience, replace(config, entropy_coefficient=0.5))
    batch = experience.batch
    logits = models.actor.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    logprobs = (logits[:, :-1] / 0.7).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)[batch.response_mask[:, 1:]].mean()
    own = torch.autograd.grad(entropy, list(models.actor.module.parameters()))
    for a, b, c in zip(alone, on, own, strict=True):
        torch.testing.assert_close(b, a - 0.5 * c, rtol=1e-4, atol=1e-5)


def test_the_kl_term_of_the_loss_pulls_towards_the_reference(make_config: Callable[..., PpoConfig]) -> None:
    """K6: k2's gradient is (log p - log p_ref) times that of log p."""
    config = make_config()
    models, _, experience = start(config)
    shifted = replace(experience, ref_logprobs=experience.ref_logprobs - 0.4)
    alone = gradients(models, shifted, config)
    on = gradients(models, shifted, replace(config, kl=replace(config.kl, loss_coefficient=2.0)))
    batch = experience.batch
    logprobs, _ = response_logprobs(models.actor.module, batch, 0.7)
    mean = logprobs[batch.response_mask].mean()
    own = torch.autograd.grad(mean, list(models.actor.module.parameters()))
    for a, b, c in zip(alone, on, own, strict=True):
        torch.testing.assert_close(b, a + 2.0 * 0.4 * c, rtol=1e-4, atol=1e-5)


def test_garbage_in_padding_reaches_no_gradient_of_the_actor(make_config: Callable[..., PpoConfig]) -> None:
    """K3: with every term of the loss that reads what a rollout holds."""
    config = make_config(entropy_coefficient=0.1, kl=KlConfig(loss_coefficient=0.5))
    models, _, experience = start(config)
    clean = gradients(models, experience, config)
    names = ("old_logprobs", "ref_logprobs", "advantages")
    for garbage in (torch.nan, torch.inf):
        outside = ~experience.batch.response_mask
        filled = {name: getattr(experience, name).masked_fill(outside, garbage) for name in names}
        for a, b in zip(clean, gradients(models, replace(experience, **filled), config), strict=True):
            assert torch.equal(a, b)


# The moving average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moving_average_has_its_closed_form(dtype: torch.dtype) -> None:
    """L11"""
    decay, model = 0.9, nn.Linear(3, 2).to(dtype)
    model.bias.requires_grad_(False)
    history = [model.weight.detach().double().clone()]
    average = MovingAverage(model, decay)
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)).to(dtype))
        history.append(model.weight.detach().double().clone())
        average.update()
    expected = decay**5 * history[0] + sum((1 - decay) * decay ** (5 - n) * history[n] for n in range(1, 6))
    found = average.whole_weights()
    assert list(found) == ["weight"]
    assert found["weight"].dtype == torch.float32
    torch.testing.assert_close(found["weight"].double(), expected, rtol=0, atol=1e-6)


def test_small_steps_of_the_average_do_not_round_away() -> None:
    """L11: in bf16, 1 + 0.001 * 1 is 1."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    average = MovingAverage(model, 0.999)
    nn.init.constant_(model.weight, 2.0)
    average.update()
    assert float(average.whole_weights()["weight"]) == pytest.approx(1.001, abs=1e-6)


def test_the_average_follows_every_step_of_the_actor(make_config: Callable[..., PpoConfig]) -> None:
    """L11"""
    config = make_config(ppo_epochs=2, ema_decay=0.5)
    models, _, experience = start(config)
    average = MovingAverage(models.actor.module, 0.5)
    calls: list[int] = []
    update_average = average.update

    def counted() -> None:
        calls.append(1)
        update_average()

    average.update = counted  # type: ignore[method-assign]
    update(models, experience, config, 0, None, average)
    assert len(calls) == models.actor.global_steps == 4
    assert set(average.whole_weights()) == {name for name, _ in models.actor.module.named_parameters()}


# Rewards and advantages


def small_rollout() -> Rollout:
    """Two rows: three response tokens that end, one that does not."""
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()
    attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    logprobs = torch.tensor([[0.0, -1.0, -2.0, -0.5], [0.0, -9.0, -1.5, -7.0]])
    ref_logprobs = torch.tensor([[0.0, -1.5, -1.0, -0.75], [0.0, -3.0, -2.5, -1.0]])
    return Rollout(
        prompts=PROMPTS[:2],
        completions=[Completion([8, 9, EOS], [0.0] * 3, True), Completion([8], [0.0], False)],
        batch=Batch(torch.full((2, 4), 8), attention_mask, mask),
        sampler_logprobs=logprobs,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=torch.zeros(2, 4),
        scores=torch.tensor([2.0, 5.0]),
    )


def test_rewards_are_the_score_less_the_kl(make_config: Callable[..., PpoConfig]) -> None:
    """K1, K3, A2: with values of 0, returns are sums of the rewards to come."""
    config = make_config(kl=KlConfig(coefficient=0.1), lam=1.0, whiten_advantages=False)
    rollout = small_rollout()
    experience, kl = make_experience(rollout, config, 0.1)
    # Token by token log p - log p_ref: 0.5, -1, 0.25 | 1
    torch.testing.assert_close(kl, torch.tensor([[0, 0.5, -1.0, 0.25], [0, 0, 1.0, 0]]))
    rewards = [[-0.05, 0.1, -0.025 + 2.0], [-0.1 + 5.0]]
    expected = torch.tensor([[0, sum(rewards[0]), sum(rewards[0][1:]), rewards[0][2]], [0, 0, rewards[1][0], 0]])
    torch.testing.assert_close(experience.returns, expected)
    torch.testing.assert_close(experience.advantages, expected)
    assert rollout.sequence_kl.tolist() == pytest.approx([-0.25, 1.0])
    assert float(expected[0, 1]) == pytest.approx(2.0 - 0.1 * -0.25)


def test_nothing_is_expected_after_the_last_token_whether_eos_or_the_limit_ended_it(
    make_config: Callable[..., PpoConfig],
) -> None:
    """A7, A3: by hand with values .5, .6, .7 (ended by EOS) and .25 (cut by the limit, then a critic's 9)."""
    config = make_config(kl=KlConfig(coefficient=0.0), whiten_advantages=False)
    values = torch.tensor([[9.0, 0.5, 0.6, 0.7], [9.0, 9.0, 0.25, 9.0]])
    experience, _ = make_experience(replace(small_rollout(), values=values), config, 0.0)
    # lambda .95: 2 - .7 = 1.3; .1 + .95 * 1.3 = 1.335; .1 + .95 * 1.335 = 1.36825 | 5 - .25
    torch.testing.assert_close(experience.advantages, torch.tensor([[0, 1.36825, 1.335, 1.3], [0, 0, 4.75, 0]]))
    torch.testing.assert_close(experience.returns, torch.tensor([[0, 1.86825, 1.935, 2.0], [0, 0, 5.0, 0]]))


def test_a_response_without_eos_gets_the_score_that_is_set_for_it(make_config: Callable[..., PpoConfig]) -> None:
    """K7"""
    options = {"kl": KlConfig(coefficient=0.0), "lam": 1.0, "whiten_advantages": False}
    for missing, expected in ((None, 5.0), (-1.0, -1.0)):
        experience, _ = make_experience(small_rollout(), make_config(missing_eos_score=missing, **options), 0.0)
        assert experience.returns[:, 2].tolist() == pytest.approx([2.0, expected])


def test_the_score_is_bounded_but_not_the_one_for_a_missing_eos(make_config: Callable[..., PpoConfig]) -> None:
    options = {"kl": KlConfig(coefficient=0.0), "lam": 1.0, "whiten_advantages": False, "score_clip": 1.5}
    experience, _ = make_experience(small_rollout(), make_config(missing_eos_score=-9.0, **options), 0.0)
    assert experience.returns[:, 2].tolist() == pytest.approx([1.5, -9.0])


def test_whitened_advantages_have_mean_0_and_variance_1_over_response_tokens(
    make_config: Callable[..., PpoConfig],
) -> None:
    """A5"""
    plain, _ = make_experience(small_rollout(), make_config(whiten_advantages=False), 0.05)
    whitened, _ = make_experience(small_rollout(), make_config(whiten_advantages=True), 0.05)
    mask = plain.batch.response_mask
    values = plain.advantages[mask].double().numpy()
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(whitened.advantages[mask].numpy(), expected, atol=1e-5)
    assert whitened.advantages[~mask].count_nonzero() == 0
    assert torch.equal(whitened.returns, plain.returns)


@pytest.mark.parametrize("whitened", [False, True])
def test_importance_weights_scale_what_the_actor_learns_from_a_token_and_nothing_else(
    make_config: Callable[..., PpoConfig], whitened: bool
) -> None:
    """Tokens that the trainer finds 1.5 times as likely as the sampler, half as likely, 4 times | as likely."""
    ratios = torch.tensor([[1.0, 1.5, 0.5, 4.0], [1.0, 1.0, 1.0, 1.0]])
    rollout = small_rollout()
    rollout = replace(rollout, sampler_logprobs=rollout.logprobs - ratios.log())
    plain, _ = make_experience(rollout, make_config(whiten_advantages=whitened), 0.05)
    weighed, _ = make_experience(rollout, make_config(whiten_advantages=whitened, max_importance_weight=2.0), 0.05)
    torch.testing.assert_close(weighed.advantages, plain.advantages * ratios.clamp(max=2.0))
    assert plain.advantages[rollout.mask].count_nonzero() == 4
    for name, tensor in plain.tensors().items():
        assert name == "advantages" or torch.equal(weighed.tensors()[name], tensor)


def test_whitened_rewards_keep_their_mean(make_config: Callable[..., PpoConfig]) -> None:
    """A5"""
    config = make_config(whiten_rewards=True, whiten_advantages=False, lam=1.0, kl=KlConfig(coefficient=0.1))
    experience, _ = make_experience(small_rollout(), config, 0.1)
    rewards = np.array([-0.05, 0.1, 1.975, 4.9])
    whitened = (rewards - rewards.mean()) / rewards.std() + rewards.mean()
    expected = [whitened[:3].sum(), whitened[1:3].sum(), whitened[2], whitened[3]]
    np.testing.assert_allclose(experience.returns[experience.batch.response_mask].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_pp"])
def test_estimators_without_a_critic_load_none_and_learn(make_config: Callable[..., PpoConfig], estimator: str) -> None:
    config = make_config(estimator=estimator, samples_per_prompt=2, rollout_batch_size=4)
    models, rollout, experience = start(config)
    assert models.critic is None
    assert rollout.values is None
    assert len(rollout.completions) == 8
    assert [prompt.source for prompt in rollout.prompts[::2]] == [prompt.source for prompt in rollout.prompts[1::2]]
    before = weights(models.actor.module)
    metrics = update(models, experience, config, 0, None, None)
    assert not equal(weights(models.actor.module), before)
    assert "ppo/value_loss" not in metrics


def test_a_group_that_agrees_teaches_nothing(make_config: Callable[..., PpoConfig]) -> None:
    config = make_config(
        estimator="rloo", samples_per_prompt=2, rollout_batch_size=4, whiten_advantages=False,
        kl=KlConfig(coefficient=0.0),
    )  # fmt: skip
    rollout = replace(small_rollout(), scores=torch.tensor([3.0, 3.0]), values=None)
    experience, _ = make_experience(rollout, config, 0.0)
    assert experience.advantages.count_nonzero() == 0


def test_the_critic_starts_as_the_reward_model(make_config: Callable[..., PpoConfig]) -> None:
    """L8"""
    config = make_config()
    models = load(config)
    reward_model = load_scalar_model(config.reward, torch.float32)
    assert equal(weights(models.critic.module), weights(reward_model))


def score_length(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping]) -> list[float]:
    return [float(record["row"]) for record in records]


def test_where_a_function_scores_the_critic_starts_at_zero(make_config: Callable[..., PpoConfig]) -> None:
    """L8"""
    config = make_config(reward=RewardModelConfig(function=f"{__name__}:score_length"))
    models, rollout, _ = start(config)
    assert rollout.values is not None
    assert rollout.values.count_nonzero() == 0
    assert models.score_scale == (1.0, 0.0)
    assert rollout.scores.tolist() == [prompt.record["row"] for prompt in rollout.prompts]


def test_a_reward_model_with_another_tokenizer_is_refused_by_name(
    make_config: Callable[..., PpoConfig], tiny_model: Folders, tiny_reward_model: Folders, tmp_path: Any
) -> None:
    build_tokenizer(eos="<|im_end|>").save_pretrained(tmp_path)
    other = RewardModelConfig(path=tiny_reward_model("llama"), tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match=r"reward\.retokenize"):
        load(make_config(reward=other))
    critic = CriticConfig(path=tiny_reward_model("llama"))
    load(make_config(reward=replace(other, retokenize=True), critic=critic))


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_adapter_dropout_is_refused(make_config: Callable[..., PpoConfig], tiny_model: Folders, name: str) -> None:
    """F7"""
    lora = LoraConfig(rank=4, dropout=0.1)
    kind = ModelConfig if name == "actor" else CriticConfig
    with pytest.raises(ValueError, match=rf"{name}\.lora\.dropout is 0\.1"):
        make_config(**{name: kind(path=tiny_model("llama"), lora=lora)})


# Prompts and seeds


def test_seeds_depend_on_the_position_alone() -> None:
    """O4"""
    together = row_seeds(1, "rollout", range(4), 2)
    assert len(set(together)) == 8
    assert row_seeds(1, "rollout", [2], 2) == together[4:6]
    others = [row_seeds(2, "rollout", range(4), 2), row_seeds(1, "held-out", range(4), 2)]
    assert not set(together) & {seed for seeds in others for seed in seeds}
    assert all(0 <= seed < 2**63 for seed in together)


def test_every_prompt_comes_once_per_epoch(make_config: Callable[..., PpoConfig]) -> None:
    config = make_config(rollout_batch_size=4, sampling=SamplingConfig(max_new_tokens=1))
    models = load(config)
    seen = [prompt.source for iteration in range(6) for prompt in collect(models, PROMPTS, config, iteration).prompts]
    everything = sorted(prompt.source for prompt in PROMPTS)
    epochs = [seen[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_an_iteration_can_be_collected_again_to_the_bit(make_config: Callable[..., PpoConfig]) -> None:
    """O4"""
    config = make_config()
    models = load(config)
    once, again = (collect(models, PROMPTS, config, 3) for _ in range(2))
    assert once.completions == again.completions
    assert torch.equal(once.scores, again.scores)
    assert collect(models, PROMPTS, config, 2).completions != once.completions


class Asked(Exception):
    """The rows and seeds that a rank was asked to sample."""


class Notes:
    """A generator that tells what it was asked for."""

    def generate(self, prompt_ids: list[list[int]], sampling: SamplingConfig, seeds: list[int], **options: Any) -> Any:
        raise Asked(list(zip(map(tuple, prompt_ids), seeds, strict=True)))


@pytest.mark.parametrize("prompts", [8, 5])
def test_ranks_share_out_the_rows_and_seeds_of_one_rank(
    make_config: Callable[..., PpoConfig], monkeypatch: pytest.MonkeyPatch, prompts: int
) -> None:
    """O4: so no two ranks draw the same, and their number changes no draw."""
    config = make_config(samples_per_prompt=2, rollout_batch_size=prompts, train_batch_size=2)
    models: Any = SimpleNamespace(generator=Notes())
    shares = []
    for world_size in (1, 2, 4):
        monkeypatch.setattr(distributed, "world_size", lambda size=world_size: size)
        drawn: list[tuple[tuple[int, ...], int]] = []
        for rank in range(world_size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            with pytest.raises(Asked) as asked:
                collect(models, PROMPTS, config, 3)
            drawn += asked.value.args[0]
        shares.append(drawn)
    assert shares[0] == shares[1] == shares[2]
    assert len({seed for _, seed in shares[0]}) == 2 * prompts


class Given:
    """A generator that returns what it was made with."""

    def __init__(self, completions: list[Completion]) -> None:
        self.completions = completions

    def generate(self, prompt_ids: list[list[int]], sampling: SamplingConfig, seeds: list[int], **options: Any) -> Any:
        return self.completions


class LogitsAre(nn.Module):
    """A language model whose logits are its parameters: two rows of 16 tokens, all equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, 16, VOCAB_SIZE))

    def forward(self, input_ids: Tensor, logits_to_keep: int, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[:, : input_ids.shape[1]][:, -logits_to_keep:])


def test_eos_is_learnt_and_nothing_after_it_also_where_it_is_the_pad_token(
    make_config: Callable[..., PpoConfig],
) -> None:
    """F4, F5, F3: a response of three tokens that ends, and one of five that the limit has cut."""
    completions = [Completion([8, 9, EOS], [0.0] * 3, True), Completion([8] * 5, [0.0] * 5, False)]
    model = LogitsAre()
    models: Any = SimpleNamespace(
        tokenizer=build_tokenizer(pad="eos", eos="<eos>"),
        actor=model,
        critic=None,
        generator=Given(completions),
        reference=lambda: Opened(model),
        scorer=lambda batch, prompts, completions: torch.zeros(len(prompts)),
    )
    config = make_config()
    rollout = sample_responses(models, PROMPTS[:2], config, [1, 2], 1)
    prompt, limit = len("a film"), len("so") + 5
    assert rollout.batch.input_ids[0, prompt + 2 :].tolist() == [EOS] * 8
    chosen = [[prompt <= t < prompt + 3 for t in range(16)], [2 <= t < limit for t in range(16)]]
    assert rollout.mask.tolist() == chosen
    torch.testing.assert_close(rollout.logprobs[rollout.mask], torch.full((8,), -math.log(VOCAB_SIZE)))
    ones = torch.ones(2, 16)
    experience = Experience(rollout.batch, rollout.logprobs, rollout.ref_logprobs, ones, None, ones)
    loss, _ = actor_loss(models, experience, config, torch.tensor(8))
    loss.backward()
    assert model.logits.grad is not None
    # The logits that choose token t stand one place before it. Of these, only those of what was chosen are to rise.
    assert model.logits.grad.any(-1).tolist() == [[*row[1:], False] for row in chosen]
    rising = [[row, t - 1, int(rollout.batch.input_ids[row, t])] for row in (0, 1) for t in range(16) if chosen[row][t]]
    assert (model.logits.grad < 0).nonzero().tolist() == rising


def test_a_score_is_that_of_the_prompt_and_the_response_up_to_its_eos(
    make_config: Callable[..., PpoConfig], tiny_reward_model: Folders
) -> None:
    """K7, R1, G6: by transformers alone, row by row; the second response is no text that could be tokenized again."""
    completions = [
        Completion([*byte_ids("!"), EOS], [0.0] * 2, True),
        Completion([200, 201, 255], [0.0] * 3, False),
    ]
    assert TOKENIZER(TOKENIZER.decode([200, 201, 255]))["input_ids"] != [200, 201, 255]
    config = make_config()
    models = replace(load(config), generator=Given(completions))
    rollout = sample_responses(models, PROMPTS[:2], config, [1, 2], 1)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_reward_model("llama"), dtype=torch.float32)
    for prompt, completion, score in zip(PROMPTS, completions, rollout.scores.tolist(), strict=False):
        with torch.no_grad():
            expected = plain(input_ids=torch.tensor([prompt.prompt_ids + completion.response_ids])).logits
        assert score == pytest.approx(float(expected), abs=1e-5)


def test_what_was_sampled_is_what_is_trained_on(make_config: Callable[..., PpoConfig]) -> None:
    """G6, F5"""
    _, rollout, experience = start(make_config())
    for row, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        length = len(prompt.prompt_ids) + len(completion.response_ids)
        ids = experience.batch.input_ids[row, :length].tolist()
        assert ids == prompt.prompt_ids + completion.response_ids
        mask = experience.batch.response_mask[row].tolist()
        assert mask == [len(prompt.prompt_ids) <= t < length for t in range(len(mask))]
        assert experience.old_logprobs[row, : len(prompt.prompt_ids)].shape == (len(prompt.prompt_ids),)


def test_metrics_of_a_rollout_by_hand(make_config: Callable[..., PpoConfig]) -> None:
    rollout = small_rollout()
    rollout = replace(rollout, sampler_logprobs=rollout.logprobs + torch.tensor([[0.2], [-0.6]]))
    metrics = rollout_metrics(rollout, torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0), 0.1)
    assert metrics["rollout/score_mean"] == pytest.approx(3.5)
    assert metrics["rollout/score_std"] == pytest.approx(1.5)
    assert metrics["rollout/kl"] == pytest.approx((-0.25 + 1) / 2)
    assert metrics["rollout/kl_penalty"] == pytest.approx(0.1 * (-0.25 + 1) / 2)
    assert metrics["rollout/response_tokens"] == 2
    assert metrics["rollout/eos_share"] == 0.5
    assert metrics["rollout/logprob_gap"] == pytest.approx((3 * 0.2 + 1 * 0.6) / 4)
    assert metrics["rollout/sequence_logprob"] == pytest.approx((-3.5 - 1.5) / 2)


def test_the_kl_controller_is_the_one_that_is_asked_for(make_config: Callable[..., PpoConfig]) -> None:
    """K4"""
    fixed = kl_controller(make_config(kl=KlConfig(coefficient=0.3)))
    assert isinstance(fixed, FixedKLController) and fixed.coefficient == 0.3
    adaptive = kl_controller(make_config(kl=KlConfig(coefficient=0.15, adaptive=True, target=6.0, horizon=10_000)))
    assert isinstance(adaptive, AdaptiveKLController)
    adaptive.update(12.0, 512)
    assert adaptive.coefficient == pytest.approx(0.151536, abs=1e-6)


# Scores


def returns_nothing(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping]) -> list[float]:
    return [1.0] * (len(prompts) - 1)


def returns_nan(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping]) -> list[float]:
    return [1.0, math.nan]


def echoes(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping]) -> list[float]:
    assert (list(prompts), list(responses)) == (["a film", "so"], ["!", " so"])
    return [record["row"] + 0.5 for record in records]


SIZES: Any = SimpleNamespace(micro_batch_size=1, micro_batch_tokens=None)
COMPLETIONS = [
    Completion([*byte_ids("!"), EOS], [0.0] * 2, True),
    Completion(byte_ids(" so"), [0.0] * 3, False),
]


def own(completions: list[Completion], sizes: Any = SIZES) -> OwnRows:
    return OwnRows(rows_of(completions), sizes)


def rows_of(completions: list[Completion]) -> Batch:
    rows = []
    for prompt, completion in zip(PROMPTS, completions, strict=False):
        ids = prompt.prompt_ids + completion.response_ids
        rows.append((ids, [False] * len(prompt.prompt_ids) + [True] * len(completion.response_ids)))
    return collate(rows, PAD)


def test_what_models_say_of_a_rollout_keeps_no_graph() -> None:
    """A graph of all rows would fill the memory, and old log-probabilities with a gradient change the loss."""

    def forward(batch: Batch) -> Tensor:
        assert not torch.is_grad_enabled()
        return batch.attention_mask.sum(1).float()

    assert own(COMPLETIONS).run(forward).tolist() == rows_of(COMPLETIONS).lengths


def scorer_of(function: str, **options: Any) -> Scorer:
    return function_scorer(ScoreFunction(f"{__name__}:{function}", TOKENIZER, **options))


def test_a_function_gets_texts_and_records() -> None:
    scores = scorer_of("echoes")(own(COMPLETIONS), PROMPTS[:2], COMPLETIONS)
    assert scores.tolist() == [0.5, 1.5]
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("returns_nothing", "returned 1 scores for 2 responses"),
        ("returns_nan", r"returned nan for the prompt at prompts\.jsonl:2"),
    ],
)
def test_scores_that_are_none_are_refused(function: str, message: str) -> None:
    scorer = scorer_of(function)
    with pytest.raises(ValueError, match=message):
        scorer(own(COMPLETIONS), PROMPTS[:2], COMPLETIONS)


def raises_on_the_second(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping]) -> list[float]:
    return [1 / (1 - record["row"]) for record in records]


def never_returns(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping]) -> list[float]:
    threading.Event().wait()
    return []


def test_a_function_that_raises_is_told_with_its_sample() -> None:
    scorer = scorer_of("raises_on_the_second")
    message = r"raised ZeroDivisionError: .*\(test_ppo\.py:\d+\) on the response to the prompt at prompts\.jsonl:2"
    with pytest.raises(ValueError, match=message):
        scorer(own(COMPLETIONS), PROMPTS[:2], COMPLETIONS)


def test_a_function_that_does_not_return_is_given_up() -> None:
    scorer = scorer_of("never_returns", minutes=0.2 / 60)
    with pytest.raises(ValueError, match=r"did not return within .* at prompts\.jsonl:1 to prompts\.jsonl:2"):
        scorer(own(COMPLETIONS), PROMPTS[:2], COMPLETIONS)


ASKED: queue.SimpleQueue[list[str]] = queue.SimpleQueue()


def notes_what_it_is_asked(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping]) -> list[float]:
    ASKED.put(list(responses))
    return [record["row"] + 0.5 for record in records]


def test_a_function_is_called_as_soon_as_a_response_has_ended() -> None:
    early = EarlyScores(ScoreFunction(f"{__name__}:notes_what_it_is_asked", TOKENIZER), PROMPTS[:3])
    early.add([2, 0], [COMPLETIONS[0], COMPLETIONS[1]])
    assert ASKED.get(timeout=60) == ["!", " so"]  # the second response is not there yet
    early.add([1], [COMPLETIONS[0]])
    assert early.result() == [0.5, 1.5, 2.5]


def test_early_scores_raise_where_they_are_asked_for() -> None:
    early = EarlyScores(ScoreFunction(f"{__name__}:raises_on_the_second", TOKENIZER), PROMPTS[:2])
    early.add([0], COMPLETIONS[:1])
    early.add([1], COMPLETIONS[1:])
    with pytest.raises(ValueError, match=r"raised ZeroDivisionError: .* the prompt at prompts\.jsonl:2"):
        early.result()


@pytest.mark.parametrize("name", ["no_such_module_here:score", f"{__name__}:no_such_function"])
def test_a_function_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"reward.function {name} cannot be imported"):
        ScoreFunction(name, TOKENIZER)


def test_scores_of_retokenized_text_are_the_direct_ones_where_tokenizers_agree(tiny_reward_model: Folders) -> None:
    """K7: also of a response that the limit has cut, which has no EOS."""
    config = EngineConfig(zero_stage=0, precision="fp32")
    model = load_scalar_model(ModelConfig(path=tiny_reward_model("llama")), torch.float32)
    engine = frozen_engine(model, config)
    rows = own(COMPLETIONS)
    direct = model_scorer(engine)(rows, PROMPTS[:2], COMPLETIONS)
    again = retokenizing_scorer(engine, SIZES, TOKENIZER, TOKENIZER)(rows, PROMPTS[:2], COMPLETIONS)
    torch.testing.assert_close(again, direct, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("micro_batch_size", "micro_batch_tokens"), [(1, None), (2, None), (8, None), (1, 40)])
def test_scores_do_not_depend_on_the_micro_batch_size(
    tiny_reward_model: Folders, micro_batch_size: int, micro_batch_tokens: int | None
) -> None:
    """R1, L5"""
    model = load_scalar_model(ModelConfig(path=tiny_reward_model("llama")), torch.float32)
    alone = model_scorer(model)(own(COMPLETIONS[:1]), PROMPTS[:1], COMPLETIONS[:1])
    sizes: Any = SimpleNamespace(micro_batch_size=micro_batch_size, micro_batch_tokens=micro_batch_tokens)
    scores = model_scorer(model)(own(COMPLETIONS, sizes), PROMPTS[:2], COMPLETIONS)
    assert float(scores[0]) == pytest.approx(float(alone), abs=1e-5)
    assert scores.shape == (2,)


# Before and after


@pytest.mark.parametrize(
    ("wins", "losses", "ties", "value", "low", "high"),
    [
        (8, 2, 0, 0.8, 0.4901625, 0.9433178),  # Wilson's interval of 8 of 10
        (0, 10, 0, 0.0, 0.0, 0.2775328),
        (10, 0, 0, 1.0, 0.7224672, 1.0),
        (7, 1, 2, 0.8, 0.4901625, 0.9433178),
        (0, 0, 4, 0.5, 0.1500390, 0.8499610),
    ],
)
def test_win_rate_and_its_interval_by_hand(
    wins: int, losses: int, ties: int, value: float, low: float, high: float
) -> None:
    before = [0.0] * (wins + losses + ties)
    result = win_rate(before, [1.0] * wins + [-1.0] * losses + [0.0] * ties)
    assert result["value"] == pytest.approx(value)
    assert result["low"] == pytest.approx(low, abs=1e-6)
    assert result["high"] == pytest.approx(high, abs=1e-6)
    assert result["pairs"] == len(before)


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        (["a b c"], 1.0),
        (["a b a b a"], 2 / 4),  # ab ba ab ba
        (["The end", "the END"], 1 / 2),
        (["one", ""], 0.0),  # no pair at all
        (["a b", "c d"], 1.0),  # b c is not a pair: it lies between two responses
    ],
)
def test_distinct_2_by_hand(responses: list[str], expected: float) -> None:
    assert distinct_2(responses) == expected


def test_results_compare_the_same_prompts_before_and_after() -> None:
    before = [Sample("p", "e f", 1.0, 0.0, 4, True), Sample("q", "c d", 3.0, 0.0, 6, False)]
    after = [Sample("p", "a b", 2.0, 1.0, 2, True), Sample("q", "a b", 1.0, 2.0, 4, True)]
    assert held_out_metrics(after) == {
        "eval/score_mean": 1.5,
        "eval/kl": 1.5,
        "eval/response_tokens": 3.0,
        "eval/eos_share": 1.0,
    }
    results = compare(before, after, (2.0, 1.0))
    assert results["score_before"] == {"mean": 2.0, "median": 2.0, "values": [1.0, 3.0]}
    assert results["score_after"] == {"mean": 1.5, "median": 1.5, "values": [2.0, 1.0]}
    assert results["logit_before"] == {"mean": 0.5, "median": 0.5}  # (score - bias) / gain
    assert results["win_rate"]["value"] == 0.5
    assert results["kl"] == 1.5
    assert (results["distinct_2_before"], results["distinct_2_after"], results["distinct_2_ratio"]) == (1.0, 0.5, 0.5)
    assert (results["response_tokens_before"], results["response_tokens_after"]) == (5, 3)
    assert (results["eos_share_before"], results["eos_share_after"]) == (0.5, 1)


def test_the_same_response_is_a_tie_whatever_the_last_bit_of_its_score_says() -> None:
    before = [Sample("p", "same", 1.0, 0.0, 1, True), Sample("q", "a", 1.0, 0.0, 1, True)]
    after = [Sample("p", "same", 1.0 + 1e-7, 0.0, 1, True), Sample("q", "b", 1.0 + 1e-7, 0.0, 1, True)]
    assert compare(before, after, (1.0, 0.0))["win_rate"]["value"] == (0.5 + 1) / 2


def test_held_out_samples_repeat_as_long_as_the_weights_do(make_config: Callable[..., PpoConfig]) -> None:
    config = make_config()
    models, _, experience = start(config)
    once, again = (sample_held_out(models, PROMPTS[:3], config) for _ in range(2))
    assert once == again
    assert [sample.prompt for sample in once] == [prompt.text for prompt in PROMPTS[:3]]
    assert all(sample.kl == 0 for sample in once)
    for iteration in range(3):
        update(models, experience, config, iteration, None, None)
    moved = sample_held_out(models, PROMPTS[:3], config)
    assert any(sample.kl != 0 for sample in moved)


def test_ppo_raises_the_score_of_a_task_that_it_can_see(make_config: Callable[..., PpoConfig]) -> None:
    """The whole of an iteration together: the share of one token rises when it is what is paid for."""
    config = make_config(
        reward=RewardModelConfig(function=f"{__name__}:pays_for_vowels"), estimator="rloo", samples_per_prompt=8,
        rollout_batch_size=8, train_batch_size=32, micro_batch_size=32, kl=KlConfig(coefficient=0.0),
        sampling=SamplingConfig(max_new_tokens=6), actor_optim=replace(FAST, lr=5e-3), iterations=12,
    )  # fmt: skip
    models = load(config)
    scores = []
    for iteration in range(config.iterations):
        rollout = collect(models, PROMPTS, config, iteration)
        experience, _ = make_experience(rollout, config, 0.0)
        update(models, experience, config, iteration, None, None)
        scores.append(float(rollout.scores.mean()))
    assert sum(scores[-3:]) > 3 * sum(scores[:3])


def pays_for_vowels(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping]) -> list[float]:
    return [float(sum(Counter(response)[letter] for letter in "aeiou")) for response in responses]
