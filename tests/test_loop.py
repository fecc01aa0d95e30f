"""The supervised loop: it learns, it reports, and micro-batches are an implementation detail."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_tokenizers import EOS, NUM_SPECIAL, PAD, VOCAB_SIZE
from training.config import EngineConfig, ModelConfig, OptimConfig, RunConfig
from training.data import Batch, collate
from training.engine import train_engine
from training.forward import response_logprobs
from training.loop import SkippedSteps, fit, skipped_steps
from training.losses import sft_loss
from training.metrics import MetricsLogger
from training.models import load_causal_lm

pytestmark = pytest.mark.usefixtures("process_group")

FP32 = EngineConfig(zero_stage=2, precision="fp32", gradient_clipping=0.0)


def loss_fn(engine: Any, batch: Batch, denominator: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    logprobs, _ = response_logprobs(engine, batch)
    right = (logprobs > -1.0) & batch.response_mask
    return sft_loss(logprobs, batch.response_mask, denominator), {"likely": right.sum()}


def micro_batches(micro_batch_size: int, seed: int = 0) -> list[Batch]:
    """Four rows with 3, 12, 6 and 1 response tokens, in micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in (3, 12, 6, 1):
        ids = torch.randint(NUM_SPECIAL, VOCAB_SIZE, (length + 2,), generator=generator).tolist()
        rows.append(([*ids, EOS][: length + 2], [False] * 2 + [True] * length))
    return [collate(rows[start : start + micro_batch_size], PAD) for start in range(0, 4, micro_batch_size)]


def run(
    path: str,
    folder: Path,
    *,
    steps: int = 6,
    micro_batch_size: int = 2,
    lr: float = 0.01,
    eps: float = 1e-8,
    **options: Any,
) -> tuple[list[dict], dict[str, Tensor]]:
    """Fit one batch several times; the lines of metrics.jsonl and the final weights."""
    optim = OptimConfig(lr=lr, eps=eps, schedule="constant", warmup_fraction=0.0)
    model = load_causal_lm(ModelConfig(path=path), torch.float32)
    engine = train_engine(model, FP32, optim, train_batch_size=4, total_steps=steps)
    logger = MetricsLogger(folder, steps, RunConfig(output_dir=str(folder)), is_main=True)
    settings: dict[str, Any] = {"log_every": 1, "evaluate": dict, **options}
    data = [micro_batches(micro_batch_size) for _ in range(steps)]
    fit(engine, data, loss_fn, lambda batch: batch.response_mask.sum(), logger, **settings)
    logger.close()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    weights = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    return [json.loads(line) for line in lines], weights


