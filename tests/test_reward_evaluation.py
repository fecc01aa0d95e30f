"""What step 2 says about a reward model, by hand."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from step2_reward.config import RewardConfig
from step2_reward.evaluate import Comparisons, compare_held_out, normalization
from step2_reward.train import preference_loss, results_of
from training.config import DataConfig, ModelConfig, RunConfig
from training.data import collate_pairs, num_steps
from training.examples import PreferenceDataset, PreferenceRows
from training.export import export
from training.models import load_scalar_model, load_tokenizer
from training.optim import lr_lambda


def log_loss(difference: float) -> float:
    return math.log(1 + math.exp(-difference))


def comparisons(
    *pairs: tuple[float, float], lengths: list[int] | None = None, weights: list[float] | None = None
) -> Comparisons:
    chosen, rejected = ([pair[i] for pair in pairs] for i in (0, 1))
    return Comparisons(chosen, rejected, lengths or [0] * len(pairs), weights or [1.0] * len(pairs))


def test_accuracy_and_loss_by_hand() -> None:
    """R3"""
    held_out = comparisons((2.0, 1.0), (0.0, 3.0), (5.0, 1.0), (-1.0, -2.0))
    assert held_out.accuracy == 3 / 4
    assert held_out.loss == pytest.approx((log_loss(1) + log_loss(-3) + log_loss(4) + log_loss(1)) / 4, abs=1e-6)
    assert held_out.metrics() == {
        "loss": held_out.loss,
        "accuracy": 0.75,
        "score_chosen": 6 / 4,
        "score_rejected": 3 / 4,
    }


def test_a_tie_counts_half() -> None:
    """R3: equal scores have loss log 2."""
    held_out = comparisons((1.0, 1.0), (2.0, 1.0))
    assert held_out.accuracy == 0.75
    assert comparisons((1.0, 1.0)).loss == pytest.approx(math.log(2))
    assert comparisons((1.0, 1.0)).calibration() == [{"predicted": 0.5, "observed": 0.5, "pairs": 1}]


def test_a_ranking_counts_as_much_as_a_pair() -> None:
    """R5: three pairs of a ranking of 3 share a weight of 1."""
    third = 1 / 3
    held_out = comparisons(
        (3.0, 2.0), (3.0, 4.0), (2.0, 4.0), (1.0, 0.0), weights=[third, third, third, 1.0]
    )  # fmt: skip
    assert held_out.accuracy == pytest.approx((third * 1 + 1.0) / 2)
    expected = (third * (log_loss(1) + log_loss(-1) + log_loss(-2)) + log_loss(1)) / 2
    assert held_out.loss == pytest.approx(expected, abs=1e-6)
    assert held_out.metrics()["score_chosen"] == pytest.approx((third * (3 + 3 + 2) + 1) / 2)


def test_a_constant_on_all_scores_changes_neither_accuracy_nor_loss() -> None:
    """R4"""
    pairs = [(2.0, 1.0), (0.0, 3.0), (5.0, 1.0)]
    moved = comparisons(*[(chosen + 8, rejected + 8) for chosen, rejected in pairs])
    assert moved.accuracy == comparisons(*pairs).accuracy
    assert moved.loss == pytest.approx(comparisons(*pairs).loss)


def test_quarters_of_the_length_difference_by_hand() -> None:
    # Sorted by length difference: -4 wrong, -3 right | -1 wrong, 0 tie | 1 right, 2 right | 5 right, 9 wrong
    lengths = [9, -4, 2, -1, 0, 5, -3, 1]
    pairs = [(0.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)]
    assert comparisons(*pairs, lengths=lengths).accuracy_by_length_difference() == [
        {"low": -4, "high": -3, "pairs": 2, "accuracy": 0.5},
        {"low": -1, "high": 0, "pairs": 2, "accuracy": 0.25},
        {"low": 1, "high": 2, "pairs": 2, "accuracy": 1.0},
        {"low": 5, "high": 9, "pairs": 2, "accuracy": 0.5},
    ]


def test_quarters_of_fewer_than_four_pairs_leave_none_empty() -> None:
    quarters = comparisons((1.0, 0.0), (0.0, 1.0), lengths=[3, -3]).accuracy_by_length_difference()
    assert [(q["low"], q["pairs"], q["accuracy"]) for q in quarters] == [(-3, 1, 0.0), (3, 1, 1.0)]


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_calibration_by_hand() -> None:
    # Confidence in the winner, and whether the winner was the chosen one.
    confident = [(0.52, True), (0.58, False), (0.65, True), (0.95, True), (0.97, True), (0.99, False)]
    pairs = [(logit(p), 0.0) if right else (0.0, logit(p)) for p, right in confident]
    bins = comparisons(*pairs).calibration()
    assert [b["pairs"] for b in bins] == [2, 1, 3]  # [0.5, 0.6), [0.6, 0.7), [0.9, 1]
    assert [b["predicted"] for b in bins] == pytest.approx([0.55, 0.65, 0.97], abs=1e-6)
    assert [b["observed"] for b in bins] == pytest.approx([0.5, 1.0, 2 / 3])


def test_certainty_falls_into_the_last_bin() -> None:
    assert comparisons((100.0, 0.0)).calibration() == [{"predicted": 1.0, "observed": 1.0, "pairs": 1}]


@pytest.mark.parametrize(("gain", "bias"), [(1.0, 0.0), (0.5, -3.0)])
def test_normalised_scores_have_mean_0_and_deviation_1(gain: float, bias: float) -> None:
    """R6: also when the scores were normalised before."""
    raw = torch.randn(40, generator=torch.Generator().manual_seed(0)).mul(3).add(7).tolist()
    seen = [gain * score + bias for score in raw]
    held_out = comparisons(*zip(seen[:20], seen[20:], strict=True))
    new_gain, new_bias = normalization(held_out, gain, bias)
    normalised = [new_gain * score + new_bias for score in raw]
    assert statistics.fmean(normalised) == pytest.approx(0, abs=1e-9)
    assert statistics.pstdev(normalised) == pytest.approx(1, abs=1e-9)


def test_a_saved_reward_model_gives_the_held_out_responses_mean_0_and_deviation_1(
    tmp_path: Path, tiny_reward_model: Callable[[str], str]
) -> None:
    """R6, R8"""
    generator = torch.Generator().manual_seed(0)
    lengths = [2 + n % 9 for n in range(40)]
    rows = [(torch.randint(5, 261, (n,), generator=generator).tolist(), [True] * n) for n in lengths]
    data = PreferenceDataset([PreferenceRows(rows[n : n + 2], 0.0) for n in range(0, 40, 2)])  # type: ignore[arg-type]
    source = ModelConfig(path=tiny_reward_model("llama"))
    model = load_scalar_model(source, torch.float32)
    raw = compare_held_out(model, data, COLLATE, micro_batch_size=4)
    assert abs(statistics.fmean(raw.chosen + raw.rejected)) > 0.01
    model.gain, model.bias = normalization(raw, model.gain, model.bias)
    export(SimpleNamespace(module=model), tmp_path / "final", load_tokenizer(source), source)
    again = load_scalar_model(ModelConfig(path=str(tmp_path / "final")), torch.float32)
    found = compare_held_out(again, data, COLLATE, micro_batch_size=3)
    assert statistics.fmean(found.chosen + found.rejected) == pytest.approx(0, abs=1e-5)
    assert statistics.pstdev(found.chosen + found.rejected) == pytest.approx(1, abs=1e-5)


def test_by_default_there_is_one_epoch_and_the_learning_rate_ends_at_0() -> None:
    """R7"""
    config = RewardConfig(
        model=ModelConfig(path="model"),
        data=DataConfig(paths=("pairs.jsonl",), format="chosen_rejected"),
        run=RunConfig(output_dir="run"),
    )
    steps = num_steps(1000, train_batch_size=64, epochs=config.epochs)
    assert steps == 16  # 15 whole batches and one that is filled up
    factor = lr_lambda(config.optim, steps)
    assert factor(steps - 1) > factor(steps) == pytest.approx(0, abs=1e-15)


def test_a_model_that_scores_everything_alike_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match="the same score"):
        normalization(comparisons((2.0, 2.0), (2.0, 2.0)), 1.0, 0.0)


class ScoresLastId(nn.Module):
    """Gives every position the id that stands there, in hundredths."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids.float() / 100


