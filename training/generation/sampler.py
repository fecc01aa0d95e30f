"""From logits to a token and its log-probability."""

import torch
from torch import Tensor

from training.generation.interface import SamplingConfig


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: [batch, vocab]; minus infinity where a token may not be drawn.
        uniforms: [batch] in [0, 1), one random number per row; not read at temperature 0.

    Returns: tokens [batch] long and log-probabilities [batch] float32 under the distribution that was sampled. At
        temperature 0 the log-probability is the one at temperature 1.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    logits = restrict(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    logprobs = logits.log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1)
    # Scaled by the total, so that rounding in the sum cannot push a draw past the last token.
    thresholds = (uniforms.to(cumulative) * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Minus infinity outside the `top_k` likeliest tokens and the nucleus of probability `top_p`.

        nucleus = smallest set of likeliest tokens whose probability is at least top_p    (Holtzman et al. 2020, eq. 2)

    Args:
        logits: [batch, vocab] float32.
        top_k: 0 for no limit.
        top_p: 1 for no limit.

    Returns: [batch, vocab].
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