def test_the_loss_of_a_batch_that_is_seen_again_falls(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    lines, _ = run(tiny_model("llama"), tmp_path, steps=12)
    losses = [line["train/loss"] for line in lines]
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_is_the_mean_over_all_response_tokens_of_a_step(
    tmp_path: Path, tiny_model: Callable[[str], str]
) -> None:
    """L5"""
    path = tiny_model("llama")
    model = load_causal_lm(ModelConfig(path=path), torch.float32)
    logprobs = [response_logprobs(model, batch)[0][batch.response_mask] for batch in micro_batches(1)]
    flat = torch.cat(logprobs)
    assert len(flat) == 3 + 12 + 6 + 1
    for micro_batch_size in (1, 2, 4):
        lines, _ = run(path, tmp_path / str(micro_batch_size), steps=1, micro_batch_size=micro_batch_size)
        assert lines[0]["train/loss"] == pytest.approx(float(-flat.mean()), abs=1e-5)
        assert lines[0]["train/likely"] == pytest.approx(float((flat > -1.0).float().mean()))


def test_the_micro_batch_size_changes_nothing(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    """L5"""
    results = []
    for micro_batch_size in (1, 2, 4):
        # A large eps: Adam would make a whole step of a gradient that is nothing but rounding.
        folder = tmp_path / str(micro_batch_size)
        results.append(run(tiny_model("gpt2"), folder, micro_batch_size=micro_batch_size, lr=1e-3, eps=1e-2))
    (lines, weights), *others = results
    for other_lines, other_weights in others:
        for line, other_line in zip(lines, other_lines, strict=True):
            for name in ("train/loss", "train/grad_norm"):
                assert other_line[name] == pytest.approx(line[name], rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=0, atol=1e-6)


def test_each_line_says_what_was_done_up_to_it(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    lines, _ = run(tiny_model("llama"), tmp_path, steps=3, lr=0.01)
    tokens_of_a_step = 5 + 14 + 8 + 3  # prompts too
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["tokens"] for line in lines] == [tokens_of_a_step * step for step in (1, 2, 3)]
    assert all(line["train/lr"] == pytest.approx(0.01) for line in lines)
    assert all(line["train/grad_norm"] > 0 for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_lines_come_at_the_first_step_and_at_every_nth(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    lines, _ = run(tiny_model("llama"), tmp_path, steps=7, log_every=3)
    assert [line["step"] for line in lines] == [1, 3, 6]


def test_evaluations_come_when_they_are_due_and_see_the_trained_weights(
    tmp_path: Path, tiny_model: Callable[[str], str]
) -> None:
    calls: list[int] = []

    def evaluate() -> dict[str, float]:
        calls.append(1)
        return {"accuracy": 0.5}

    lines, _ = run(tiny_model("llama"), tmp_path, steps=5, log_every=100, eval_every=2, evaluate=evaluate)
    assert len(calls) == 2
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [2, 4]
    assert [line["step"] for line in lines if "train/loss" in line] == [1]


def test_a_step_in_which_nothing_counts_changes_no_weight(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    path = tiny_model("llama")
    model = load_causal_lm(ModelConfig(path=path), torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optim = OptimConfig(lr=0.1, warmup_fraction=0.0)
    engine = train_engine(model, FP32, optim, train_batch_size=4, total_steps=2)
    logger = MetricsLogger(tmp_path, 1, RunConfig(output_dir=str(tmp_path)), is_main=True)
    filler = [batch.as_filler() for batch in micro_batches(4)]
    fit(engine, [filler], loss_fn, lambda batch: batch.response_mask.sum(), logger, log_every=1, evaluate=lambda: {})
    logger.close()
    assert all(torch.equal(parameter.cpu(), before[name]) for name, parameter in engine.module.named_parameters())


# Steps whose gradient is not finite


def test_a_step_without_a_finite_gradient_is_left_out_and_kept_for_a_look(
    tmp_path: Path, tiny_model: Callable[[str], str]
) -> None:
    broken = {2, 3}
    seen: list[int] = []

    def breaks(engine: Any, batch: Batch, denominator: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        seen.append(1)
        loss, extra = loss_fn(engine, batch, denominator)
        return loss * (torch.nan if (len(seen) + 1) // 2 in broken else 1.0), extra

    path = tiny_model("llama")
    model = load_causal_lm(ModelConfig(path=path), torch.float32)
    optim = OptimConfig(lr=0.01, schedule="constant", warmup_fraction=0.0)
    engine = train_engine(model, FP32, optim, train_batch_size=4, total_steps=9)
    logger = MetricsLogger(tmp_path, 4, RunConfig(output_dir=str(tmp_path)), is_main=True)
    skipped = SkippedSteps(2, tmp_path / "skipped")
    options: dict[str, Any] = {"log_every": 1, "evaluate": dict, "skipped": skipped}
    count = lambda batch: batch.response_mask.sum()  # noqa: E731
    fit(engine, [micro_batches(2) for _ in range(4)], breaks, count, logger, **options)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped"] for line in lines] == [0.0, 1.0, 1.0, 0.0]
    assert engine.optimizer.param_groups[0]["lr"] == 0.01
    assert skipped.in_a_row == 0
    kept = load_file(tmp_path / "skipped" / "step-000002-rank-00000.safetensors")
    assert torch.equal(kept["1/input_ids"], micro_batches(2)[1].input_ids)

    broken |= set(range(5, 9))
    with pytest.raises(RuntimeError, match=r"3 steps in a row had a gradient that is not finite.*skipped"):
        fit(engine, [micro_batches(2) for _ in range(4)], breaks, count, logger, start_step=4, **options)
    logger.close()
    assert all(parameter.isfinite().all() for parameter in engine.module.parameters())


def test_fp16_may_leave_out_more_steps_while_its_loss_scale_falls() -> None:
    run = RunConfig(output_dir="unused", max_skipped_steps=3)
    limits = [
        skipped_steps(SimpleNamespace(run=run, engine=EngineConfig(precision=precision))).limit  # type: ignore[arg-type]
        for precision in ("bf16", "fp16")
    ]
    assert limits == [3, 23]
