"""How much better a token was than expected, and what the critic should have said.

Every estimator takes (rewards, values, mask, *, gamma, lam, group_size) and returns (advantages, returns), all
[batch, time]; those that need no critic take None for `values`. A position outside `mask`, padding or a gap in the
middle, is not a step in time: nothing is read there, and what comes after it reaches what comes before it unchanged.
A response ends with its last true position; the value after it is 0, also when it was cut at the length limit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from training.masking import check_same_shape, masked_sum

GROUP_STD_EPS = 1e-4


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Sum of discounted rewards from each token to the end of its response.

        G_t = r_t + gamma * G_{t+1}                      (Sutton & Barto, 2nd ed., eq. 3.9)

    Args:
        rewards: [batch, time] reward for choosing token t.
        mask: [batch, time] bool, true on response tokens.
        gamma: discount in [0, 1]; 1 for whole responses.

    Returns: [batch, time], 0 outside `mask`.
    """
    check_same_shape(rewards=rewards, mask=mask)
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(mask[:, t], rewards[:, t] + gamma * running, running)
        returns[:, t] = running
    return torch.where(mask, returns, 0.0)


def gae(
    rewards: Tensor, values: Tensor | None, mask: Tensor, *, gamma: float, lam: float, group_size: int = 1
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16).

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t = delta_t + gamma * lam * A_{t+1}            returns_t = A_t + V_t

    Args:
        rewards: [batch, time] reward for choosing token t.
        values: [batch, time] value of the state that token t was chosen in.
        mask: [batch, time] bool, true on response tokens.
        gamma: discount in [0, 1]; 1 for whole responses.
        lam: in [0, 1]; 0 trusts the critic (least variance), 1 trusts the rewards (no bias).
        group_size: not used.

    Returns: advantages and returns, [batch, time], 0 outside `mask`.
    """
    values = _check_critic(rewards, values, mask)
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_values = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        next_values = torch.where(mask[:, t], values[:, t], next_values)
        advantages[:, t] = running
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def monte_carlo(
    rewards: Tensor, values: Tensor | None, mask: Tensor, *, gamma: float, lam: float = 1.0, group_size: int = 1
) -> tuple[Tensor, Tensor]:
    """Discounted returns minus the values: `gae` with lam 1. Arguments as for `gae`; `lam` is not used."""
    values = _check_critic(rewards, values, mask)
    returns = discounted_returns(rewards, mask, gamma)
    return torch.where(mask, returns - values, 0.0), returns


def td(
    rewards: Tensor, values: Tensor | None, mask: Tensor, *, gamma: float, lam: float = 0.0, group_size: int = 1
) -> tuple[Tensor, Tensor]:
    """One-step temporal differences: `gae` with lam 0. Arguments as for `gae`; `lam` is not used."""
    return gae(rewards, values, mask, gamma=gamma, lam=0.0)


def grpo(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """A response's total reward against its group, in standard deviations (DeepSeekMath 2024, section 4.1.2).

        A = (R - mean of the group) / (standard deviation of the group, unbiased, + 1e-4)

    Args:
        rewards: [batch, time] reward for choosing token t.
        values, gamma, lam: not used.
        mask: [batch, time] bool, true on response tokens.
        group_size: consecutive rows that answer one prompt, at least 2.

    Returns: [batch, time], 0 outside `mask`: the advantages, one number per response, and its total reward as returns.
    """
    totals = _group_totals(rewards, mask, group_size)
    spread = totals.std(dim=1, keepdim=True)
    scaled = (totals - totals.mean(dim=1, keepdim=True)) / (spread + GROUP_STD_EPS)
    return _to_tokens(scaled, mask), _to_tokens(totals, mask)


def rloo(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """A response's total reward minus the mean of the others in its group (Ahmadian et al. 2024, eq. 8).

    Arguments and returns as for `grpo`.
    """
    totals = _group_totals(rewards, mask, group_size)
    mean_of_others = (totals.sum(dim=1, keepdim=True) - totals) / (group_size - 1)
    return _to_tokens(totals - mean_of_others, mask), _to_tokens(totals, mask)


def reinforce_pp(
    rewards: Tensor, values: Tensor | None, mask: Tensor, *, gamma: float, lam: float = 1.0, group_size: int = 1
) -> tuple[Tensor, Tensor]:
    """Discounted reward to go, to be whitened over all ranks by the caller (REINFORCE++, Hu 2025).

    Arguments and returns as for `gae`; `values`, `lam` and `group_size` are not used.
    """
    returns = discounted_returns(rewards, mask, gamma)
    return returns, returns.clone()


def _check_critic(rewards: Tensor, values: Tensor | None, mask: Tensor) -> Tensor:
    if values is None:
        raise ValueError(f"this estimator needs a critic's values; without one use: {', '.join(sorted(CRITIC_FREE))}")
    check_same_shape(rewards=rewards, values=values, mask=mask)
    return values


def _group_totals(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """[groups, group_size] total reward of every response."""
    rows = rewards.shape[0]
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: a group needs at least 2 responses to compare")
    if rows % group_size:
        raise ValueError(f"{rows} responses are not a multiple of group_size ({group_size}): groups must be whole")
    return masked_sum(rewards, mask, dim=1).view(-1, group_size)


def _to_tokens(per_response: Tensor, mask: Tensor) -> Tensor:
    """[groups, group_size] -> [batch, time], every response's number on each of its tokens."""
    return torch.where(mask, per_response.reshape(-1, 1), 0.0)


ADVANTAGE_ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gae": gae,
    "monte_carlo": monte_carlo,
    "td": td,
    "grpo": grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
}
CRITIC_FREE: frozenset[str] = frozenset({"grpo", "rloo", "reinforce_pp"})
