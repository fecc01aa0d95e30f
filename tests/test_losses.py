import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from training.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy_bonus,
    kl_loss,
    pairwise_reward_loss,
    policy_statistics,
    sft_loss,
    truncated_importance_weights,
)

NAN, INF = float("nan"), float("inf")


def one_token_policy_loss(ratio: float, advantage: float, **options: float) -> tuple[float, float]:
    """Loss and its derivative by the log-probability of a single token, in float64."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = clipped_policy_loss(logprobs, torch.zeros_like(logprobs), advantages, mask, 1, **options)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.item()


def pair_loss(better: float, worse: float, margin: float = 0.0, centring: float = 0.0) -> tuple[float, list[float]]:
    """Loss of one pair and its gradient by the two scores, in float64."""
    scores = torch.tensor([better, worse], dtype=torch.float64, requires_grad=True)
    loss = pairwise_reward_loss(
        scores,
        torch.tensor([0]),
        torch.tensor([1]),
        torch.ones(1),
        1,
        margins=torch.tensor([margin]),
        centring=centring,
    )
    (gradient,) = torch.autograd.grad(loss, scores)
    return loss.item(), gradient.tolist()


def test_sft_loss_by_hand() -> None:
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [-4.0, -8.0, NAN]], requires_grad=True)
    mask = torch.tensor([[False, True, True], [False, True, False]])
    loss = sft_loss(logprobs, mask, 4)
    assert loss.item() == 11 / 4
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [[0, -0.25, -0.25], [0, -0.25, 0]]


def test_policy_loss_without_a_step_is_minus_the_mean_advantage() -> None:
    """L3: and the gradient is that of the plain policy gradient."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -2.0, 4.0]])
    loss = clipped_policy_loss(logprobs, logprobs.detach(), advantages, torch.ones(1, 3, dtype=torch.bool), 3)
    assert loss.item() == pytest.approx(-1)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient[0].tolist() == pytest.approx([-1 / 3, 2 / 3, -4 / 3])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the range
        (1.5, 2.0, -2.4, 0.0),  # a good token already likelier: clipped
        (0.5, 2.0, -1.0, -1.0),  # a good token become less likely: not clipped
        (1.5, -2.0, 3.0, 3.0),  # a bad token become likelier: not clipped
        (0.5, -2.0, 1.6, 0.0),  # a bad token already less likely: clipped
        (0.9, -2.0, 1.8, 1.8),  # inside the range
    ],
)
def test_policy_loss_is_the_worse_of_unclipped_and_clipped(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    """L3."""
    assert one_token_policy_loss(ratio, advantage) == pytest.approx((loss, gradient), abs=1e-12)


def test_policy_clip_may_be_asymmetric() -> None:
    """L3: clip_low .1 and clip_high .4."""
    options = {"clip_low": 0.1, "clip_high": 0.4}
    assert one_token_policy_loss(1.3, 1.0, **options) == pytest.approx((-1.3, -1.3))
    assert one_token_policy_loss(1.5, 1.0, **options) == pytest.approx((-1.4, 0.0))
    assert one_token_policy_loss(0.85, -1.0, **options) == pytest.approx((0.9, 0.0))
    assert one_token_policy_loss(0.95, -1.0, **options) == pytest.approx((0.95, 0.95))


def test_dual_clip_bounds_only_bad_tokens_that_became_much_likelier() -> None:
    """L3: c = 3."""
    assert one_token_policy_loss(5.0, -2.0) == pytest.approx((10.0, 10.0))
    assert one_token_policy_loss(5.0, -2.0, dual_clip=3.0) == pytest.approx((6.0, 0.0))
    assert one_token_policy_loss(2.5, -2.0, dual_clip=3.0) == pytest.approx((5.0, 5.0))
    assert one_token_policy_loss(5.0, 2.0, dual_clip=3.0) == pytest.approx((-2.4, 0.0))


def test_importance_weights_by_hand() -> None:
    """Twice as likely in the trainer, half, five times; padding holds garbage."""
    logprobs = torch.tensor([[NAN, 0.0, 0.0, 0.0, INF]])
    sampler = torch.tensor([[0.0, -math.log(2), math.log(2), -math.log(5), NAN]])
    mask = torch.tensor([[False, True, True, True, False]])
    weights = truncated_importance_weights(logprobs, sampler, mask, most=3.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.5, 3.0, 1.0]]))


