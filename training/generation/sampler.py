"""From logits to a token and its log-probability."""

import torch
from torch import Tensor

from training.generation.interface import SamplingConfig

BLOCK = 256
# Logits in float32 at one time: few enough to stay in a processor's cache.
CHUNK_FLOATS_CPU = 2**19
CHUNK_FLOATS_GPU = 2**24


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: [batch, vocab]; minus infinity where a token may not be drawn.
        uniforms: [batch] in [0, 1), one random number per row; not read at temperature 0.

    Returns: tokens [batch] long and log-probabilities [batch] float32 under the distribution that was sampled. At
        temperature 0 the log-probability is the one at temperature 1.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    if sampling.top_k or sampling.top_p < 1:
        return draw_tokens(restrict(logits.float() / sampling.temperature, sampling.top_k, sampling.top_p), uniforms)
    if logits.is_cuda:
        # Imported here: Triton comes with torch's GPU builds only.
        from training.generation import sampler_kernel

        return sampler_kernel.draw_tokens(logits, uniforms, sampling.temperature)
    return draw_tokens(logits, uniforms, sampling.temperature)


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """As `sample_tokens`, from softmax(logits / temperature).

    The vocabulary is summed up in blocks, and only the block that the draw falls into is looked at token by token: one
    cumulative sum over a large vocabulary costs as much as all the rest.
    """
    floats = CHUNK_FLOATS_GPU if logits.is_cuda else CHUNK_FLOATS_CPU
    parts = [_block_sums(part, temperature) for part in logits.split(max(1, floats // logits.shape[-1]))]
    largest, sums = (torch.cat(column) for column in zip(*parts, strict=True))
    threshold = (uniforms * sums.sum(-1))[:, None]
    block = _first_above(sums, threshold)
    threshold = (threshold - (sums.cumsum(-1) - sums).gather(-1, block)).clamp_(min=0)
    members = block * BLOCK + torch.arange(BLOCK, device=logits.device)
    inside = logits.gather(-1, members.clamp(max=logits.shape[-1] - 1)).float().div_(temperature)
    weights = torch.where(members < logits.shape[-1], (inside - largest).exp_(), 0.0).double()
    position = _first_above(weights, threshold)
    logprob = inside.gather(-1, position) - largest - sums.sum(-1, keepdim=True).log().float()
    return members.gather(-1, position)[:, 0], logprob[:, 0]


def _block_sums(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Largest logit [rows, 1] float32 and sums of exp(logit - largest) over blocks [rows, blocks] float64."""
    weights = logits.to(torch.float32, copy=True)
    if temperature != 1.0:
        weights.div_(temperature)
    largest = weights.amax(-1, keepdim=True)
    weights.sub_(largest).exp_()
    whole = weights.shape[-1] // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    return largest, torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1).double()


def _first_above(weights: Tensor, threshold: Tensor) -> Tensor:
    """[rows, 1]: where the running sum of [rows, n] weights first exceeds `threshold`, [rows, 1] and at least 0.

    Where rounding keeps it from doing so: the last weight above 0. A weight of 0 is never named.
    """
    position = torch.arange(weights.shape[-1], device=weights.device)
    last = torch.where(weights > 0, position, 0).amax(-1, keepdim=True)
    return (weights.cumsum(-1) <= threshold).sum(-1, keepdim=True).minimum(last)


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
