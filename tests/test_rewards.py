import math

import pytest
import torch

from training.rewards import (
    KL_ESTIMATORS,
    AdaptiveKLController,
    FixedKLController,
    clip_scores,
    token_rewards,
)

NAN, INF = float("nan"), float("inf")

MASK = torch.tensor([[False, True, True, False], [True, True, True, True], [False, True, False, False]])


def random_logprobs(seed: int) -> torch.Tensor:
    return -torch.rand(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_score_stands_on_the_last_token_and_the_penalty_on_every_token() -> None:
    """K1: by hand, with KL .5 and -1 on two tokens, coefficient .1 and score 2."""
    rewards, kl = token_rewards(
        torch.tensor([2.0]),
        torch.tensor([[9.0, -1.0, -2.0, 9.0]]),
        torch.tensor([[0.0, -1.5, -1.0, 0.0]]),
        torch.tensor([[False, True, True, False]]),
        kl_coefficient=0.1,
    )
    assert rewards[0].tolist() == pytest.approx([0, -0.05, 2.1, 0])
    assert kl.tolist() == [[0, 0.5, -1, 0]]


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_rewards_of_a_response_add_up_to_score_less_penalty(name: str) -> None:
    """K1."""
    scores = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rewards, kl = token_rewards(scores, random_logprobs(0), random_logprobs(1), MASK, 0.05, name)
    assert rewards.sum(1).tolist() == pytest.approx((scores - 0.05 * kl.sum(1)).tolist(), abs=1e-12)
    assert not rewards[~MASK].any() and not kl[~MASK].any()


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_an_actor_equal_to_its_reference_pays_nothing(name: str) -> None:
    """K2."""
    logprobs = random_logprobs(0).float()
    rewards, kl = token_rewards(torch.zeros(3), logprobs, logprobs.clone(), MASK, 0.05, name)
    assert not kl.any() and not rewards.any()


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_padding_contributes_exactly_nothing(name: str, garbage: float) -> None:
    """K3."""
    scores = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    clean = token_rewards(scores, random_logprobs(0), random_logprobs(1), MASK, 0.05, name)
    dirty = token_rewards(
        scores,
        random_logprobs(0).masked_fill(~MASK, garbage),
        random_logprobs(1).masked_fill(~MASK, -garbage),
        MASK,
        0.05,
        name,
    )
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_an_empty_response_receives_nothing_whatever_its_score() -> None:
    for score in (3.0, NAN):
        rewards, kl = token_rewards(
            torch.tensor([score]), torch.ones(1, 3), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool), 0.1
        )
        assert rewards.tolist() == kl.tolist() == [[0, 0, 0]]


def test_the_score_stands_behind_a_gap_in_the_response() -> None:
    mask = torch.tensor([[True, False, True, False]])
    rewards, _ = token_rewards(torch.tensor([3.0]), torch.zeros(1, 4), torch.zeros(1, 4), mask, 0.1)
    assert rewards.tolist() == [[0, 0, 3, 0]]


def test_shapes_and_names_that_do_not_fit_are_refused() -> None:
    logprobs = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="one shape"):
        token_rewards(torch.zeros(3), logprobs, logprobs[:, :1], MASK, 0.1)
    with pytest.raises(ValueError, match=r"scores are \(3, 1\)"):
        token_rewards(torch.zeros(3, 1), logprobs, logprobs, MASK, 0.1)
    with pytest.raises(ValueError, match="choose one of k1, k2, k3"):
        token_rewards(torch.zeros(3), logprobs, logprobs, MASK, 0.1, "k4")


def test_adaptive_coefficient_gold_numbers() -> None:
    """K4: from .15 with target 6, horizon 10000 and 512 samples."""
    for kl, expected in {0.0: 0.148464, 6.0: 0.150000, 6.3: 0.150384, 12.0: 0.151536}.items():
        controller = AdaptiveKLController(0.15, target=6.0, horizon=10000)
        controller.update(kl, num_samples=512)
        assert controller.coefficient == pytest.approx(expected, abs=5e-7)


def test_coefficients_survive_a_resume() -> None:
    """K4."""
    controller = AdaptiveKLController(0.15, target=6.0, horizon=10000)
    controller.update(12.0, 512)
    resumed = AdaptiveKLController(0.15, target=6.0, horizon=10000)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coefficient == controller.coefficient
    fixed = FixedKLController(0.3)
    fixed.load_state_dict(FixedKLController(0.2).state_dict())
    assert fixed.coefficient == 0.2


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedKLController(0.15)
    controller.update(100.0, 512)
    assert controller.coefficient == 0.15


def test_a_kl_that_is_not_a_number_is_refused() -> None:
    controller = AdaptiveKLController(0.15, target=6.0, horizon=10000)
    for kl in (NAN, INF):
        with pytest.raises(ValueError, match="kl is"):
            controller.update(kl, 512)
    assert controller.coefficient == 0.15


@pytest.mark.parametrize("name", ["coefficient", "target", "horizon"])
def test_an_adaptive_controller_that_cannot_move_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        AdaptiveKLController(**{"coefficient": 0.1, "target": 6.0, "horizon": 10000, name: 0})


