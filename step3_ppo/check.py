"""What must hold before the first update: the run verifies itself and says so."""

from collections.abc import Mapping

import torch
from torch import Tensor

from step3_ppo.config import PpoConfig
from step3_ppo.models import Models
from step3_ppo.rollout import Rollout
from step3_ppo.scoring import OwnRows
from training import distributed
from training.accounting import peak_memory_gib
from training.data import Batch
from training.forward import response_logprobs

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Largest mean difference of log-probabilities per token that rounding explains."""
SAMPLER_FACTOR = 5
"""The sampler, which decodes token by token, may differ by so much more."""
ROWS_ALONE = 4
"""Rows that the trainer computes once more, each by itself, to see what rounding makes of another batch."""


def start_up_check(models: Models, rollout: Rollout, config: PpoConfig, seconds: Mapping[str, float]) -> str:
    """Compare sampler, scorer, trainer and reference on the first rollout. Every rank must call this.

    Args:
        seconds: that each phase of the rollout took.

    Returns: a line with the ratio, the KL, the sampler's gap and the trainer's own, tokens per second and memory.

    Raises:
        RuntimeError: a number that must be 1 or 0 is not; with the likely cause.
    """
    own = OwnRows(rollout.batch, config)
    rows, part = own.rows[0], own.micro_batches[0]
    time = part.input_ids.shape[1]
    logprobs = response_logprobs(models.actor, part, config.sampling.temperature)[0].detach()
    log_ratio = (logprobs - rollout.logprobs[rows, :time])[part.response_mask]
    kl = (rollout.logprobs - rollout.ref_logprobs)[rollout.mask]
    gap = (logprobs - rollout.sampler_logprobs[rows, :time])[part.response_mask].abs()
    rounding = _gap_to_rows_alone(models, part, logprobs, config.sampling.temperature)
    ratio, ratio_error, mean_kl, kl_error, mean_gap, mean_rounding = _means_over_ranks(
        log_ratio.exp(), log_ratio.abs(), kl, kl.abs(), gap, rounding
    )

    sampler_tolerance = SAMPLER_FACTOR * TOLERANCE[config.engine.precision]
    tolerance = sampler_tolerance if config.old_logprobs == "rollout" else TOLERANCE[config.engine.precision]
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
    restricted = config.sampling.restricted
    if not restricted:
        _require(
            mean_gap < sampler_tolerance,
            f"the sampler's log-probabilities differ from the trainer's by {mean_gap:.4f} on average",
            "the rollout backend computes other log-probabilities than the trainer: positions or weights differ",
        )
    response_tokens, all_tokens = int(rollout.mask.sum()), rollout.batch.num_tokens
    return (
        f"start-up check: ratio {ratio:.4f}, kl {kl_error:.4f}, "
        f"sampler gap mean {mean_gap:.4f} p99 {rollout.worst_gap:.4f} (rounding {mean_rounding:.4f})"
        f"{' (not judged: top_k, top_p or min_new_tokens is set)' if restricted else ''}, "
        f"generate {response_tokens / seconds['generate']:.0f} tokens/s, "
        f"score {all_tokens / seconds['score']:.0f} tokens/s, memory {peak_memory_gib():.1f} GiB"
    )


def _gap_to_rows_alone(models: Models, part: Batch, logprobs: Tensor, temperature: float) -> Tensor:
    """[tokens] how far the [batch, time] log-probabilities of the first rows are from those of each row alone."""
    gaps = []
    for number in range(ROWS_ALONE):  # as many forwards on every rank
        row = torch.tensor([number % len(part)])
        alone = part.rows(row)
        again = response_logprobs(models.actor, alone, temperature)[0].detach()
        gaps.append((again - logprobs[row, : again.shape[1]])[alone.response_mask].abs())
    return torch.cat(gaps)


def _require(holds: bool, what: str, cause: str) -> None:
    if not holds:
        raise RuntimeError(f"start-up check failed: {what}. Likely cause: {cause}")


def _means_over_ranks(*values: Tensor) -> list[float]:
    """Mean of each tensor's numbers over all ranks; 0 where there are none."""
    sums = [torch.stack([value.double().sum(), torch.tensor(float(len(value))).to(value.device)]) for value in values]
    totals = distributed.sum_over_ranks(torch.stack(sums)).tolist()
    return [total / max(count, 1.0) for total, count in totals]
