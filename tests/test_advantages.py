import pytest
import torch
from torch import Tensor

from training.advantages import ADVANTAGE_ESTIMATORS, CRITIC_FREE, discounted_returns, gae

CRITIC = sorted(set(ADVANTAGE_ESTIMATORS) - CRITIC_FREE)
NAN = float("nan")


def random_case(rows: int = 4, time: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Responses of 2 to 5 tokens after a prompt of one, in float64."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(rows, time, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, time, generator=generator, dtype=torch.float64)
    mask = torch.zeros(rows, time, dtype=torch.bool)
    for row in range(rows):
        mask[row, 1 : 3 + row % 4] = True
    return rewards, values, mask


def brute_force_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over k of (gamma * lam)^k * delta_{t+k}, for one response without padding."""
    next_values = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, next_values, values, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def test_gae_gold_numbers() -> None:
    """A1."""
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.6, 0.7]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.95)
    assert advantages[0].tolist() == pytest.approx([0.46575, 0.385, 0.3], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([0.96575, 0.985, 1.0], abs=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.0, 0.5)])
def test_gae_equals_its_definition_as_a_sum(gamma: float, lam: float) -> None:
    """A1, A6: row by row and term by term."""
    rewards, values, mask = random_case()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(len(rewards)):
        kept = mask[row]
        expected = brute_force_gae(rewards[row, kept].tolist(), values[row, kept].tolist(), gamma, lam)
        assert advantages[row, kept].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row, kept].tolist() == pytest.approx((advantages + values)[row, kept].tolist(), abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_of_a_large_float32_batch_equals_a_serial_loop_over_each_row() -> None:
    """A6, A4: 64 responses of up to 200 tokens with gaps, against the definition in float64."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = (torch.randn(64, 200, generator=generator) for _ in range(2))
    mask = torch.rand(64, 200, generator=generator) < torch.rand(64, 1, generator=generator)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    for row, kept in enumerate(mask):
        expected = brute_force_gae(rewards[row, kept].tolist(), values[row, kept].tolist(), 1.0, 0.95)
        assert advantages[row, kept].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        targets = [a + v for a, v in zip(expected, values[row, kept].tolist(), strict=True)]
        assert returns[row, kept].tolist() == pytest.approx(targets, rel=1e-5, abs=1e-5)


def test_lambda_1_gives_suffix_sums_as_returns_whatever_the_critic_says() -> None:
    """A2."""
    rewards, values, mask = random_case()
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for row in range(len(rewards)):
        kept = rewards[row, mask[row]].tolist()
        assert returns[row, mask[row]].tolist() == pytest.approx([sum(kept[t:]) for t in range(len(kept))], abs=1e-12)


def test_lambda_0_gives_one_step_targets_as_returns() -> None:
    """A2."""
    rewards, values, mask = random_case()
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    for row in range(len(rewards)):
        kept_rewards, kept_values = rewards[row, mask[row]].tolist(), values[row, mask[row]].tolist()
        targets = [r + 0.9 * v for r, v in zip(kept_rewards, [*kept_values[1:], 0.0], strict=True)]
        assert returns[row, mask[row]].tolist() == pytest.approx(targets, abs=1e-12)


def test_monte_carlo_and_td_by_hand() -> None:
    """A2: r = [1, 2, 4], V = [.5, 1, 1.5], gamma .5: returns 3, 4, 4 and one-step targets 1.5, 2.75, 4."""
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ADVANTAGE_ESTIMATORS["monte_carlo"](rewards, values, mask, gamma=0.5, lam=0.3, group_size=1)
    assert (returns.tolist(), advantages.tolist()) == ([[3, 4, 4]], [[2.5, 3, 2.5]])
    advantages, returns = ADVANTAGE_ESTIMATORS["td"](rewards, values, mask, gamma=0.5, lam=0.3, group_size=1)
    assert (returns.tolist(), advantages.tolist()) == ([[1.5, 2.75, 4]], [[1, 1.75, 2.5]])


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS))
@pytest.mark.parametrize("garbage", [1e6, NAN, float("inf")])
def test_garbage_outside_the_response_changes_nothing(name: str, garbage: float) -> None:
    """A3."""
    rewards, values, mask = random_case()
    estimator = ADVANTAGE_ESTIMATORS[name]
    clean = estimator(rewards, values, mask, gamma=0.9, lam=0.8, group_size=2)
    dirty = estimator(
        rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage), mask, gamma=0.9, lam=0.8, group_size=2
    )
    for expected, found in zip(clean, dirty, strict=True):
        assert torch.equal(expected, found)
        assert not found[~mask].any()


