"""The arithmetic of verl and OpenRLHF, written again as formulas, beside this project's on the same random numbers.

Neither is run: verl 0.9.0 and OpenRLHF 0.11.0 need GPUs. Each formula is derived from the function that its docstring
names, with sums written out where that function runs a recurrence. Needs torch alone.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scripts.benchmark.comparison import Group, Row
from training.advantages import GROUP_STD_EPS, discounted_returns, gae, grpo, reinforce_pp, rloo
from training.losses import clipped_policy_loss, clipped_value_loss, pairwise_reward_loss
from training.masking import masked_whiten
from training.rewards import AdaptiveKLController, kl_k1, kl_k2, kl_k3, token_rewards

GAMMA, LAM, BETA, CLIP, DUAL_CLIP, GROUP_SIZE = 0.99, 0.95, 0.1, 0.2, 3.0, 3
KL_TARGET, HORIZON = 6.0, 100.0


def example() -> SimpleNamespace:
    """Six responses to two prompts, [6, 10] float64: `mask` ends after 3 to 9 tokens, and `gaps` also has holes."""
    generator = torch.Generator().manual_seed(0)
    names = ("rewards", "values", "old_values", "returns", "old", "logprobs", "ref", "advantages")
    drawn = {name: torch.randn(6, 10, generator=generator, dtype=torch.float64) for name in names}
    for name in ("logprobs", "ref"):
        drawn[name] = drawn["old"] + 0.4 * drawn[name]
    scores = torch.randn(6, generator=generator, dtype=torch.float64)
    mask = torch.arange(10) < torch.tensor([[4], [9], [3], [7], [5], [8]])
    gaps = mask & (torch.arange(10) != torch.tensor([[1], [3], [1], [4], [2], [0]]))
    return SimpleNamespace(**drawn, scores=scores, mask=mask, gaps=gaps)


def discounted_sums(terms: Tensor, factor: float) -> Tensor:
    """sum over l >= k of factor^(l - k) * terms_l, for every k of [steps]."""
    steps = torch.arange(len(terms), dtype=terms.dtype)
    return (torch.tril(factor ** (steps[:, None] - steps).clamp(min=0)) * terms[:, None]).sum(0)


def verl_gae(x: SimpleNamespace, mask: Tensor, gamma: float = GAMMA) -> Tensor:
    """verl/trainer/ppo/core_algos.py, compute_gae_advantage_return, before whitening: masked positions are no steps."""
    advantages = torch.zeros_like(x.rewards)
    for row, kept in enumerate(mask):
        rewards, values = x.rewards[row, kept], x.values[row, kept]
        deltas = rewards + gamma * torch.cat([values[1:], values.new_zeros(1)]) - values
        advantages[row, kept] = discounted_sums(deltas, gamma * LAM)
    return advantages


def returns_over_kept(x: SimpleNamespace) -> Tensor:
    """core_algos.py, compute_reinforce_plus_plus_outcome_advantage, before whitening."""
    returns = torch.zeros_like(x.rewards)
    for row, kept in enumerate(x.gaps):
        returns[row, kept] = discounted_sums(x.rewards[row, kept], GAMMA)
    return returns


def openrlhf_gae(x: SimpleNamespace, mask: Tensor, gamma: float = GAMMA) -> Tensor:
    """openrlhf/trainer/ppo_utils/experience_maker.py, get_advantages_and_returns: masked positions are steps with 0."""
    everywhere = SimpleNamespace(rewards=x.rewards * mask, values=x.values * mask)
    return verl_gae(everywhere, torch.ones_like(mask), gamma) * mask


def whitened_by_sample_variance(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Our whitening, with the variance that divides by n - 1."""
    kept = values[mask]
    scaled = masked_whiten(values, mask) * (kept.var(correction=0) / kept.var()).sqrt()
    return scaled if shift_mean else torch.where(mask, scaled + kept.mean(), 0.0)


