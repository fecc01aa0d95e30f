"""From prompts to experience: sample, score, and estimate advantages."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from step3_ppo.config import PpoConfig
from step3_ppo.models import Models
from step3_ppo.score_function import EarlyScores, scores_of_all_ranks
from step3_ppo.scoring import OwnRows
from training import distributed
from training.accounting import Accounting, phase_of
from training.advantages import ADVANTAGE_ESTIMATORS
from training.data import Batch, collate
from training.examples import PromptExample
from training.forward import critic_values, response_logprobs
from training.generation.interface import Completion
from training.losses import truncated_importance_weights
from training.masking import masked_whiten
from training.rewards import clip_scores, token_rewards


@dataclass(frozen=True)
class Rollout:
    """Sampled responses of all ranks and what the models say of them, before any reward is computed."""

    prompts: list[PromptExample]
    """One per row; the samples of one prompt are consecutive rows."""
    completions: list[Completion]
    batch: Batch
    sampler_logprobs: Tensor
    """[batch, time] as the generator reported them."""
    logprobs: Tensor
    """[batch, time] under the actor, computed as in training; or the sampler's, where `old_logprobs` is rollout."""
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
        """Nats: what 99 of 100 log-probabilities of the sampler differ from the actor's by at most."""
        gap = (self.sampler_logprobs - self.logprobs)[self.mask].abs()
        return float(torch.quantile(gap, 0.99)) if len(gap) else 0.0

    @property
    def finished(self) -> Tensor:
        """[batch] bool: the response ended with EOS."""
        return torch.tensor([c.finished for c in self.completions], device=self.scores.device)


@dataclass(frozen=True)
class Experience:
    """What the updates learn from, whole on every rank; every tensor is [batch, time]."""

    batch: Batch
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None
    returns: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        parts = vars(self.batch) | vars(self)
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}

    def as_filler(self) -> "Experience":
        """The same rows, none of whose tokens count."""
        return replace(self, batch=self.batch.as_filler())

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


def row_seeds(run_seed: int, stream: str, positions: Sequence[int], samples_per_prompt: int) -> list[int]:
    """A seed for each row, from what the row is and not from what was drawn before it: a resumed run draws the same."""
    keys = [f"{run_seed}/{stream}/{p}/{sample}" for p in positions for sample in range(samples_per_prompt)]
    return [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") for key in keys]


def sample_responses(
    models: Models,
    prompts: Sequence[PromptExample],
    config: PpoConfig,
    seeds: list[int],
    samples_per_prompt: int,
    accounting: Accounting | None = None,
) -> Rollout:
    """Sample responses and run the frozen and the trained models over them. Every rank must call this.

    Each rank samples for its share of the prompts. The responses are then shared out anew, by length, for the models to
    read, and every rank gets all that they say: what is learnt from them does not depend on the number of ranks.

    Args:
        prompts: those of all ranks.
        seeds: one per response.
        accounting: is told of what is computed.
    """
    rows = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    share = distributed.own_share(len(prompts))
    own = slice(share.start * samples_per_prompt, share.stop * samples_per_prompt)
    early = None
    if config.reward.function_early and models.score_function is not None:
        early = EarlyScores(models.score_function, rows[own])
    with phase_of(accounting, "generate"):
        own_prompts = [row.prompt_ids for row in rows[own]]
        on_finish = None if early is None else early.add
        sampled = models.generator.generate(own_prompts, config.sampling, seeds[own], on_finish=on_finish)
        completions = [completion for shares in distributed.gather_objects(sampled) for completion in shares]
    with phase_of(accounting, "score"):
        batch = _as_batch(rows, completions, models.tokenizer.pad_token_id)
        own_rows = OwnRows(batch, config)
        own_logprobs = partial(_logprobs, temperature=config.sampling.temperature)
        logprobs = sampler_logprobs = _sampler_logprobs(batch, completions)
        if config.old_logprobs == "recompute":
            logprobs = own_rows.run(partial(own_logprobs, models.actor))
        with models.reference() as reference:
            ref = own_rows.run(partial(own_logprobs, reference))
        values = own_rows.run(partial(critic_values, models.critic)) if models.critic else None
        if early is None:
            scores = models.scorer(own_rows, rows, completions)
        else:
            scores = scores_of_all_ranks(early.result(), own, batch)
    if accounting is not None:
        lengths = [len(completion.response_ids) for completion in sampled]
        accounting.add_rollout(models.actor, own_prompts, lengths)
        if config.old_logprobs == "recompute":
            own_rows.count_passes(accounting, "score", models.actor)
        own_rows.count_passes(accounting, "score", reference, adapters=reference is not models.actor)
        for scalar_model in (models.critic, models.reward_model):
            if scalar_model is not None:
                own_rows.count_passes(accounting, "score", scalar_model)
    return Rollout(rows, completions, batch, sampler_logprobs, logprobs, ref, values, scores)


def _logprobs(model: Any, batch: Batch, temperature: float) -> Tensor:
    return response_logprobs(model, batch, temperature)[0]


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
        rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
    advantages, returns = ADVANTAGE_ESTIMATORS[config.estimator](
        rewards,
        rollout.values,
        rollout.mask,
        gamma=config.gamma,
        lam=config.lam,
        group_size=config.samples_per_prompt,
    )
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, rollout.mask)
    if config.max_importance_weight is not None:
        advantages = advantages * truncated_importance_weights(
            rollout.logprobs, rollout.sampler_logprobs, rollout.mask, config.max_importance_weight
        )
    experience = Experience(
        batch=rollout.batch,
        old_logprobs=rollout.logprobs,
        ref_logprobs=rollout.ref_logprobs,
        advantages=advantages,
        old_values=rollout.values,
        returns=returns,
    )
    return experience, kl


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
