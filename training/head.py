"""The head of a causal LM for chosen tokens alone: log-probabilities from hidden states, some tokens at a time.

The logits of 32,000 tokens over a vocabulary of 128,000 fill 8 GB in 16 bits, and their gradient as much again. Here
no more than a chunk of them exists at one time; the backward pass makes each chunk once more.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from training.logprobs import choice_entropy, choice_logprobs, entropy_backward, logprobs_backward

# Bytes of logits that are held at one time; in training their gradient takes as much again. Training keeps logits that
# fit, since making them twice costs the head a third of its time; where they do not fit, large chunks add to the
# gradient of the weight, which is as large as the weight, less often. Scoring is fastest in memory that the allocator
# uses again for the next chunk, which on a CPU it does up to 32 MiB.
SCORED_BYTES_CPU = 2**25
TRAINED_BYTES_CPU = 2**28
LOGIT_BYTES_GPU = 2**30


class Choices(NamedTuple):
    """What to tell of tokens: log-probabilities and, if asked for, entropies of what they were chosen from."""

    tokens: Tensor
    """[tokens] long, one for each hidden state that the head reads."""
    temperature: float = 1.0
    with_entropy: bool = False


class ChunkedHead(nn.Linear):
    """hidden -> vocabulary; where choices are given, it tells of them in place of logits."""

    choices: Choices | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, positions, hidden] -> logits [..., vocab]; with choices [1, tokens, hidden] -> [1, tokens, 1 or 2]"""
        # The last positions alone are a slice with gaps, for which torch would copy a frozen head once for each row.
        hidden = hidden.contiguous()
        if self.choices is None:
            return F.linear(hidden, self.weight, self.bias)
        return choice_numbers(hidden[0], self.weight, self.bias, self.choices)[None]

    @contextlib.contextmanager
    def given(self, choices: Choices) -> Iterator[None]:
        """Forwards in here tell of `choices`."""
        before, self.choices = self.choices, choices
        try:
            yield
        finally:
            self.choices = before


def let_chunk(model: Any) -> None:
    """Make the head of a Hugging Face causal LM take choices, if it is an ordinary one; its weights stay in place."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = ChunkedHead


def run_with_choices(model: Any, choices: Choices, **inputs: Any) -> Tensor:
    """[tokens, 1 or 2] as `choice_numbers`, by a forward of the whole model.

    Args:
        model: a causal LM that does nothing to the output of its head, its peft wrapper or its DeepSpeed engine.
        choices: about the positions whose logits the forward would return.
        inputs: of the forward, with one row.
    """
    # Within the forward, so that ZeRO-3 gathers the head's weight for it and for its backward pass.
    head = getattr(model, "module", model).get_output_embeddings()
    if not isinstance(head, ChunkedHead):  # such as one with an adapter, whose output is a sum
        return _from_logits(model(**inputs).logits[0], choices)
    with head.given(choices):
        return model(**inputs).logits[0]


def choice_numbers(hidden: Tensor, weight: Tensor, bias: Tensor | None, choices: Choices) -> Tensor:
    """Log-probability of each chosen token and, if asked for, entropy of the distribution that it was chosen from.

    Memory beyond the arguments and their gradients is one chunk of logits, with its gradient in training, and the
    gradient of `weight` in float32. Tokens whose gradient is 0 are not read in the backward pass, so that garbage in
    their states costs and changes nothing.

    Args:
        hidden: [tokens, hidden] states that the tokens were chosen in, any float type.
        weight: [vocab, hidden].
        bias: [vocab] or None.
        choices: of as many tokens.

    Returns: [tokens, 1 or 2] float32 (float64 for float64 states).
    """
    is_trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    step = _tokens_at_a_time(hidden, len(weight), is_trained)
    if is_trained and len(hidden) > step:
        return _ChunkedNumbers.apply(hidden, weight, bias, *choices, step)
    return _in_chunks(hidden, weight, bias, choices, step)


def _tokens_at_a_time(hidden: Tensor, vocab: int, is_trained: bool) -> int:
    limit_cpu = TRAINED_BYTES_CPU if is_trained else SCORED_BYTES_CPU
    return max(1, (LOGIT_BYTES_GPU if hidden.is_cuda else limit_cpu) // (vocab * hidden.element_size()))


def _in_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, choices: Choices, step: int) -> Tensor:
    parts = zip(hidden.split(step), choices.tokens.split(step), strict=True)
    return torch.cat([_from_logits(F.linear(h, weight, bias), choices._replace(tokens=t)) for h, t in parts])


def _from_logits(logits: Tensor, choices: Choices) -> Tensor:
    """[tokens, vocab] -> [tokens, 1 or 2]"""
    numbers = [choice_logprobs(logits, choices.tokens, choices.temperature)]
    if choices.with_entropy:
        numbers.append(choice_entropy(logits, choices.temperature))
    return torch.stack(numbers, dim=1)


class _ChunkedNumbers(torch.autograd.Function):
    """`choice_numbers`, `step` tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        with_entropy: bool,
        step: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, tokens)
        ctx.temperature, ctx.step = temperature, step
        return _in_chunks(hidden, weight, bias, Choices(tokens, temperature, with_entropy), step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens = ctx.saved_tensors
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight, of_bias = (
            # gradient: float32, however many chunks add to the sum
            torch.zeros_like(tensor, dtype=gradient.dtype) if needed else None
            for tensor, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        for chunk in (gradient != 0).any(dim=1).nonzero()[:, 0].split(ctx.step):
            states = hidden[chunk]
            of_logits = _logits_gradient(
                F.linear(states, weight, bias), tokens[chunk], ctx.temperature, gradient[chunk]
            )
            if of_hidden is not None:
                of_hidden[chunk] = of_logits @ weight
            if of_weight is not None:
                of_weight += of_logits.T @ states
            if of_bias is not None:
                of_bias += of_logits.sum(dim=0, dtype=of_bias.dtype)
            del of_logits  # makes room for the next chunk
        sums = ((of_weight, weight), (of_bias, bias))
        return of_hidden, *(found if found is None else found.to(like.dtype) for found, like in sums), *[None] * 4


def _logits_gradient(logits: Tensor, tokens: Tensor, temperature: float, gradient: Tensor) -> Tensor:
    """[tokens, vocab] from that of the numbers [tokens, 1 or 2]"""
    of_logits = logprobs_backward(logits[None], tokens[None], temperature, gradient[None, :, 0])
    if gradient.shape[1] == 2:
        of_logits += entropy_backward(logits[None], temperature, gradient[None, :, 1])
    return of_logits[0]
