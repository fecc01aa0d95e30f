"""The updates of one iteration: several passes over the experience in minibatches."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from step3_ppo.config import PpoConfig
from step3_ppo.ema import MovingAverage
from step3_ppo.models import Models
from step3_ppo.rollout import Experience
from step3_ppo.scoring import OwnRows
from training import distributed
from training.accounting import Accounting, phase_of
from training.data import Batch
from training.engine import backward_and_step, gradient_norm
from training.forward import critic_values, response_logprobs
from training.loop import SkippedSteps
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
    """What an iteration's updates add up to so far, over all ranks."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    actor_steps: int = 0
    """Of `steps`, those that the actor took part in."""
    skipped: int = 0
    """Of `steps`, those whose gradient was not finite and changed nothing."""
    stopped_early: bool = False
    last: dict[str, float] = field(default_factory=dict)
    """Learning rates and gradient norms of the last step."""

    def add(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Add this rank's sums of an optimizer step. Every rank must call this. Returns: the sums over all ranks."""
        names = sorted(sums)
        totals = distributed.sum_over_ranks(torch.stack([sums[name].double() for name in names])).tolist()
        step = dict(zip(names, totals, strict=True))
        for name, total in step.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.steps += 1
        return step

    def metrics(self) -> dict[str, float]:
        """Means per response token, and what the last step was like."""
        values = dict(self.sums)
        count = max(values.pop("count"), 1.0)
        means = {f"ppo/{name}": value / count for name, value in values.items()}
        if "ppo/clipped" in means:
            means["ppo/clip_fraction"] = means.pop("ppo/clipped")
        counts = {"ppo/steps": self.steps, "ppo/skipped": self.skipped, "ppo/stopped_early": float(self.stopped_early)}
        return means | counts | self.last


def update(
    models: Models,
    experience: Experience,
    config: PpoConfig,
    iteration: int,
    demonstrations: Iterator[list[Batch]] | None,
    average: MovingAverage | None,
    updates: Updates | None = None,
    accounting: Accounting | None = None,
    skipped: SkippedSteps | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`ppo_epochs` passes of clipped updates of actor and critic. Every rank must call this.

    Args:
        experience: the rows of all ranks.
        iteration: counted from 0; seeds the order of rows and decides on the critic's warm-up.
        demonstrations: for each optimizer step, this rank's micro-batches for the PTX loss; None without it.
        average: moving average of the actor, updated after each of its steps.
        updates: those of this iteration that were done before; it is carried on.
        accounting: is told of what is computed.
        skipped: is told of every step.
        after_step: called when a step is over.

    Returns: metrics, averaged over all ranks.
    """
    updates = updates or Updates()
    train_actor = iteration >= config.critic_warmup_iterations
    while updates.steps < config.steps_per_iteration and not updates.stopped_early:
        rates = learning_rates(models)
        minibatch = experience.rows(minibatch_rows(len(experience.batch), config, iteration, updates.steps))
        own = OwnRows(minibatch.batch, config)
        micros = [minibatch.rows(rows) for rows in own.rows]
        micros = [micro if counts else micro.as_filler() for micro, counts in zip(micros, own.counts, strict=True)]
        count = minibatch.batch.response_mask.sum()
        sums: dict[str, Tensor] = {}
        applied = True
        stepping = partial(phase_of, accounting, "optimizer")
        if train_actor:
            ptx = next(demonstrations) if demonstrations else None
            applied = actor_step(models, micros, config, count, sums, ptx, stepping)
            updates.actor_steps += 1
            if average is not None and applied:
                average.update()
        if models.critic is not None:
            applied &= critic_step(models, micros, config, count, sums, stepping)
        sums["count"] = torch.stack([micro.batch.response_mask.sum() for micro in micros]).sum()
        if accounting is not None:
            for engine in ([models.actor] if train_actor else []) + ([models.critic] if models.critic else []):
                own.count_passes(accounting, "train", engine, training=True)
        step = updates.add(sums)
        updates.skipped += not applied
        updates.stopped_early = train_actor and _moved_too_far(step, config.target_kl)
        updates.last = rates | gradient_norms(models)
        if skipped is not None:
            skipped.count(applied, models.actor.global_steps, minibatch.tensors)
        after_step()
    return updates.metrics()


def minibatch_rows(num_rows: int, config: PpoConfig, iteration: int, step: int) -> Tensor:
    """Rows of an iteration's optimizer step: every epoch takes each once, in an order that follows from counters.

    Within a step they stand as in the rollout, where samples of one prompt are neighbours: packed rows then share it.
    """
    epoch, part = divmod(step, num_rows // config.train_batch_size)
    order = np.random.default_rng((config.run.seed, iteration, epoch)).permutation(num_rows)
    return torch.from_numpy(np.sort(order[part * config.train_batch_size :][: config.train_batch_size]))


def actor_step(
    models: Models,
    micros: list[Experience],
    config: PpoConfig,
    count: Tensor,
    sums: dict[str, Tensor],
    demonstrations: list[Batch] | None,
    stepping: Callable[[], AbstractContextManager],
) -> bool:
    """One optimizer step of the actor over this rank's micro-batches.

    Args:
        count: response tokens of all of them, over all ranks.
        sums: gets what is to be logged.
        stepping: makes a context in which the weights are updated.

    Returns: whether the gradient was finite.
    """
    applied = True
    for number, micro in enumerate(micros, start=1):
        loss, values = actor_loss(models, micro, config, count)
        last = number == len(micros) and not demonstrations
        applied = backward_and_step(models.actor, loss, last=last, stepping=stepping())
        _add(sums, values)
    if demonstrations:
        ptx_count = distributed.sum_over_ranks(torch.stack([b.response_mask.sum() for b in demonstrations]).sum())
        for number, batch in enumerate(demonstrations, start=1):
            loss = ptx_loss(models, batch.to(count.device), ptx_count)
            last = number == len(demonstrations)
            loss_share = config.ptx.coefficient * loss
            applied = backward_and_step(models.actor, loss_share, last=last, stepping=stepping())
            _add(sums, {"ptx_loss": loss * count})
    return applied


def critic_step(
    models: Models,
    micros: list[Experience],
    config: PpoConfig,
    count: Tensor,
    sums: dict[str, Tensor],
    stepping: Callable[[], AbstractContextManager],
) -> bool:
    """One optimizer step of the critic, as `actor_step`."""
    applied = True
    for number, micro in enumerate(micros, start=1):
        loss, values = critic_loss(models, micro, config, count)
        applied = backward_and_step(models.critic, loss, last=number == len(micros), stepping=stepping())
        _add(sums, values)
    return applied


def actor_loss(
    models: Models, micro: Experience, config: PpoConfig, denominator: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss, minus the entropy bonus, plus the KL term where they are on.

    Returns: the scalar loss, divided by `denominator` (response tokens of the whole step), and sums to log.
    """
    mask = micro.batch.response_mask
    logprobs, entropy = response_logprobs(
        models.actor, micro.batch, config.sampling.temperature, with_entropy=config.entropy_coefficient > 0
    )
    old_logprobs = micro.old_logprobs
    if config.old_logprobs == "rollout" and config.steps_per_iteration == 1:
        old_logprobs = logprobs.detach()
    loss = clipped_policy_loss(
        logprobs,
        old_logprobs,
        micro.advantages,
        mask,
        denominator,
        config.clip_low,
        config.clip_high,
        config.dual_clip,
    )
    sums = policy_statistics(logprobs, old_logprobs, mask, config.clip_low, config.clip_high)
    sums["policy_loss"] = loss * denominator
    if entropy is not None:
        loss = loss - config.entropy_coefficient * entropy_bonus(entropy, mask, denominator)
        sums["entropy"] = masked_sum(entropy, mask)
    if config.kl.loss_coefficient > 0:
        kl = kl_loss(logprobs, old_logprobs, micro.ref_logprobs, mask, denominator)
        loss = loss + config.kl.loss_coefficient * kl
        sums["kl_loss"] = kl * denominator
    return loss, sums


def ptx_loss(models: Models, batch: Batch, denominator: Tensor) -> Tensor:
    """Loss of step 1 on demonstrations, divided by `denominator`, their response tokens of the whole step."""
    logprobs, _ = response_logprobs(models.actor, batch)
    return sft_loss(logprobs, batch.response_mask, denominator)


def critic_loss(
    models: Models, micro: Experience, config: PpoConfig, denominator: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value loss divided by `denominator`, and sums to log."""
    assert micro.old_values is not None
    values = critic_values(models.critic, micro.batch)
    mask = micro.batch.response_mask
    loss = clipped_value_loss(values, micro.old_values, micro.returns, mask, denominator, config.value_clip)
    return loss, {"value_loss": loss * denominator}


def learning_rates(models: Models) -> dict[str, float]:
    """Those of the step to come."""
    return {f"ppo/{name}_lr": engine.get_lr()[0] for name, engine in models.trained.items()}


def gradient_norms(models: Models) -> dict[str, float]:
    """Those of the last step."""
    return {f"ppo/{name}_grad_norm": gradient_norm(engine) for name, engine in models.trained.items()}


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach()


def _moved_too_far(sums: dict[str, float], target_kl: float | None) -> bool:
    """Whether the last minibatch's approximate KL exceeds 1.5 times the target."""
    return target_kl is not None and sums["approx_kl"] / max(sums["count"], 1.0) > 1.5 * target_kl