@pytest.mark.parametrize(
    ("shift", "name", "bias", "deviation"),
    [
        (0.1, "k1", 0.0, 20.0),
        (0.1, "k2", 0.0025, 1.42),
        (0.1, "k3", 0.0, 1.42),
        (1.0, "k1", 0.0, 2.0),
        (1.0, "k2", 0.25, 1.73),
        (1.0, "k3", 0.0, 1.7),
    ],
)
def test_bias_and_deviation_of_the_kl_estimators(shift: float, name: str, bias: float, deviation: float) -> None:
    """K5: over the true KL, of N(0, 1) against N(shift, 1), integrated on a grid; the true KL is shift^2 / 2."""
    grid = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    logprobs = -0.5 * grid**2 - 0.5 * math.log(2 * math.pi)
    ref_logprobs = -0.5 * (grid - shift) ** 2 - 0.5 * math.log(2 * math.pi)
    weights = logprobs.exp() * (grid[1] - grid[0])
    estimates = KL_ESTIMATORS[name](logprobs, ref_logprobs)
    true_kl = shift**2 / 2
    mean = (weights * estimates).sum()
    spread = (weights * (estimates - mean) ** 2).sum().sqrt()
    assert (mean.item() - true_kl) / true_kl == pytest.approx(bias, abs=1e-4)
    assert spread.item() / true_kl == pytest.approx(deviation, abs=0.006)


def test_a_negative_mean_of_k1_says_that_another_distribution_was_sampled() -> None:
    """K8: over 5 tokens, drawn from the actor itself, and drawn from the reference by mistake."""
    actor = torch.tensor([0.3, -1.0, 0.8, 0.0, 2.0], dtype=torch.float64).log_softmax(-1)
    reference = torch.tensor([1.0, 0.5, -0.7, 0.2, 0.1], dtype=torch.float64).log_softmax(-1)
    estimates = KL_ESTIMATORS["k1"](actor, reference)
    assert (actor.exp() * estimates).sum().item() == pytest.approx(kl_divergence(actor, reference), abs=1e-12)
    assert (reference.exp() * estimates).sum().item() == pytest.approx(-kl_divergence(reference, actor), abs=1e-12)


def kl_divergence(logprobs: torch.Tensor, other: torch.Tensor) -> float:
    """Sum of p log(p / q), token by token; above 0 for two distributions that differ."""
    pairs = zip(logprobs.tolist(), other.tolist(), strict=True)
    divergence = sum(math.exp(p) * math.log(math.exp(p) / math.exp(q)) for p, q in pairs)
    assert divergence > 0.1
    return divergence


def test_gradients_of_the_kl_estimators_as_losses() -> None:
    """K6: k1's is 0 in expectation, k2's that of KL(pi || ref), k3's that of KL(ref || pi); summed over 5 tokens."""
    preferences = torch.tensor([0.3, -1.0, 0.8, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0, 0.5, -0.7, 0.2, 0.1], dtype=torch.float64).log_softmax(-1)

    def gradient(loss: torch.Tensor) -> list[float]:
        return torch.autograd.grad(loss, preferences)[0].tolist()

    policy = preferences.log_softmax(-1)
    forward = gradient((policy.exp() * (policy - reference)).sum())
    policy = preferences.log_softmax(-1)
    reverse = gradient((reference.exp() * (reference - policy)).sum())
    for name, expected in {"k1": [0.0] * 5, "k2": forward, "k3": reverse}.items():
        policy = preferences.log_softmax(-1)
        on_policy_mean = (policy.detach().exp() * KL_ESTIMATORS[name](policy, reference)).sum()
        assert gradient(on_policy_mean) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@pytest.mark.parametrize("difference", [1e4, 100.0, -100.0, -1e4])
def test_kl_estimates_of_huge_differences_are_finite_with_finite_gradients(name: str, difference: float) -> None:
    logprobs = torch.tensor([[difference]], requires_grad=True)
    estimate = KL_ESTIMATORS[name](logprobs, torch.zeros(1, 1))
    (gradient,) = torch.autograd.grad(estimate.sum(), logprobs)
    assert estimate.isfinite().all() and gradient.isfinite().all()


def test_k3_by_hand_and_without_cancellation_near_zero() -> None:
    """Its value at a difference d is exp(-d) - 1 + d, about d^2 / 2 for a small one."""
    differences = torch.tensor([[1.0, -1.0, 1e-4]])
    found = KL_ESTIMATORS["k3"](differences, torch.zeros(1, 3))[0].tolist()
    assert found[:2] == pytest.approx([math.exp(-1), math.e - 2], rel=1e-6)
    assert found[2] == pytest.approx(5e-9, rel=0.01)


def test_scores_are_clipped_to_the_limit() -> None:
    scores = torch.tensor([-7.0, -1.0, 0.5, 9.0])
    assert clip_scores(scores, 5.0).tolist() == [-5, -1, 0.5, 5]
    assert clip_scores(scores, None).tolist() == scores.tolist()
    with pytest.raises(ValueError, match="score limit is 0"):
        clip_scores(scores, 0.0)
