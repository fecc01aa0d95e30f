"""Losses of the three steps.

Each is a sum over this micro-batch divided by `denominator`: the number of tokens (or preferences) of the whole
optimizer step, over all micro-batches and ranks. So neither the micro-batch size nor the number of ranks changes it.
A step without tokens, denominator 0, has loss 0. What lies outside a mask may be inf or nan: neither the loss nor a
gradient sees it, because inputs are replaced before anything is computed from them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.masking import check_same_shape, masked_sum

# exp(20) is 5e8: far outside any clip range, and its product with an advantage is still finite in float32.
MAX_LOG_RATIO = 20.0


def sft_loss(logprobs: Tensor, mask: Tensor, denominator: Tensor | float) -> Tensor:
    """Negative log-likelihood of the tokens under `mask`.

    Args:
        logprobs: [batch, time] log-probability of token t.
        mask: [batch, time] bool, true on tokens to learn.
        denominator: tokens to learn in the whole optimizer step.

    Returns: scalar, nats per token.
    """
    return _divide(-masked_sum(logprobs, mask), denominator)


def pairwise_reward_loss(
    scores: Tensor,
    better: Tensor,
    worse: Tensor,
    weights: Tensor,
    denominator: Tensor | float,
    margins: Tensor | None = None,
    centring: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of preferences (Bradley & Terry), InstructGPT eq. 1 with the margin of Llama 2 eq. 2.

        sum of w * (-log sigmoid(s_better - s_worse - margin) + centring * (s_better + s_worse)^2) / denominator

    Args:
        scores: [batch] reward model's scores.
        better: [pairs] long, rows of the preferred responses.
        worse: [pairs] long, rows of the others.
        weights: [pairs]: 1 for a pair, 1 / C(k, 2) for each pair of a ranking of k; 0 drops a pair, whatever it holds.
        denominator: preferences in the whole optimizer step; a ranking counts once.
        margins: [pairs] by how much the better score should win; None for 0.
        centring: pulls the sum of a pair's scores to 0, which the first term leaves free; 0 switches it off.

    Returns: scalar.
    """
    margins = torch.zeros_like(weights) if margins is None else margins
    check_same_shape(better=better, worse=worse, weights=weights, margins=margins)
    counts = weights != 0
    better_scores = torch.where(counts, scores[better], 0.0)
    worse_scores = torch.where(counts, scores[worse], 0.0)
    margins = torch.where(counts, margins, 0.0)
    losses = -F.logsigmoid(better_scores - worse_scores - margins)
    if centring:
        losses = losses + centring * (better_scores + worse_scores).square()
    return _divide((weights * losses).sum(), denominator)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), with the dual clip of Ye et al. 2020, eq. 5.

        max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A * dual_clip

    Args:
        logprobs: [batch, time] log-probability of token t under the actor.
        old_logprobs: [batch, time] the same when the response was sampled.
        advantages: [batch, time] how much better than expected token t was.
        mask: [batch, time] bool, true on response tokens.
        denominator: response tokens in the whole optimizer step.
        clip_low: how far the ratio may fall below 1 before a token stops teaching, in [0, 1].
        clip_high: how far it may rise above 1.
        dual_clip: above 1; bounds the loss of a bad token that has become much likelier. None for no bound.

    Returns: scalar. A log-ratio beyond +-20 counts as +-20 and has no gradient, so both stay finite.
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}: it bounds the ratio from above and must exceed 1 (3 is usual)")
    advantages = torch.where(mask, advantages, 0.0)
    ratio = _log_ratio(logprobs, old_logprobs, mask).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    return _divide(masked_sum(losses, mask), denominator)


def truncated_importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, most: float) -> Tensor:
    """How much likelier the trainer finds each token than the sampler that drew it, up to a bound.

        min(p / p_sampler, most)                         (the rho of V-trace, Espeholt et al. 2018, eq. 1)

    An advantage times this weight makes of the policy's loss what it would be over tokens that the trainer had drawn.
    The bound keeps a token that the sampler found very unlikely from deciding alone.

    Args:
        logprobs: [batch, time] log-probability of token t as the trainer computes it.
        sampler_logprobs: [batch, time] the same as the sampler did.
        mask: [batch, time] bool, true on response tokens.
        most: at least 1; 2 is usual.

    Returns: [batch, time], 1 outside `mask`.
    """
    check_same_shape(logprobs=logprobs, sampler_logprobs=sampler_logprobs, mask=mask)
    return _log_ratio(logprobs, sampler_logprobs, mask).exp().clamp(max=most)