def verl_whitened(values: Tensor, mask: Tensor) -> Tensor:
    """verl/utils/torch_functional.py, masked_whiten: variance over n - 1."""
    kept = values[mask]
    return torch.where(mask, (values - kept.mean()) / (kept.var() + 1e-8).sqrt(), 0.0)


def openrlhf_whitened(values: Tensor, mask: Tensor) -> Tensor:
    """experience_maker.py, compute_advantages_and_returns: variance over n, at least 1e-8."""
    kept = values[mask]
    return torch.where(mask, (values - kept.mean()) / kept.var(correction=0).clamp(min=1e-8).sqrt(), 0.0)


def k3_capped(logprobs: Tensor, ref: Tensor) -> Tensor:
    """core_algos.py, kl_penalty_forward, low_var_kl; openrlhf/models/utils.py, compute_approx_kl, k3: at most 10."""
    return ((ref - logprobs).exp() - 1 + logprobs - ref).clamp(max=10)


def k3_plus(logprobs: Tensor, ref: Tensor) -> Tensor:
    """core_algos.py, kl_penalty, k3+: the value of k3 and the gradient of k2."""
    squared = 0.5 * (logprobs - ref) ** 2
    return squared + (k3_capped(logprobs, ref) - squared).detach()


def policy_losses(x: SimpleNamespace, logprobs: Tensor, dual_clip: float) -> Tensor:
    """core_algos.py, compute_policy_loss_vanilla; openrlhf/models/loss.py, PolicyLoss: by cases of the sign of A.

    A >= 0: -A min(ratio, 1 + clip)                    A < 0: |A| min(max(ratio, 1 - clip), dual_clip)
    """
    ratio = (logprobs - x.old).exp()
    good = -x.advantages * ratio.clamp(max=1 + CLIP)
    bad = x.advantages.abs() * ratio.clamp(min=1 - CLIP, max=dual_clip)
    return torch.where(x.advantages >= 0, good, bad)


def value_losses(x: SimpleNamespace) -> Tensor:
    """core_algos.py, compute_value_loss; openrlhf/models/loss.py, ValueLoss: half the larger error, squared."""
    clipped = torch.minimum(torch.maximum(x.values, x.old_values - CLIP), x.old_values + CLIP)
    return 0.5 * torch.maximum((x.values - x.returns).abs(), (clipped - x.returns).abs()) ** 2


def mean_of_means(losses: Tensor, mask: Tensor) -> Tensor:
    """verl 0.7.1, verl/workers/critic/dp_critic.py, update_critic: mean over micro-batches, here of 2 rows."""
    return torch.stack([losses[i : i + 2][mask[i : i + 2]].mean() for i in (0, 2, 4)]).mean()


def over_ranks(losses: Tensor, mask: Tensor) -> Tensor:
    """core_algos.py, agg_loss; openrlhf/models/loss.py, aggregate_loss: 2 ranks, whose gradients are averaged."""
    kept = torch.where(mask, losses, 0.0)
    return torch.stack([2 * part.sum() / mask.sum() for part in kept.split(3)]).mean()


def group_normalized(totals: Tensor, eps: float) -> Tensor:
    """core_algos.py, compute_grpo_outcome_advantage, eps 1e-6; experience_maker.py, group_norm, eps 1e-9."""
    groups = totals.view(-1, GROUP_SIZE)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + eps)).flatten()


def leave_one_out(totals: Tensor) -> Tensor:
    """core_algos.py, compute_rloo_outcome_advantage; experience_maker.py, rloo: minus the mean of the others."""
    pairs = totals.view(-1, GROUP_SIZE, 1) - totals.view(-1, 1, GROUP_SIZE)
    return (pairs.sum(2) / (GROUP_SIZE - 1)).flatten()


