"""From model outputs at positions to numbers about tokens: the only place that shifts by one.

Entry t of everything returned here is about choosing `input_ids[:, t]` from what came before it, so it is computed
from the model's output at position t - 1. Nothing comes before token 0: entry 0 is always 0.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.masking import check_same_shape, last_true

# Logits that are held in float32 at one time. A processor is fastest while they stay in its cache, a GPU when its
# kernels are long.
CHUNK_FLOATS_CPU = 2**20
CHUNK_FLOATS_GPU = 2**24


def token_logprobs(logits: Tensor, input_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of every token given those before it, log softmax(logits / temperature).

    Memory beyond `logits` and its gradient is one chunk in float32: the softmax is computed again for the backward
    pass, and only for tokens whose gradient is not 0, so that garbage in padding costs and changes nothing.

    Args:
        logits: [batch, kept, vocab], any float type: those of the last `kept` positions of `input_ids`.
        input_ids: [batch, time] long, with time >= kept.
        temperature: above 0; the temperature that the tokens were sampled with.

    Returns: [batch, time] float32 (float64 for float64 logits); 0 where no logits were kept.
    """
    batch, time = input_ids.shape
    kept = _check_logits(logits, batch, time, temperature)
    targets = input_ids[:, time - kept + 1 :]
    return _align(_TokenLogprobs.apply(logits, targets, temperature), time)


def token_entropy(logits: Tensor, time: int, temperature: float = 1.0) -> Tensor:
    """Entropy, in nats, of the distribution softmax(logits / temperature) that token t was chosen from.

    Args:
        logits: [batch, kept, vocab], any float type: those of the last `kept` positions.
        time: number of positions, at least `kept`.
        temperature: above 0; the temperature that the tokens were sampled with.

    Returns: [batch, time] float32 (float64 for float64 logits); 0 where no logits were kept.
    """
    _check_logits(logits, logits.shape[0], time, temperature)
    return _align(_TokenEntropy.apply(logits, logits.shape[1] - 1, temperature), time)


