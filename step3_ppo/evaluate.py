"""Held-out prompts before and after: did the score rise, and did the text stay natural?"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from step3_ppo.config import PpoConfig
from step3_ppo.models import Models
from step3_ppo.rollout import row_seeds, sample_responses
from step3_ppo.scoring import texts
from training.examples import PromptExample


@dataclass(frozen=True)
class Sample:
    """One response to a held-out prompt."""

    prompt: str
    response: str
    score: float
    kl: float
    """Nats: log p_actor(response) - log p_reference(response)."""
    tokens: int
    finished: bool


def sample_held_out(models: Models, prompts: Sequence[PromptExample], config: PpoConfig) -> list[Sample]:
    """One sampled response to each held-out prompt, with the same seeds at every call. Every rank must call this.

    Returns: on every rank, the samples of all ranks in the order of the prompts.
    """
    seeds = row_seeds(config.run.seed, "held-out", range(len(prompts)), 1)
    rollout = sample_responses(models, prompts, config, seeds, 1)
    columns = zip(
        [prompt.text for prompt in rollout.prompts],
        texts(models.tokenizer, rollout.completions),
        rollout.scores.tolist(),
        rollout.sequence_kl.tolist(),
        [len(c.response_ids) for c in rollout.completions],
        [c.finished for c in rollout.completions],
        strict=True,
    )
    return [Sample(*row) for row in columns]


def held_out_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """The numbers that go to the log."""
    return {
        "eval/score_mean": statistics.fmean(s.score for s in samples),
        "eval/kl": statistics.fmean(s.kl for s in samples),
        "eval/response_tokens": statistics.fmean(s.tokens for s in samples),
        "eval/eos_share": statistics.fmean(s.finished for s in samples),
    }


def compare(before: Sequence[Sample], after: Sequence[Sample], score_scale: tuple[float, float]) -> dict:
    """What `results.json` says about the held-out prompts: rows of `before` and `after` answer the same prompts."""
    gain, bias = score_scale
    # The same text twice is a tie, also where it was scored in batches of other widths and the last bit differs.
    after_scores = [b.score if b.response == a.response else a.score for b, a in zip(before, after, strict=True)]
    distinct = distinct_2([s.response for s in before]), distinct_2([s.response for s in after])
    return {
        "score_before": _summary([s.score for s in before]),
        "score_after": _summary([s.score for s in after]),
        "logit_before": _summary([(s.score - bias) / gain for s in before], with_values=False),
        "logit_after": _summary([(s.score - bias) / gain for s in after], with_values=False),
        "win_rate": win_rate([s.score for s in before], after_scores),
        "kl": statistics.fmean(s.kl for s in after),
        "distinct_2_before": distinct[0],
        "distinct_2_after": distinct[1],
        "distinct_2_ratio": distinct[1] / max(distinct[0], 1e-9),
        "response_tokens_before": statistics.fmean(s.tokens for s in before),
        "response_tokens_after": statistics.fmean(s.tokens for s in after),
        "eos_share_before": statistics.fmean(s.finished for s in before),
        "eos_share_after": statistics.fmean(s.finished for s in after),
    }


def win_rate(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Share of prompts that score higher after; a tie counts half. With the 95% interval of Wilson (1927, eq. 1)."""
    n, z = len(before), 1.959964
    share = statistics.fmean((b < a) + 0.5 * (b == a) for b, a in zip(before, after, strict=True))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {"value": share, "low": centre - half, "high": centre + half, "pairs": n}


def distinct_2(responses: Sequence[str]) -> float:
    """Different word pairs as a share of all (Li et al. 2016, section 5.3): falls when text repeats itself."""
    pairs: Counter[tuple[str, str]] = Counter()
    for response in responses:
        words = response.lower().split()
        pairs.update(itertools.pairwise(words))
    return len(pairs) / max(pairs.total(), 1)


def _summary(values: Sequence[float], *, with_values: bool = True) -> dict:
    summary = {"mean": statistics.fmean(values), "median": statistics.median(values)}
    return summary | ({"values": list(values)} if with_values else {})
