from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.masking import (
    check_same_shape,
    last_true,
    masked_mean,
    masked_sum,
    masked_whiten,
)

INF, NAN = float("inf"), float("nan")


def test_unequal_shapes_are_refused_with_names_and_shapes() -> None:
    with pytest.raises(ValueError, match=r"rewards \(2, 3\), mask \(2, 1\)"):
        check_same_shape(rewards=torch.zeros(2, 3), mask=torch.zeros(2, 1))


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_whiten])
def test_shapes_that_would_broadcast_are_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="one shape"):
        function(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))


def test_masked_sum_and_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert masked_sum(values, mask).item() == 21
    assert masked_mean(values, mask).item() == 7
    assert masked_sum(values, mask, dim=1).tolist() == [5, 16]
    assert masked_mean(values, mask, dim=1).tolist() == [2.5, 16]
    assert masked_sum(values, mask, dim=0).tolist() == [1, 16, 4]


def test_padding_with_inf_and_nan_changes_no_value_and_no_gradient() -> None:
    """K3."""
    values = torch.tensor([[1.0, INF, NAN, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, False, False, True]])
    assert masked_sum(values, mask).item() == 4
    (gradient,) = torch.autograd.grad(masked_mean(values, mask), values)
    assert gradient.tolist() == [[0.5, 0.0, 0.0, 0.5]]
    assert masked_whiten(values, mask).tolist() == [[pytest.approx(-1), 0, 0, pytest.approx(1)]]


def test_an_empty_mask_gives_zero() -> None:
    values = torch.tensor([[NAN, 2.0], [3.0, 4.0]])
    mask = torch.tensor([[False, False], [True, True]])
    nothing = torch.zeros_like(mask)
    assert masked_sum(values, nothing).item() == 0
    assert masked_mean(values, nothing).item() == 0
    assert masked_mean(values, mask, dim=1).tolist() == [0, 3.5]
    assert masked_whiten(values, nothing).tolist() == [[0, 0], [0, 0]]


def test_last_true_marks_the_last_true_position_of_each_row() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    expected = [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert last_true(mask).int().tolist() == expected


def test_whitening_uses_population_variance_and_can_keep_the_mean() -> None:
    """A5: the gold numbers."""
    values = torch.tensor([[1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]])
    gold = [0.0508, 0.4381, 0.8254, 1.2127, 1.6000, 1.9873, 2.3746, 2.7619, 3.1492]
    mask = torch.ones_like(values, dtype=torch.bool)
    assert masked_whiten(values, mask, shift_mean=False)[0].tolist() == pytest.approx(gold, abs=5e-5)
    shifted = [number - 1.6 for number in gold]
    assert masked_whiten(values, mask)[0].tolist() == pytest.approx(shifted, abs=5e-5)


def test_whitening_uses_masked_elements_only() -> None:
    """A5: numbers outside the mask change nothing and come out as 0."""
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    garbage = torch.tensor([[1.0, 1e6, 2.0, NAN, 3.0, 4.0]])
    mask = torch.tensor([[True, False, True, False, True, True]])
    whole = masked_whiten(values, torch.ones_like(values, dtype=torch.bool))[0].tolist()
    whitened = masked_whiten(garbage, mask)[0].tolist()
    assert whitened == [whole[0], 0, whole[1], 0, whole[2], whole[3]]


def test_whitening_of_two_clusters_equals_the_formula_in_float64() -> None:
    """A5: some rows are far from the mean of the others."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 5, generator=generator)
    values[4:] += 10
    mask = torch.rand(6, 5, generator=generator) < 0.6
    kept = values[mask].double()
    expected = (kept - kept.mean()) / ((kept - kept.mean()) ** 2).mean().sqrt()
    assert masked_whiten(values, mask)[mask].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_whitening_constant_values_gives_zero_not_nan() -> None:
    values = torch.full((2, 3), 0.25)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert masked_whiten(values, mask).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_variance_survives_a_mean_far_larger_than_it() -> None:
    values = torch.tensor([[10000.0, 10001.0, 10002.0]])
    mask = torch.ones_like(values, dtype=torch.bool)
    assert masked_whiten(values, mask)[0].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5], rel=1e-6)