def test_masked_gaps_carry_forward() -> None:
    """A4: gold; setting the gap to zero would give .43575."""
    rewards, values = torch.tensor([[0.0, NAN, 1.0]]), torch.tensor([[0.5, NAN, 0.7]])
    mask = torch.tensor([[True, False, True]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert advantages[0].tolist() == pytest.approx([0.485, 0.0, 0.3], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([0.985, 0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS))
def test_a_gap_in_the_response_is_as_if_it_were_cut_out(name: str) -> None:
    """A4: for every estimator, with a discount."""
    rewards, values, _ = random_case()
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 2:4] = False
    kept = [0, 1, 4, 5]
    estimator = ADVANTAGE_ESTIMATORS[name]
    with_gap = estimator(rewards, values, mask, gamma=0.9, lam=0.8, group_size=2)
    cut_out = estimator(rewards[:, kept], values[:, kept], mask[:, kept], gamma=0.9, lam=0.8, group_size=2)
    for expected, found in zip(cut_out, with_gap, strict=True):
        torch.testing.assert_close(found[:, kept], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS))
def test_an_empty_response_gets_zeros(name: str) -> None:
    rewards, values, mask = torch.full((2, 3), NAN), torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    advantages, returns = ADVANTAGE_ESTIMATORS[name](rewards, values, mask, gamma=1.0, lam=0.95, group_size=2)
    assert not advantages.any() and not returns.any()


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS))
def test_estimators_do_not_write_to_their_arguments(name: str) -> None:
    arguments = random_case()
    before = [argument.clone() for argument in arguments]
    ADVANTAGE_ESTIMATORS[name](*arguments, gamma=0.9, lam=0.8, group_size=2)
    assert all(torch.equal(old, new) for old, new in zip(before, arguments, strict=True))


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS))
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    rewards, values, mask = random_case()
    with pytest.raises(ValueError, match="one shape"):
        ADVANTAGE_ESTIMATORS[name](rewards, values, mask[:, :1], gamma=1.0, lam=0.95, group_size=2)


@pytest.mark.parametrize("name", CRITIC)
def test_estimators_with_a_critic_refuse_to_go_without_values(name: str) -> None:
    rewards, values, mask = random_case()
    with pytest.raises(ValueError, match="grpo, reinforce_pp, rloo"):
        ADVANTAGE_ESTIMATORS[name](rewards, None, mask, gamma=1.0, lam=0.95, group_size=1)
    with pytest.raises(ValueError, match="one shape"):
        ADVANTAGE_ESTIMATORS[name](rewards, values[:, :1], mask, gamma=1.0, lam=0.95, group_size=1)


@pytest.mark.parametrize("name", sorted(CRITIC_FREE))
def test_critic_free_estimators_need_no_values(name: str) -> None:
    rewards, _, mask = random_case()
    advantages, returns = ADVANTAGE_ESTIMATORS[name](rewards, None, mask, gamma=1.0, lam=0.95, group_size=2)
    assert advantages.shape == returns.shape == mask.shape


GROUP_MASK = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
# Total rewards 1, 3, -2 and 8.
GROUP_REWARDS = torch.tensor([[0.25, 0.75], [3.0, NAN], [2.0, -4.0], [NAN, 8.0]])


def test_grpo_by_hand() -> None:
    """Groups (1, 3) and (-2, 8): means 2 and 3, unbiased deviations sqrt(2) and sqrt(50)."""
    advantages, returns = ADVANTAGE_ESTIMATORS["grpo"](
        GROUP_REWARDS, None, GROUP_MASK, gamma=1.0, lam=1.0, group_size=2
    )
    half = 0.5**0.5
    expected = [-half, -half, half, 0, -half, -half, 0, half]
    assert advantages.flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert returns.tolist() == [[1, 1], [3, 0], [-2, -2], [0, 8]]


def test_rloo_by_hand() -> None:
    """A group of (1, 3, -2, 8): the means of the others are 3, 7/3, 4 and 2/3."""
    advantages, returns = ADVANTAGE_ESTIMATORS["rloo"](
        GROUP_REWARDS, None, GROUP_MASK, gamma=1.0, lam=1.0, group_size=4
    )
    expected = [-2, -2, 2 / 3, 0, -6, -6, 0, 22 / 3]
    assert advantages.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert returns.tolist() == [[1, 1], [3, 0], [-2, -2], [0, 8]]


def test_reinforce_pp_is_the_discounted_reward_to_go() -> None:
    """r = [1, 2, 4], gamma .5: 3, 4, 4."""
    rewards, mask = torch.tensor([[9.0, 1.0, 2.0, 4.0]]), torch.tensor([[False, True, True, True]])
    for found in ADVANTAGE_ESTIMATORS["reinforce_pp"](rewards, None, mask, gamma=0.5, lam=0.0, group_size=1):
        assert found.tolist() == [[0, 3, 4, 4]]
    assert discounted_returns(rewards, mask, 0.5).tolist() == [[0, 3, 4, 4]]


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_group_of_equal_rewards_teaches_nothing(name: str) -> None:
    rewards, mask = torch.full((4, 3), 0.1), torch.ones(4, 3, dtype=torch.bool)
    advantages, _ = ADVANTAGE_ESTIMATORS[name](rewards, None, mask, gamma=1.0, lam=1.0, group_size=4)
    assert advantages.abs().max().item() < 1e-3


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_groups_do_not_see_each_other(name: str) -> None:
    rewards, _, mask = random_case(rows=8)
    estimator = ADVANTAGE_ESTIMATORS[name]
    together, _ = estimator(rewards, None, mask, gamma=1.0, lam=1.0, group_size=4)
    alone, _ = estimator(rewards[4:], None, mask[4:], gamma=1.0, lam=1.0, group_size=4)
    torch.testing.assert_close(together[4:], alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
@pytest.mark.parametrize(("group_size", "message"), [(1, "at least 2"), (0, "at least 2"), (3, "not a multiple")])
def test_group_sizes_that_do_not_fit_are_refused(name: str, group_size: int, message: str) -> None:
    rewards, _, mask = random_case()
    with pytest.raises(ValueError, match=message):
        ADVANTAGE_ESTIMATORS[name](rewards, None, mask, gamma=1.0, lam=1.0, group_size=group_size)


def test_every_critic_free_name_is_an_estimator() -> None:
    assert set(ADVANTAGE_ESTIMATORS) >= CRITIC_FREE