def openrlhf_rloo(x: SimpleNamespace) -> Tensor:
    """experience_maker.py, compute_advantages_and_returns: the baseline is of scores, the KL a reward to go."""
    kl = torch.where(x.mask, x.logprobs - x.ref, 0.0)
    to_go = kl.flip(1).cumsum(1).flip(1)
    return torch.where(x.mask, leave_one_out(x.scores)[:, None] - BETA * to_go, 0.0)


def rewards_by_loop(x: SimpleNamespace) -> Tensor:
    """verl/trainer/ppo/ray_trainer.py, apply_kl_penalty; openrlhf/models/utils.py, compute_reward."""
    rewards = torch.zeros_like(x.rewards)
    for row, kept in enumerate(x.mask):
        places = kept.nonzero().flatten().tolist()
        for t in places:
            rewards[row, t] = -BETA * (x.logprobs[row, t] - x.ref[row, t])
        rewards[row, places[-1]] += x.scores[row]
    return rewards


def our_loss(x: SimpleNamespace, logprobs: Tensor, dual_clip: float | None) -> Tensor:
    return clipped_policy_loss(logprobs, x.old, x.advantages, x.mask, x.mask.sum(), CLIP, CLIP, dual_clip)


def our_value_loss(x: SimpleNamespace) -> Tensor:
    return clipped_value_loss(x.values, x.old_values, x.returns, x.mask, x.mask.sum(), CLIP)


def our_value_loss_of(x: SimpleNamespace, rows: slice) -> Tensor:
    return our_value_loss(SimpleNamespace(**{name: tensor[rows] for name, tensor in vars(x).items()}))


def our_pairwise_loss(x: SimpleNamespace) -> Tensor:
    """Rows 0 to 2 against rows 3 to 5."""
    better, worse, ones = torch.arange(3), torch.arange(3, 6), torch.ones(3, dtype=torch.float64)
    return pairwise_reward_loss(x.scores, better, worse, ones, 3, margins=x.returns[:3, 0])


def our_gae(x: SimpleNamespace, mask: Tensor) -> tuple[Tensor, Tensor]:
    return gae(x.rewards, x.values, mask, gamma=GAMMA, lam=LAM)


def our_gae_with_steps_in_gaps(x: SimpleNamespace) -> Tensor:
    zeroed = SimpleNamespace(rewards=x.rewards * x.gaps, values=x.values * x.gaps)
    return our_gae(zeroed, x.mask)[0] * x.gaps


def per_response(estimate: Any, x: SimpleNamespace) -> Tensor:
    """Our advantage of each response, which is one number for all its tokens; the first token is always kept."""
    return estimate(x.rewards, None, x.mask, group_size=GROUP_SIZE)[0][:, 0]


def totals(x: SimpleNamespace) -> Tensor:
    return torch.where(x.mask, x.rewards, 0.0).sum(1)


def other_eps(x: SimpleNamespace, eps: float) -> Tensor:
    """Our GRPO advantages with another number added to the standard deviation."""
    spread = totals(x).view(-1, GROUP_SIZE).std(1).repeat_interleave(GROUP_SIZE)
    return per_response(grpo, x) * (spread + GROUP_STD_EPS) / (spread + eps)


def our_rloo(x: SimpleNamespace, beta: float) -> Tensor:
    rewards, _ = token_rewards(x.scores, x.logprobs, x.ref, x.mask, beta)
    return rloo(rewards, None, x.mask, group_size=GROUP_SIZE)[0]


def our_rloo_with_kl_to_go(x: SimpleNamespace) -> Tensor:
    return our_rloo(x, 0.0) - BETA * discounted_returns(kl_k1(x.logprobs, x.ref), x.mask, gamma=1.0)


def gradient(loss: Any, x: SimpleNamespace, *arguments: Any) -> Tensor:
    """Of a loss at x.logprobs."""
    logprobs = x.logprobs.clone().requires_grad_()
    loss(x, logprobs, *arguments).backward()
    assert logprobs.grad is not None
    return logprobs.grad


def large_kl(x: SimpleNamespace) -> Tensor:
    return torch.where(x.mask, 0.5 + (x.logprobs - x.ref).abs(), 0.0)