def kl_loss(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, denominator: Tensor | float
) -> Tensor:
    """KL to the reference as a term of the loss: half the squared log-ratio, weighted by now over then.

        p / p_old * (log p - log p_ref)^2 / 2            (k2 of Schulman 2020; the weight has no gradient)

    Its gradient is that of KL(actor || reference) on samples of the policy that the rollout was drawn from: without
    the weight it would be so on the first update of a rollout only.

    Args:
        logprobs: [batch, time] log-probability of token t under the actor.
        old_logprobs: [batch, time] the same when the response was sampled.
        ref_logprobs: [batch, time] the same under the reference.
        mask: [batch, time] bool, true on response tokens.
        denominator: response tokens in the whole optimizer step.

    Returns: scalar, nats per token.
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, mask=mask)
    weights = _log_ratio(logprobs.detach(), old_logprobs, mask).exp()
    difference = torch.where(mask, logprobs - ref_logprobs, 0.0)
    return _divide(masked_sum(0.5 * weights * difference.square(), mask), denominator)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    clip: float | None = 0.2,
) -> Tensor:
    """Squared error of the critic, which may not profit from moving further than `clip` in one iteration.

        0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)

    Args:
        values: [batch, time] the critic's values.
        old_values: [batch, time] its values when the response was sampled.
        returns: [batch, time] what it should have said.
        mask: [batch, time] bool, true on response tokens.
        denominator: response tokens in the whole optimizer step.
        clip: in units of the return; None for no clipping.

    Returns: scalar.
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    values, old_values, returns = (torch.where(mask, tensor, 0.0) for tensor in (values, old_values, returns))
    losses = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        losses = torch.maximum(losses, (clipped - returns).square())
    return _divide(0.5 * masked_sum(losses, mask), denominator)


def entropy_bonus(entropy: Tensor, mask: Tensor, denominator: Tensor | float) -> Tensor:
    """Entropy per response token, to be subtracted from the loss.

    Args:
        entropy: [batch, time] entropy of the distribution that token t was chosen from, nats.
        mask: [batch, time] bool, true on response tokens.
        denominator: response tokens in the whole optimizer step.

    Returns: scalar.
    """
    return _divide(masked_sum(entropy, mask), denominator)


def policy_statistics(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """How far the actor has moved since it sampled, as sums over `mask` without gradient.

    Args:
        logprobs: [batch, time] log-probability of token t under the actor.
        old_logprobs: [batch, time] the same when the response was sampled.
        mask: [batch, time] bool, true on response tokens.
        clip_low, clip_high: as for `clipped_policy_loss`.

    Returns: scalars; divide by "count" for means.
        count: tokens.
        ratio: probability now over probability then; mean 1 before the first update.
        approx_kl: ratio - 1 - log(ratio), an unbiased estimate of KL(old || new) (Schulman 2020, k3).
        clipped: tokens whose ratio lies outside [1 - clip_low, 1 + clip_high].
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    log_ratio = _log_ratio(logprobs.detach(), old_logprobs.detach(), mask)
    ratio = log_ratio.exp()
    outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    return {
        "count": mask.sum(),
        "ratio": masked_sum(ratio, mask),
        "approx_kl": masked_sum(torch.expm1(log_ratio) - log_ratio, mask),
        "clipped": (outside & mask).sum(),
    }


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Bounded log-ratio; 0 outside `mask`, set before exp so that no nan comes back through its gradient."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _divide(total: Tensor, denominator: Tensor | float) -> Tensor:
    denominator = torch.as_tensor(denominator, dtype=total.dtype, device=total.device)
    return total / denominator.masked_fill(denominator == 0, 1.0)