def choices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of a mask stand, and where they were chosen: flat places [tokens] in [batch, time].

    Not those of column 0, before which nothing stands.
    """
    chosen = F.pad(mask[:, 1:], (1, 0)).flatten().nonzero()[:, 0]
    return chosen, chosen - 1


def choice_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """As `token_logprobs`, [tokens] float32 from the [tokens, vocab] logits that each of `tokens` was chosen by."""
    _check_temperature(temperature)
    return _TokenLogprobs.apply(logits[None], tokens[None], temperature)[0]


def choice_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """As `token_entropy`, [tokens] float32 from [tokens, vocab] logits."""
    _check_temperature(temperature)
    return _TokenEntropy.apply(logits[None], len(logits), temperature)[0]


def token_values(position_values: Tensor) -> Tensor:
    """Value of the state that token t was chosen in.

    Args:
        position_values: [batch, time], the critic's output at every position, which has seen that position's token.

    Returns: [batch, time] float32.
    """
    return F.pad(_at_least_float32(position_values[:, :-1]), (1, 0))


def last_token_scores(position_values: Tensor, attention_mask: Tensor) -> Tensor:
    """The reward model's number at the last real token of every sequence.

    Args:
        position_values: [batch, time], the reward model's output at every position.
        attention_mask: [batch, time] bool, true on real tokens.

    Returns: [batch] float32; 0 for a row without real tokens.
    """
    check_same_shape(position_values=position_values, attention_mask=attention_mask)
    return torch.where(last_true(attention_mask), _at_least_float32(position_values), 0.0).sum(dim=1)


def _check_logits(logits: Tensor, batch: int, time: int, temperature: float) -> int:
    """Number of kept positions, once the shapes are known to fit."""
    if logits.dim() != 3 or logits.shape[0] != batch or not 1 <= logits.shape[1] <= time:
        raise ValueError(f"logits are {tuple(logits.shape)}: [{batch}, kept, vocab] with kept from 1 to {time} needed")
    _check_temperature(temperature)
    return logits.shape[1]


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: log-probabilities need one above 0")


def _align(kept_values: Tensor, time: int) -> Tensor:
    """[batch, kept - 1] numbers about the last tokens -> [batch, time], 0 in front."""
    return F.pad(kept_values, (time - kept_values.shape[1], 0))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _chunks(
    logits: Tensor, count: int, temperature: float, gradient: Tensor | None = None
) -> Iterator[tuple[int, slice, Tensor]]:
    """(row, positions, [positions, vocab] float32 logits / temperature) of the first `count` positions, in chunks.

    Behind them may be the last position's logits: they predict the token after the sequence, which nobody asked for.
    Given a [batch, count] gradient, a row is read from its first to its last entry that is not 0.
    """
    floats = CHUNK_FLOATS_GPU if logits.is_cuda else CHUNK_FLOATS_CPU
    step = max(1, floats // logits.shape[-1])
    wanted = [[True] * count] * logits.shape[0] if gradient is None else (gradient != 0).tolist()
    for row, flags in enumerate(wanted):
        if not any(flags):
            continue
        end = count - flags[::-1].index(True)
        for start in range(flags.index(True), end, step):
            positions = slice(start, min(start + step, end))
            chunk = _at_least_float32(logits[row, positions])
            yield row, positions, chunk if temperature == 1.0 else chunk / temperature


class _TokenLogprobs(torch.autograd.Function):
    """[batch, kept, vocab] logits and [batch, count] targets of the first ones -> [batch, count] log-probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        logprobs = logits.new_empty(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
        for row, positions, chunk in _chunks(logits, targets.shape[1], temperature):
            chosen = chunk.log_softmax(dim=-1).gather(-1, targets[row, positions, None])
            logprobs[row, positions] = chosen.squeeze(-1)
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        return logprobs_backward(logits, targets, ctx.temperature, gradient), None, None


class _TokenEntropy(torch.autograd.Function):
    """[batch, kept, vocab] logits -> [batch, count] entropies of the first positions."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, count: int, temperature: float) -> Tensor:
        shape = (logits.shape[0], count)
        entropies = logits.new_empty(shape, dtype=torch.promote_types(logits.dtype, torch.float32))
        for row, positions, chunk in _chunks(logits, count, temperature):
            entropies[row, positions] = _entropy(chunk).squeeze(-1)
        ctx.save_for_backward(logits)
        ctx.temperature = temperature
        return entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        return entropy_backward(logits, ctx.temperature, gradient), None, None


def logprobs_backward(logits: Tensor, targets: Tensor, temperature: float, gradient: Tensor) -> Tensor:
    """Gradient of the logits from that of the log-probabilities of the tokens that the first ones chose.

        d logprob / d logits = (onehot(target) - softmax) / temperature

    Args:
        logits: [batch, kept, vocab], any float type.
        targets, gradient: [batch, count], count at most `kept`; where the gradient is 0, logits are not read.

    Returns: as `logits`.
    """
    logits_gradient = torch.zeros_like(logits)
    for row, positions, chunk in _chunks(logits, targets.shape[1], temperature, gradient):
        scale = gradient[row, positions, None] / temperature
        chunk_gradient = chunk.softmax(dim=-1).mul_(-scale)
        chunk_gradient.scatter_add_(-1, targets[row, positions, None], scale)
        # fill, not the multiplication above: 0 * nan is nan
        logits_gradient[row, positions] = chunk_gradient.masked_fill_(scale == 0, 0.0)
    return logits_gradient


def entropy_backward(logits: Tensor, temperature: float, gradient: Tensor) -> Tensor:
    """As `logprobs_backward`, from the gradient of the entropies.

    d entropy / d logits = -softmax * (log softmax + entropy) / temperature
    """
    logits_gradient = torch.zeros_like(logits)
    for row, positions, chunk in _chunks(logits, gradient.shape[1], temperature, gradient):
        scale = gradient[row, positions, None] / temperature
        chunk_gradient = -chunk.softmax(dim=-1) * (_finite_log_softmax(chunk) + _entropy(chunk)) * scale
        logits_gradient[row, positions] = chunk_gradient.masked_fill_(scale == 0, 0.0)
    return logits_gradient


def _entropy(chunk: Tensor) -> Tensor:
    """[positions, vocab] -> [positions, 1]"""
    return -(chunk.softmax(dim=-1) * _finite_log_softmax(chunk)).sum(dim=-1, keepdim=True)


def _finite_log_softmax(chunk: Tensor) -> Tensor:
    """A token that is ruled out has logit -inf and probability 0; 0 * -inf would be nan."""
    return chunk.log_softmax(dim=-1).clamp_(min=torch.finfo(chunk.dtype).min)
