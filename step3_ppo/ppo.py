"""The updates of one iteration: several passes over the experience in minibatches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from step3_ppo.config import PpoConfig
from step3_ppo.ema import MovingAverage
from step3_ppo.models import Models
from step3_ppo.rollout import Experience
from training import distributed
from training.data import Batch
from training.engine import backward_and_step, gradient_norm
from training.forward import critic_values, response_logprobs
from training.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy_bonus,
    kl_loss,
    policy_statistics,
    sft_loss,
)
from training.masking import masked_sum


@dataclass
class Updates:
    """What an iteration's updates add up to, over this rank's micro-batches."""

    sums: dict[str, Tensor]
    steps: int = 0
    stopped_early: bool = False

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.detach()

    def metrics(self) -> dict[str, float]:
        """Means per response token over all ranks and minibatches."""
        names = sorted(self.sums)
        totals = distributed.sum_over_ranks(torch.stack([self.sums[name].double() for name in names]))
        values = dict(zip(names, totals.tolist(), strict=True))
        count = max(values.pop("count"), 1.0)
        means = {f"ppo/{name}": value / count for name, value in values.items()}
        if "ppo/clipped" in means:
            means["ppo/clip_fraction"] = means.pop("ppo/clipped")
        return means | {"ppo/steps": self.steps, "ppo/stopped_early": float(self.stopped_early)}


def update(
    models: Models,
    experience: Experience,
    config: PpoConfig,
    iteration: int,
    demonstrations: Iterator[list[Batch]] | None,
    average: MovingAverage | None,
) -> dict[str, float]:
    """`ppo_epochs` passes of clipped updates of actor and critic. Every rank must call this.

    Args:
        experience: this rank's rows; as many on every rank.
        iteration: counted from 0; seeds the order of rows and decides on the critic's warm-up.
        demonstrations: for each optimizer step, this rank's micro-batches for the PTX loss; None without it.
        average: moving average of the actor, updated after each of its steps.

    Returns: metrics, averaged over all ranks.
    """
    updates = Updates({})
    train_actor = iteration >= config.critic_warmup_iterations
    for epoch in range(config.ppo_epochs):
        for rows in minibatches(len(experience.batch), config, iteration, epoch):
            mask = experience.batch.response_mask[rows]
            denominator = distributed.sum_over_ranks(mask.sum())
            ptx = next(demonstrations) if demonstrations and train_actor else None
            ptx_count = _response_tokens(ptx) if ptx else None
            statistics = torch.zeros(2, device=mask.device)  # approximate KL, tokens
            rates = learning_rates(models)
            for position, part in enumerate(rows.split(config.micro_batch_size)):
                micro = experience.rows(part)
                if train_actor:
                    ptx_batch = ptx[position].to(mask.device) if ptx else None
                    loss, sums = actor_loss(models, micro, config, denominator, ptx_batch, ptx_count)
                    backward_and_step(models.actor, loss)
                    updates.add(sums)
                    statistics += torch.stack([sums["approx_kl"], sums["count"]])
                if models.critic is not None:
                    loss, sums = critic_loss(models, micro, config, denominator)
                    backward_and_step(models.critic, loss)
                    updates.add(sums if train_actor else sums | {"count": micro.batch.response_mask.sum()})
            updates.steps += 1
            if average is not None and train_actor:
                average.update()
            if train_actor and _moved_too_far(statistics, config.target_kl):
                updates.stopped_early = True
                return updates.metrics() | rates | gradient_norms(models)
    return updates.metrics() | rates | gradient_norms(models)


def minibatches(num_rows: int, config: PpoConfig, iteration: int, epoch: int) -> Iterator[Tensor]:
    """Row indices of each optimizer step of one epoch: every row once, in an order that follows from the counters."""
    size = config.train_batch_size // distributed.world_size()
    seed = (config.run.seed, iteration, epoch, distributed.rank())
    yield from torch.from_numpy(np.random.default_rng(seed).permutation(num_rows)).split(size)


def actor_loss(
    models: Models,
    micro: Experience,
    config: PpoConfig,
    denominator: Tensor,
    ptx_batch: Batch | None,
    ptx_count: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss, minus the entropy bonus, plus the KL and PTX terms where they are on.

    Returns: the scalar loss, divided by `denominator` (response tokens of the whole step), and sums to log.
    """
    mask = micro.batch.response_mask
    logprobs, entropy = response_logprobs(
        models.actor, micro.batch, config.sampling.temperature, with_entropy=config.entropy_coefficient > 0
    )
    loss = clipped_policy_loss(
        logprobs,
        micro.old_logprobs,
        micro.advantages,
        mask,
        denominator,
        config.clip_low,
        config.clip_high,
        config.dual_clip,
    )
    sums = policy_statistics(logprobs, micro.old_logprobs, mask, config.clip_low, config.clip_high)
    sums["policy_loss"] = loss * denominator
    if entropy is not None:
        loss = loss - config.entropy_coefficient * entropy_bonus(entropy, mask, denominator)
        sums["entropy"] = masked_sum(entropy, mask)
    if config.kl.loss_coefficient > 0:
        kl = kl_loss(logprobs, micro.old_logprobs, micro.ref_logprobs, mask, denominator)
        loss = loss + config.kl.loss_coefficient * kl
        sums["kl_loss"] = kl * denominator
    if ptx_batch is not None and ptx_count is not None:
        ptx_logprobs, _ = response_logprobs(models.actor, ptx_batch)
        ptx_loss = sft_loss(ptx_logprobs, ptx_batch.response_mask, ptx_count)
        loss = loss + config.ptx.coefficient * ptx_loss
        sums["ptx_loss"] = ptx_loss * denominator
    return loss, sums


def critic_loss(
    models: Models, micro: Experience, config: PpoConfig, denominator: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value loss divided by `denominator`, and sums to log."""
    assert micro.old_values is not None
    values = critic_values(models.critic, micro.batch)
    mask = micro.batch.response_mask
    loss = clipped_value_loss(values, micro.old_values, micro.returns, mask, denominator, config.value_clip)
    return loss, {"value_loss": loss * denominator}


def _response_tokens(batches: list[Batch]) -> Tensor:
    """Response tokens of the batches of all ranks."""
    return distributed.sum_over_ranks(torch.stack([batch.response_mask.sum() for batch in batches]).sum())


def learning_rates(models: Models) -> dict[str, float]:
    """Those of the step to come."""
    return {f"ppo/{name}_lr": engine.get_lr()[0] for name, engine in trained_engines(models).items()}


def gradient_norms(models: Models) -> dict[str, float]:
    """Those of the last step."""
    return {f"ppo/{name}_grad_norm": gradient_norm(engine) for name, engine in trained_engines(models).items()}


def trained_engines(models: Models) -> dict[str, Any]:
    return {"actor": models.actor} | ({} if models.critic is None else {"critic": models.critic})


def _moved_too_far(statistics: Tensor, target_kl: float | None) -> bool:
    """Whether the last minibatch's approximate KL, over all ranks, exceeds 1.5 times the target."""
    if target_kl is None:
        return False
    approx_kl, count = distributed.sum_over_ranks(statistics).tolist()
    return approx_kl / max(count, 1.0) > 1.5 * target_kl