def coefficient_after(kl: Tensor) -> float:
    controller = AdaptiveKLController(coefficient=0.15, target=KL_TARGET, horizon=HORIZON)
    controller.update(float(kl.mean()), num_samples=6)
    return controller.coefficient


def verl_coefficient_after(kl: Tensor) -> float:
    """core_algos.py, AdaptiveKLController.update, which apply_kl_penalty gives the mean KL per token."""
    return 0.15 * (1 + min(max(float(kl.mean()) / KL_TARGET - 1, -0.2), 0.2) * 6 / HORIZON)


GAPS = "a gap is one more step there, with value 0; ours carries the values before and after it across"
CAPPED = "stops at 10 nats a token; ours {}"

FORMULA_GROUPS = (
    Group("verl 0.9.0, as formulas: 2 prompts with 3 responses each, in float64", example, (
        Row("KL k1, k2, k3", "`KL_ESTIMATORS`", "`kl_penalty_forward`",
            lambda x: (torch.stack([kl(x.logprobs, x.ref) for kl in (kl_k1, kl_k2, kl_k3)]),
                       torch.stack([x.logprobs - x.ref, (x.logprobs - x.ref) ** 2 / 2, k3_capped(x.logprobs, x.ref)]))),
        Row("KL k3 of a token 12 nats likelier in the reference", "`kl_k3`", "`kl_penalty_forward`",
            lambda x: (kl_k3(x.ref - 12, x.ref), k3_capped(x.ref - 12, x.ref), kl_k3(x.ref - 12, x.ref).clamp(max=10)),
            because=CAPPED.format("at a log-ratio of 20")),
        Row("gradient of the KL loss", "`kl_k2`", "`kl_penalty`, k3+",
            lambda x: (gradient(lambda x, p: kl_k2(p, x.ref).sum(), x),
                       gradient(lambda x, p: k3_plus(p, x.ref).sum(), x))),
        Row("rewards", "`token_rewards`", "`apply_kl_penalty`",
            lambda x: (token_rewards(x.scores, x.logprobs, x.ref, x.mask, BETA)[0], rewards_by_loop(x))),
        Row("advantages, masks with gaps, gamma 0.99", "`gae`", "`compute_gae_advantage_return`",
            lambda x: (our_gae(x, x.gaps)[0], verl_gae(x, x.gaps))),
        Row("whitened advantages", "`masked_whiten`", "`masked_whiten`",
            lambda x: (masked_whiten(x.advantages, x.mask), verl_whitened(x.advantages, x.mask),
                       whitened_by_sample_variance(x.advantages, x.mask)),
            because="divides the variance by n - 1; ours by n"),
        Row("advantages, GRPO", "`grpo`", "`compute_grpo_outcome_advantage`",
            lambda x: (per_response(grpo, x), group_normalized(totals(x), 1e-6), other_eps(x, 1e-6)),
            because="adds 1e-6 to the standard deviation; ours 1e-4, as TRL does"),
        Row("advantages, RLOO", "`rloo`", "`compute_rloo_outcome_advantage`",
            lambda x: (per_response(rloo, x), leave_one_out(totals(x)))),
        Row("returns, REINFORCE++, masks with gaps", "`reinforce_pp`",
            "`compute_reinforce_plus_plus_outcome_advantage`",
            lambda x: (reinforce_pp(x.rewards, None, x.gaps, gamma=GAMMA)[1], returns_over_kept(x))),
        Row("policy loss, dual clip 3", "`clipped_policy_loss`", "`compute_policy_loss_vanilla`",
            lambda x: (our_loss(x, x.logprobs, DUAL_CLIP), policy_losses(x, x.logprobs, DUAL_CLIP)[x.mask].mean())),
        Row("its gradient", "the same", "the same",
            lambda x: (gradient(our_loss, x, DUAL_CLIP),
                       gradient(lambda x, p: policy_losses(x, p, DUAL_CLIP)[x.mask].mean(), x))),
        Row("value loss", "`clipped_value_loss`", "`compute_value_loss`",
            lambda x: (our_value_loss(x), value_losses(x)[x.mask].mean())),
        Row("value loss over 2 ranks", "sum over tokens / tokens of the step", "`agg_loss`, token-mean",
            lambda x: (our_value_loss(x), over_ranks(value_losses(x), x.mask))),
        Row("value loss over 3 micro-batches", "sum over tokens / tokens of the step", "verl 0.7.1, `dp_critic.py`",
            lambda x: (our_value_loss(x), mean_of_means(value_losses(x), x.mask),
                       torch.stack([our_value_loss_of(x, slice(i, i + 2)) for i in (0, 2, 4)]).mean()),
            because="is the mean of the micro-batches' means: it depends on the split; ours does not"),
        Row("KL coefficient after an update", "`AdaptiveKLController`", "`AdaptiveKLController`",
            lambda x: (coefficient_after(large_kl(x).sum(1)),
                       verl_coefficient_after(large_kl(x).sum(1) / x.mask.sum(1)),
                       coefficient_after(large_kl(x).sum(1) / x.mask.sum(1))),
            because="is fed nats per token; ours nats per response, in which Ziegler et al. state the target"),
    )),
    Group("OpenRLHF 0.11.0, as formulas: the same numbers", example, (
        Row("KL k1 of a token 12 nats likelier in the policy", "`kl_k1`", "`compute_approx_kl`",
            lambda x: (kl_k1(x.ref + 12, x.ref), torch.full_like(x.ref, 10), kl_k1(x.ref + 12, x.ref).clamp(max=10)),
            because=CAPPED.format("does not")),
        Row("advantages, no gaps", "`gae`", "`get_advantages_and_returns`",
            lambda x: (our_gae(x, x.mask)[0], openrlhf_gae(x, x.mask))),
        Row("advantages, masks with gaps", "`gae`", "`get_advantages_and_returns`",
            lambda x: (our_gae(x, x.gaps)[0], openrlhf_gae(x, x.gaps), our_gae_with_steps_in_gaps(x)), because=GAPS),
        Row("whitened advantages", "`masked_whiten`", "`compute_advantages_and_returns`",
            lambda x: (masked_whiten(x.advantages, x.mask), openrlhf_whitened(x.advantages, x.mask))),
        Row("advantages, GRPO", "`grpo`", "`group_norm`",
            lambda x: (per_response(grpo, x), group_normalized(totals(x), 1e-9), other_eps(x, 1e-9)),
            because="adds 1e-9 to the standard deviation; ours 1e-4, as TRL does"),
        Row("advantages, RLOO with a KL penalty", "`rloo`", "`rloo`",
            lambda x: (our_rloo(x, BETA), openrlhf_rloo(x), our_rloo_with_kl_to_go(x)),
            because="compares scores, then takes the KL to go from each token; ours compares totals, as TRL does"),
        Row("policy loss", "`clipped_policy_loss`", "`PolicyLoss`",
            lambda x: (our_loss(x, x.logprobs, None), over_ranks(policy_losses(x, x.logprobs, torch.inf), x.mask))),
        Row("its gradient", "the same", "the same",
            lambda x: (gradient(our_loss, x, None),
                       gradient(lambda x, p: over_ranks(policy_losses(x, p, torch.inf), x.mask), x))),
        Row("value loss over 2 ranks", "`clipped_value_loss`", "`ValueLoss`, `aggregate_loss`",
            lambda x: (our_value_loss(x), over_ranks(value_losses(x), x.mask))),
        Row("loss of pairs with margins", "`pairwise_reward_loss`", "`PairWiseLoss`",
            lambda x: (our_pairwise_loss(x),
                       (1 + (x.scores[3:] + x.returns[:3, 0] - x.scores[:3]).exp()).log().mean())),
    )),
)  # fmt: skip
