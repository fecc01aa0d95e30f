"""From a score per response to a reward per token: KL estimators, KL controllers and where the score goes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from training.masking import check_same_shape, last_true

# exp(20) is 5e8: a token this much likelier under the reference is lost either way, and sums of it stay finite.
MAX_LOG_RATIO = 20.0


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log p_ref: unbiased for KL(actor || reference), may be negative (Schulman 2020).

    Args:
        logprobs: [batch, time] log-probability of token t under the actor, which sampled it.
        ref_logprobs: [batch, time] the same under the reference.

    Returns: [batch, time], nats.
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log p - log p_ref)^2 / 2: biased, little variance; its gradient on samples is that of KL(actor || reference).

    Arguments and returns as for `kl_k1`.
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """p_ref / p - 1 - log(p_ref / p): unbiased, never negative; as a loss its gradient is that of KL(ref || actor).

    Arguments and returns as for `kl_k1`. A token exp(20) times likelier under the reference counts as exp(20) times
    likelier and has no gradient, so both stay finite.
    """
    difference = (logprobs - ref_logprobs).clamp(min=-MAX_LOG_RATIO)
    return torch.expm1(-difference) + difference


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


class FixedKLController:
    """A KL coefficient that stays as it is."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def update(self, kl: float, num_samples: int) -> None:
        """Nothing to do: the interface of `AdaptiveKLController`."""

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


class AdaptiveKLController:
    """A KL coefficient that steers the measured KL to a target (Ziegler et al. 2019, section 2.2).

        error = clip(kl / target - 1, -0.2, 0.2)         coefficient *= 1 + error * num_samples / horizon

    Args:
        coefficient: where to start, above 0.
        target: KL per response, nats, above 0.
        horizon: responses over which to correct; larger is slower.
    """

    def __init__(self, coefficient: float, target: float, horizon: float) -> None:
        for name, number in {"coefficient": coefficient, "target": target, "horizon": horizon}.items():
            if not number > 0:
                raise ValueError(f"{name} is {number}: an adaptive KL coefficient needs one above 0")
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Correct the coefficient.

        Args:
            kl: mean KL per response, nats, over all ranks.
            num_samples: responses it was measured on, over all ranks.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl is {kl}: the KL coefficient cannot follow it; look for nan in the log-probabilities")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * num_samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """Scores within +-limit.

    Args:
        scores: [batch].
        limit: in units of the score, above 0; None for none.
    """
    if limit is None:
        return scores
    if not limit > 0:
        raise ValueError(f"score limit is {limit}: it must be above 0, or None for no limit")
    return scores.clamp(-limit, limit)


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coefficient: float,
    kl_estimator: str = "k1",
) -> tuple[Tensor, Tensor]:
    """What each token receives: the KL penalty, and the score on the last one (InstructGPT, eq. 2).

    Args:
        scores: [batch] the reward model's score of each response.
        logprobs: [batch, time] log-probability of token t under the actor.
        ref_logprobs: [batch, time] the same under the reference.
        mask: [batch, time] bool, true on response tokens.
        kl_coefficient: score per nat of KL.
        kl_estimator: key of KL_ESTIMATORS.

    Returns: rewards and kl, [batch, time], 0 outside `mask`; a row with an empty mask receives nothing.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores are {tuple(scores.shape)}: one per response needed, {tuple(mask.shape[:1])}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator is {kl_estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}")
    kl = torch.where(mask, KL_ESTIMATORS[kl_estimator](logprobs, ref_logprobs), 0.0)
    score_on_last = torch.where(last_true(mask), scores.unsqueeze(1), 0.0)
    return score_on_last - kl_coefficient * kl, kl
