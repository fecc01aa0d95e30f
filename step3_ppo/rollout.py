"""From prompts to experience: sample, score, and estimate advantages."""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step3_ppo.config import PpoConfig
from step3_ppo.models import Models
from training import distributed
from training.advantages import ADVANTAGE_ESTIMATORS
from training.data import Batch, collate, micro_batches
from training.examples import PromptExample
from training.forward import critic_values, response_logprobs
from training.generation.interface import Completion, SamplingConfig
from training.masking import masked_power_sums, masked_whiten, moments_from_power_sums
from training.rewards import clip_scores, token_rewards


@dataclass(frozen=True)
class Rollout:
    """Sampled responses and what the models say of them, before any reward is computed."""

    prompts: list[PromptExample]
    """One per row; the samples of one prompt are consecutive rows."""
    completions: list[Completion]
    batch: Batch
    sampler_logprobs: Tensor
    """[batch, time] as the generator reported them."""
    logprobs: Tensor
    """[batch, time] under the actor, computed as in training."""
    ref_logprobs: Tensor
    """[batch, time] under the reference."""
    values: Tensor | None
    """[batch, time] from the critic; None without one."""
    scores: Tensor
    """[batch]"""

    @property
    def mask(self) -> Tensor:
        return self.batch.response_mask

    @property
    def sequence_kl(self) -> Tensor:
        """[batch] nats: log p_actor(response) - log p_reference(response), whose mean estimates the KL."""
        return torch.where(self.mask, self.logprobs - self.ref_logprobs, 0.0).sum(1)

    @property
    def worst_gap(self) -> float:
        """Nats: what 99 of 100 log-probabilities of this rank's sampler differ from the actor's by at most."""
        gap = (self.sampler_logprobs - self.logprobs)[self.mask].abs()
        return float(torch.quantile(gap, 0.99)) if len(gap) else 0.0

    @property
    def finished(self) -> Tensor:
        """[batch] bool: the response ended with EOS."""
        return torch.tensor([c.finished for c in self.completions], device=self.scores.device)


@dataclass(frozen=True)
class Experience:
    """What the updates learn from; every tensor is [batch, time]."""

    batch: Batch
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None
    returns: Tensor

    def rows(self, index: Tensor) -> "Experience":
        """The given rows, without the columns that are padding in all of them."""
        time = int(self.batch.attention_mask[index].sum(1).max())
        return Experience(
            batch=self.batch.rows(index),
            old_logprobs=self.old_logprobs[index, :time],
            ref_logprobs=self.ref_logprobs[index, :time],
            advantages=self.advantages[index, :time],
            old_values=None if self.old_values is None else self.old_values[index, :time],
            returns=self.returns[index, :time],
        )


class PhaseTimer:
    """Seconds spent in each phase since the last reset."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.monotonic()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


def row_seeds(run_seed: int, stream: str, positions: Sequence[int], samples_per_prompt: int) -> list[int]:
    """A seed for each row, from what the row is and not from what was drawn before it: a resumed run draws the same."""
    keys = [f"{run_seed}/{stream}/{p}/{sample}" for p in positions for sample in range(samples_per_prompt)]
    return [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") for key in keys]


def sample_responses(
    models: Models,
    prompts: Sequence[PromptExample],
    sampling: SamplingConfig,
    seeds: list[int],
    samples_per_prompt: int,
    micro_batch_size: int,
    timer: PhaseTimer,
) -> Rollout:
    """Sample responses and run the frozen and the trained models over them.

    Args:
        prompts: this rank's prompts.
        seeds: one per response.
    """
    rows = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    with timer.phase("generate"):
        completions = models.generator.generate([row.prompt_ids for row in rows], sampling, seeds)
    with timer.phase("score"):
        batch = _as_batch(rows, completions, models.tokenizer.pad_token_id)
        parts = micro_batches(batch, micro_batch_size)
        with torch.no_grad():
            logprobs = _rejoin([response_logprobs(models.actor, p, sampling.temperature)[0] for p in parts], batch)
            with models.reference() as reference:
                ref = _rejoin([response_logprobs(reference, p, sampling.temperature)[0] for p in parts], batch)
            values = _rejoin([critic_values(models.critic, p) for p in parts], batch) if models.critic else None
        scores = models.scorer(batch, rows, completions)
    return Rollout(rows, completions, batch, _sampler_logprobs(batch, completions), logprobs, ref, values, scores)


def make_experience(rollout: Rollout, config: PpoConfig, kl_coefficient: float) -> tuple[Experience, Tensor]:
    """Rewards, advantages and returns of a rollout.

    Returns: the experience, and the per-token KL estimates [batch, time] that the rewards were lowered by.
    """
    scores = clip_scores(rollout.scores, config.score_clip)
    if config.missing_eos_score is not None:
        scores = torch.where(rollout.finished, scores, config.missing_eos_score)
    rewards, kl = token_rewards(
        scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coefficient, config.kl.estimator
    )
    if config.whiten_rewards:
        rewards = whiten_over_ranks(rewards, rollout.mask, shift_mean=False)
    advantages, returns = ADVANTAGE_ESTIMATORS[config.estimator](
        rewards,
        rollout.values,
        rollout.mask,
        gamma=config.gamma,
        lam=config.lam,
        group_size=config.samples_per_prompt,
    )
    if config.whiten_advantages:
        advantages = whiten_over_ranks(advantages, rollout.mask)
    experience = Experience(
        batch=rollout.batch,
        old_logprobs=rollout.logprobs,
        ref_logprobs=rollout.ref_logprobs,
        advantages=advantages,
        old_values=rollout.values,
        returns=returns,
    )
    return experience, kl


def whiten_over_ranks(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """`masked_whiten` with the mean and variance of the tokens of all ranks."""
    sums = distributed.sum_over_ranks(masked_power_sums(values, mask))
    mean, variance = moments_from_power_sums(sums)
    return masked_whiten(values, mask, mean, variance, shift_mean=shift_mean)


def _as_batch(rows: Sequence[PromptExample], completions: Sequence[Completion], pad_id: int) -> Batch:
    sequences = []
    for row, completion in zip(rows, completions, strict=True):
        ids = row.prompt_ids + completion.response_ids
        sequences.append((ids, [False] * len(row.prompt_ids) + [True] * len(completion.response_ids)))
    return collate(sequences, pad_id=pad_id).to(distributed.device())


def _sampler_logprobs(batch: Batch, completions: Sequence[Completion]) -> Tensor:
    flat = [logprob for completion in completions for logprob in completion.logprobs]
    result = torch.zeros(batch.input_ids.shape, device=batch.input_ids.device)
    result[batch.response_mask] = torch.tensor(flat, device=result.device)
    return result


def _rejoin(parts: list[Any], batch: Batch) -> Tensor:
    """Micro-batches [rows, own time] -> [batch, time], 0 in padding."""
    time = batch.input_ids.shape[1]
    return torch.cat([torch.nn.functional.pad(part, (0, time - part.shape[1])) for part in parts])
