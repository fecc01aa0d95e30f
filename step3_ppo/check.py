"""What must hold before the first update: the run verifies itself and says so."""

import torch
from torch import Tensor

from step3_ppo.config import PpoConfig
from step3_ppo.models import Models
from step3_ppo.rollout import PhaseTimer, Rollout
from training import distributed
from training.data import micro_batches
from training.forward import response_logprobs
from training.loop import peak_memory_gib

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Largest mean difference of log-probabilities per token that rounding explains."""


def start_up_check(models: Models, rollout: Rollout, config: PpoConfig, timer: PhaseTimer) -> str:
    """Compare sampler, scorer, trainer and reference on the first rollout. Every rank must call this.

    Returns: a line with the ratio, the KL, the sampler's gap, tokens per second and memory.

    Raises:
        RuntimeError: a number that must be 1 or 0 is not; with the likely cause.
    """
    part = micro_batches(rollout.batch, config.micro_batch_size)[0]
    rows, time = part.input_ids.shape
    logprobs, _ = response_logprobs(models.actor, part, config.sampling.temperature)
    log_ratio = (logprobs.detach() - rollout.logprobs[:rows, :time])[part.response_mask]
    kl = (rollout.logprobs - rollout.ref_logprobs)[rollout.mask]
    gap = (rollout.sampler_logprobs - rollout.logprobs)[rollout.mask].abs()
    ratio, ratio_error, mean_kl, kl_error, mean_gap = _means_over_ranks(
        log_ratio.exp(), log_ratio.abs(), kl, kl.abs(), gap
    )

    tolerance = TOLERANCE[config.engine.precision]
    _require(
        ratio_error < tolerance,
        f"the ratio is {ratio:.4f}, and log-ratios differ from 0 by {ratio_error:.4f} on average",
        "two forwards of the same weights differ: dropout is on, or the attention kernel depends on the batch",
    )
    if config.reference_path in (None, config.actor.path):
        _require(
            kl_error < tolerance,
            f"the kl is {mean_kl:.4f}, and its terms differ from 0 by {kl_error:.4f} on average",
            "actor and reference start from the same weights but disagree: one of them was loaded wrongly",
        )
    restricted = config.sampling.top_k > 0 or config.sampling.top_p < 1 or config.sampling.min_new_tokens > 0
    if not restricted:
        _require(
            mean_gap < 5 * tolerance,
            f"the sampler's log-probabilities differ from the trainer's by {mean_gap:.4f} on average",
            "the rollout backend computes other log-probabilities than the trainer: positions or weights differ",
        )
    response_tokens, all_tokens = distributed.sum_over_ranks(
        torch.stack([rollout.mask.sum(), rollout.batch.attention_mask.sum()])
    ).tolist()
    return (
        f"start-up check: ratio {ratio:.4f}, kl {kl_error:.4f}, "
        f"sampler gap mean {mean_gap:.4f} p99 {rollout.worst_gap:.4f}"
        f"{' (not judged: top_k, top_p or min_new_tokens is set)' if restricted else ''}, "
        f"generate {response_tokens / timer.seconds['generate']:.0f} tokens/s, "
        f"score {all_tokens / timer.seconds['score']:.0f} tokens/s, memory {peak_memory_gib():.1f} GiB"
    )


def _require(holds: bool, what: str, cause: str) -> None:
    if not holds:
        raise RuntimeError(f"start-up check failed: {what}. Likely cause: {cause}")


def _means_over_ranks(*values: Tensor) -> list[float]:
    """Mean of each tensor's numbers over all ranks; 0 where there are none."""
    sums = [torch.stack([value.double().sum(), torch.tensor(float(len(value))).to(value.device)]) for value in values]
    totals = distributed.sum_over_ranks(torch.stack(sums)).tolist()
    return [total / max(count, 1.0) for total, count in totals]