PAIR = PreferenceRows([([1, 2, 50], [False, True, True]), ([1, 20], [False, True])], 0.0)
RANKING = PreferenceRows(
    [([5, 30], [False, True]), ([5, 9, 9, 70], [False, True, True, True]), ([5, 9, 10], [False, True, True])], 0.0
)
COLLATE = partial(collate_pairs, pad_id=99)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_every_held_out_pair_is_scored_once(micro_batch_size: int) -> None:
    """R5"""
    data = PreferenceDataset([PAIR, RANKING])
    found = compare_held_out(ScoresLastId(), data, COLLATE, micro_batch_size=micro_batch_size)
    assert found.chosen == pytest.approx([0.5, 0.3, 0.3, 0.7])
    assert found.rejected == pytest.approx([0.2, 0.7, 0.1, 0.1])
    assert found.length_differences == [1, -2, -1, 1]
    assert found.weights == pytest.approx([1.0, 1 / 3, 1 / 3, 1 / 3])


def test_training_loss_and_accuracy_count_prompts_not_pairs() -> None:
    """R3, R5"""
    pairs = COLLATE([PAIR, RANKING])
    loss, sums = preference_loss(ScoresLastId(), pairs, torch.tensor(2.0), centring=0.0, use_margins=False)
    expected = log_loss(0.3) + (log_loss(-0.4) + log_loss(0.2) + log_loss(0.6)) / 3
    assert float(loss) == pytest.approx(expected / 2, abs=1e-6)
    assert float(sums["accuracy"]) == pytest.approx(1 + 2 / 3)


def test_margins_count_only_when_asked_for() -> None:
    """R3"""
    pairs = COLLATE([PreferenceRows(PAIR.rows, margin=0.5)])
    for use_margins, difference in ((False, 0.3), (True, -0.2)):
        loss, _ = preference_loss(ScoresLastId(), pairs, torch.tensor(1.0), centring=0.0, use_margins=use_margins)
        assert float(loss) == pytest.approx(log_loss(difference), abs=1e-6)


def test_centring_adds_the_squared_sum() -> None:
    """R4"""
    loss, _ = preference_loss(ScoresLastId(), COLLATE([PAIR]), torch.tensor(1.0), centring=0.1, use_margins=False)
    assert float(loss) == pytest.approx(log_loss(0.3) + 0.1 * 0.7**2, abs=1e-6)


def test_results_hold_before_and_after() -> None:
    before, after = comparisons((0.0, 1.0), (1.0, 0.0)), comparisons((1.0, 0.0), (2.0, 0.0))
    results = results_of(before, after)
    assert (results["accuracy_before"], results["accuracy_after"]) == (0.5, 1.0)
    assert results["loss_before"] > results["loss_after"]
    assert results["scores_chosen"] == [1.0, 2.0]
    assert results["scores_rejected"] == [0.0, 0.0]