def test_weighed_tokens_of_the_sampler_teach_what_the_trainers_own_would() -> None:
    """All tokens of a vocabulary, each as often as it is drawn; the policy has moved since."""
    generator = torch.Generator().manual_seed(0)
    old, sampler, moved, advantages = torch.randn(4, 50, dtype=torch.float64, generator=generator).unbind()
    old, sampler = (0.3 * x.log_softmax(0)[:, None] for x in (old, sampler))
    mask = torch.ones(50, 1, dtype=torch.bool)

    def gradient(scaled: Tensor) -> Tensor:
        logits = (0.3 * moved).requires_grad_()
        loss = clipped_policy_loss(logits.log_softmax(0)[:, None], old, scaled, mask, 1, dual_clip=3.0)
        return torch.autograd.grad(loss, logits)[0]

    weights = truncated_importance_weights(old, sampler, mask, most=1e9)
    expected = gradient(advantages[:, None] * old.exp())
    torch.testing.assert_close(gradient(advantages[:, None] * sampler.exp() * weights), expected)
    assert expected.abs().max() > 1e-3
    assert not torch.allclose(gradient(advantages[:, None] * sampler.exp()), expected, rtol=0.01)


def test_a_dual_clip_inside_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dual_clip is 1\.0"):
        one_token_policy_loss(1.0, 1.0, dual_clip=1.0)


@pytest.mark.parametrize("difference", [1e4, 90.0, -90.0, -1e4])
@pytest.mark.parametrize("advantage", [5.0, -5.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_huge_log_ratios_leave_loss_and_gradient_finite(
    difference: float, advantage: float, dual_clip: float | None
) -> None:
    logprobs = torch.tensor([[difference, -1.0]], requires_grad=True)
    old_logprobs = torch.tensor([[0.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages = torch.full((1, 2), advantage)
    loss = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, 2, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.isfinite() and gradient.isfinite().all()
    statistics = policy_statistics(logprobs, old_logprobs, mask, 0.2, 0.2)
    assert all(number.isfinite() for number in statistics.values())


@pytest.mark.parametrize(
    ("values", "old_values", "returns", "loss", "gradient"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),  # no step yet: half the squared error
        (1.5, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # towards the return, beyond the clip: the clipped error is larger
        (0.5, 1.0, 3.0, 0.5 * 2.5**2, -2.5),  # away from the return: the unclipped error is larger
        (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9),  # inside the clip
    ],
)
def test_value_loss_is_half_the_larger_of_unclipped_and_clipped_squared_error(
    values: float, old_values: float, returns: float, loss: float, gradient: float
) -> None:
    """L4."""
    found = torch.tensor([[values]], dtype=torch.float64, requires_grad=True)
    old, target = (torch.tensor([[number]], dtype=torch.float64) for number in (old_values, returns))
    result = clipped_value_loss(found, old, target, torch.ones(1, 1, dtype=torch.bool), 1, clip=0.2)
    slope = torch.autograd.grad(result, found)[0].item()
    assert (result.item(), slope) == pytest.approx((loss, gradient), abs=1e-12)


def test_value_loss_without_a_clip_is_half_the_squared_error() -> None:
    """L4."""
    values, old_values, returns = torch.tensor([[5.0, 2.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    loss = clipped_value_loss(values, old_values, returns, torch.ones(1, 2, dtype=torch.bool), 2, clip=None)
    assert loss.item() == 0.5 * (16 + 4) / 2


def test_entropy_bonus_is_the_masked_mean() -> None:
    """L9."""
    entropy = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, 8.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert entropy_bonus(entropy, mask, 3).item() == pytest.approx(7 / 3)


def test_equal_scores_cost_log_2() -> None:
    """R3."""
    loss, gradient = pair_loss(1.7, 1.7)
    assert loss == pytest.approx(0.6931, abs=5e-5)
    assert gradient == pytest.approx([-0.5, 0.5])


def test_swapping_equal_scores_negates_the_gradient() -> None:
    """R3."""
    scores = torch.tensor([1.7, 1.7], requires_grad=True)
    gradients = []
    for better, worse in (([0], [1]), ([1], [0])):
        loss = pairwise_reward_loss(scores, torch.tensor(better), torch.tensor(worse), torch.ones(1), 1)
        gradients.append(torch.autograd.grad(loss, scores)[0])
    assert torch.equal(gradients[0], -gradients[1])


def test_pair_loss_is_minus_log_sigmoid_of_the_difference_less_the_margin() -> None:
    """R3."""
    loss, gradient = pair_loss(2.0, 0.5, margin=0.25)
    assert loss == pytest.approx(math.log(1 + math.exp(-1.25)), rel=1e-12)
    slope = 1 / (1 + math.exp(1.25))
    assert gradient == pytest.approx([-slope, slope], rel=1e-12)


def test_pair_loss_does_not_see_a_constant_added_to_both_scores_unless_centred() -> None:
    """R4."""
    assert pair_loss(102.0, 100.5)[0] == pytest.approx(pair_loss(2.0, 0.5)[0], rel=1e-12)
    plain = math.log(1 + math.exp(-1.5))
    assert pair_loss(2.0, 0.5, centring=0.1)[0] == pytest.approx(plain + 0.1 * 2.5**2, rel=1e-12)
    assert pair_loss(3.0, 1.5, centring=0.1)[0] == pytest.approx(plain + 0.1 * 4.5**2, rel=1e-12)


def test_pair_loss_of_very_wrong_scores_is_finite() -> None:
    """R3: -log sigmoid(-2e4) = 2e4, slope 1."""
    assert pair_loss(-1e4, 1e4) == (pytest.approx(2e4), pytest.approx([-1.0, 1.0]))


def test_a_ranking_of_three_is_the_mean_over_its_three_pairs() -> None:
    """R5: weight 1 / C(3, 2)."""
    scores = torch.tensor([2.0, 1.0, -0.5])
    better, worse = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    loss = pairwise_reward_loss(scores, better, worse, torch.full((3,), 1 / 3), 1)
    differences = [1.0, 2.5, 1.5]
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-d)) for d in differences) / 3, rel=1e-6)


def test_a_ranking_of_two_equals_a_pair_and_preferences_weigh_the_same_whatever_their_length() -> None:
    """R5: a batch of a pair and a ranking of three; the denominator counts preferences."""
    scores = torch.tensor([1.0, 0.0, 2.0, 1.0, -0.5])
    better, worse = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 3, 4, 4])
    weights = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3])
    loss = pairwise_reward_loss(scores, better, worse, weights, 2)
    pair = math.log(1 + math.exp(-1.0))
    ranking = sum(math.log(1 + math.exp(-d)) for d in (1.0, 2.5, 1.5)) / 3
    assert loss.item() == pytest.approx((pair + ranking) / 2, rel=1e-6)


