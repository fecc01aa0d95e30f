"""How well a reward model orders held-out preferences, and where it goes wrong."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from training import distributed
from training.data import PairBatch
from training.engine import evaluation_mode
from training.examples import PreferenceDataset
from training.forward import reward_scores
from training.loop import own_held_out


@dataclass(frozen=True)
class Comparisons:
    """Scores of every held-out pair; the lists run in parallel."""

    chosen: list[float]
    rejected: list[float]
    length_differences: list[int]
    """Response tokens of chosen minus those of rejected."""
    weights: list[float]
    """1 for a pair; 1/C(k,2) for each pair of a ranking of k, so that every prompt counts once."""

    @property
    def differences(self) -> list[float]:
        return [chosen - rejected for chosen, rejected in zip(self.chosen, self.rejected, strict=True)]

    @property
    def accuracy(self) -> float:
        """Share of pairs in which chosen scores higher; a tie counts half."""
        return self._mean([(d > 0) + 0.5 * (d == 0) for d in self.differences])

    @property
    def loss(self) -> float:
        """Mean Bradley-Terry loss, -log sigmoid(chosen - rejected)."""
        return self._mean((-logsigmoid(torch.tensor(self.differences))).tolist())

    def metrics(self) -> dict[str, float]:
        """The numbers that go to the log."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "score_chosen": self._mean(self.chosen),
            "score_rejected": self._mean(self.rejected),
        }

    def accuracy_by_length_difference(self) -> list[dict[str, float]]:
        """Accuracy in quarters of the length difference: a model that likes length is right where chosen is longer."""
        rows = sorted(zip(self.length_differences, self.differences, strict=True))
        quarters = [rows[len(rows) * i // 4 : len(rows) * (i + 1) // 4] for i in range(4)]
        return [
            {
                "low": quarter[0][0],
                "high": quarter[-1][0],
                "pairs": len(quarter),
                "accuracy": statistics.fmean((d > 0) + 0.5 * (d == 0) for _, d in quarter),
            }
            for quarter in quarters
            if quarter
        ]

    def calibration(self) -> list[dict[str, float]]:
        """Predicted probability of the winner against how often it was the chosen one, in five bins from 0.5 to 1."""
        confidences = torch.tensor(self.differences).abs().sigmoid().tolist()
        bins: list[list[tuple[float, float]]] = [[] for _ in range(5)]
        for confidence, difference in zip(confidences, self.differences, strict=True):
            right = (difference > 0) + 0.5 * (difference == 0)
            bins[min(int((confidence - 0.5) * 10), 4)].append((confidence, right))
        return [
            {
                "predicted": statistics.fmean(confidence for confidence, _ in rows),
                "observed": statistics.fmean(right for _, right in rows),
                "pairs": len(rows),
            }
            for rows in bins
            if rows
        ]

    def _mean(self, values: list[float]) -> float:
        return sum(w * v for w, v in zip(self.weights, values, strict=True)) / max(sum(self.weights), 1e-8)


def compare_held_out(
    engine: torch.nn.Module,
    dataset: PreferenceDataset,
    collate_fn: Callable[..., PairBatch],
    **sizes: int | None,
) -> Comparisons:
    """Score every held-out preference once, over all ranks. Every rank must call this; every rank gets the result."""
    rows: list[tuple[float, float, int, float]] = []
    with evaluation_mode(engine):
        for pairs in own_held_out(dataset, collate_fn, **sizes):
            scores = reward_scores(engine, pairs.batch)
            lengths = pairs.batch.response_mask.sum(1)
            columns = (
                scores[pairs.better],
                scores[pairs.worse],
                lengths[pairs.better] - lengths[pairs.worse],
                pairs.weights,
            )
            rows += [row for row in zip(*(column.tolist() for column in columns), strict=True) if row[3] > 0]
    rows = [row for rank_rows in distributed.gather_objects(rows) for row in rank_rows]
    chosen, rejected, length_differences, weights = (list(column) for column in zip(*rows, strict=True))
    return Comparisons(chosen, rejected, length_differences, weights)


def normalization(comparisons: Comparisons, gain: float, bias: float) -> tuple[float, float]:
    """Gain and bias that give all held-out scores mean 0 and deviation 1 (Ziegler et al. 2019, section 2.1).

    Args:
        comparisons: scores under the present `gain` and `bias`.

    Returns: the new gain and bias of the head's output.
    """
    scores = comparisons.chosen + comparisons.rejected
    mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    if deviation == 0:
        raise ValueError("the reward model gives every held-out response the same score: it has learnt nothing")
    return gain / deviation, (bias - mean) / deviation