def test_pairs_of_weight_0_drop_out_whatever_they_hold() -> None:
    scores = torch.tensor([2.0, 0.5, NAN, INF], requires_grad=True)
    loss = pairwise_reward_loss(
        scores,
        torch.tensor([0, 2, 3]),
        torch.tensor([1, 3, 0]),
        torch.tensor([1.0, 0.0, 0.0]),
        1,
        margins=torch.tensor([0.0, NAN, 0.0]),
        centring=0.1,
    )
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)) + 0.1 * 2.5**2, rel=1e-6)
    assert gradient[2:].tolist() == [0, 0]
    assert gradient[:2].isfinite().all()


def policy_arguments(rows: int = 6, time: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logprobs": torch.randn(rows, time, generator=generator, dtype=torch.float64),
        "old_logprobs": torch.randn(rows, time, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(rows, time, generator=generator, dtype=torch.float64),
    }


def value_arguments() -> dict[str, Tensor]:
    return dict(zip(("values", "old_values", "returns"), policy_arguments().values(), strict=True))


def kl_arguments() -> dict[str, Tensor]:
    return dict(zip(("logprobs", "old_logprobs", "ref_logprobs"), policy_arguments().values(), strict=True))


def dual_clipped_policy_loss(**arguments: Any) -> Tensor:
    return clipped_policy_loss(**arguments, dual_clip=3.0)


TokenLoss = tuple[Callable[..., Tensor], dict[str, Tensor]]
TOKEN_LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Tensor]]]] = {
    "sft": (sft_loss, lambda: {"logprobs": policy_arguments()["logprobs"]}),
    "policy": (clipped_policy_loss, policy_arguments),
    "dual_clip": (dual_clipped_policy_loss, policy_arguments),
    "kl": (kl_loss, kl_arguments),
    "value": (clipped_value_loss, value_arguments),
    "entropy": (entropy_bonus, lambda: {"entropy": policy_arguments()["logprobs"]}),
}


@pytest.fixture(params=TOKEN_LOSSES)
def token_loss(request: pytest.FixtureRequest) -> TokenLoss:
    function, arguments = TOKEN_LOSSES[request.param]
    return function, arguments()


def uneven_mask() -> Tensor:
    return torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5


def test_uneven_micro_batches_add_up_to_the_whole_batch(token_loss: TokenLoss) -> None:
    """L5: loss and gradient, one row against five."""
    function, arguments = token_loss
    mask = uneven_mask()
    trained = next(iter(arguments.values())).requires_grad_()
    whole = function(**arguments, mask=mask, denominator=mask.sum())
    (whole_gradient,) = torch.autograd.grad(whole, trained)
    parts = [
        function(**{name: tensor[rows] for name, tensor in arguments.items()}, mask=mask[rows], denominator=mask.sum())
        for rows in (slice(0, 1), slice(1, 6))
    ]
    (gradient,) = torch.autograd.grad(parts[0] + parts[1], trained)
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_garbage_in_padding_reaches_neither_loss_nor_gradient(token_loss: TokenLoss, garbage: float) -> None:
    """K3."""
    function, arguments = token_loss
    mask = uneven_mask()
    results = []
    for fill in (0.0, garbage):
        filled = {name: tensor.masked_fill(~mask, fill) for name, tensor in arguments.items()}
        trained = next(iter(filled.values())).requires_grad_()
        loss = function(**filled, mask=mask, denominator=mask.sum())
        results.append((loss, torch.autograd.grad(loss, trained)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[1][1][~mask].any()


@pytest.mark.parametrize("denominator", [0, torch.tensor(0), 7])
def test_an_empty_mask_has_loss_and_gradient_0(token_loss: TokenLoss, denominator: Tensor | float) -> None:
    function, arguments = token_loss
    trained = next(iter(arguments.values())).requires_grad_()
    loss = function(**arguments, mask=torch.zeros(6, 5, dtype=torch.bool), denominator=denominator)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, trained)[0].any()


def test_shapes_that_would_broadcast_are_refused(token_loss: TokenLoss) -> None:
    function, arguments = token_loss
    for name in arguments:
        with pytest.raises(ValueError, match="one shape"):
            function(**{**arguments, name: arguments[name][:, :1]}, mask=uneven_mask(), denominator=1)
    with pytest.raises(ValueError, match="one shape"):
        function(**arguments, mask=uneven_mask()[:, :1], denominator=1)


def test_pairs_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"better \(2,\), worse \(1,\)"):
        pairwise_reward_loss(torch.zeros(3), torch.tensor([0, 1]), torch.tensor([2]), torch.ones(2), 2)


def test_losses_may_be_divided_by_a_count_that_is_a_tensor(token_loss: TokenLoss) -> None:
    function, arguments = token_loss
    as_number = function(**arguments, mask=uneven_mask(), denominator=3)
    assert torch.equal(as_number, function(**arguments, mask=uneven_mask(), denominator=torch.tensor(3)))


def test_policy_statistics_before_any_update_say_that_nothing_moved() -> None:
    """L1: ratio 1, approximate KL 0, nothing clipped."""
    logprobs = policy_arguments()["logprobs"].float()
    mask = uneven_mask()
    statistics = policy_statistics(logprobs, logprobs.clone(), mask, 0.2, 0.2)
    count = mask.sum().item()
    assert {name: number.item() for name, number in statistics.items()} == {
        "count": count,
        "ratio": count,
        "approx_kl": 0,
        "clipped": 0,
    }


def test_policy_statistics_by_hand() -> None:
    """Ratios 1.5, 0.5, 1.1 and a masked one; clip [0.9, 1.4]."""
    ratios = [1.5, 0.5, 1.1]
    logprobs = torch.tensor([[*map(math.log, ratios), NAN]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    statistics = policy_statistics(logprobs, torch.zeros(1, 4), mask, 0.1, 0.4)
    assert statistics["count"].item() == 3
    assert statistics["ratio"].item() == pytest.approx(3.1, rel=1e-6)
    assert statistics["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios), rel=1e-6)
    assert statistics["clipped"].item() == 2
    assert not any(number.requires_grad for number in statistics.values())


def test_the_kl_loss_has_the_gradient_of_the_kl_also_on_samples_of_an_older_policy() -> None:
    """K6: every token of a vocabulary of 5, each as often as the old policy draws it, so that the sum is exact."""
    logits, old, ref = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    old_logprobs, ref_logprobs = old.log_softmax(-1), ref.log_softmax(-1)
    (exact,) = torch.autograd.grad(
        (logits.softmax(-1) * (logits.log_softmax(-1) - ref_logprobs)).sum(), logits, retain_graph=True
    )
    one = torch.ones(1, 1, dtype=torch.bool)
    found = torch.zeros(5, dtype=torch.float64)
    for token in range(5):
        now, then, ref_then = (each[None, None, token] for each in (logits.log_softmax(-1), old_logprobs, ref_logprobs))
        (gradient,) = torch.autograd.grad(kl_loss(now, then, ref_then, one, 1), logits)
        found += old_logprobs[token].exp() * gradient
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
