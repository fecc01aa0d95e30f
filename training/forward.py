"""Run a model over a batch: the one place where models are called for scoring and training."""

from typing import Any

import torch
from torch import Tensor

from training.data import Batch
from training.head import Choices, run_with_choices
from training.logprobs import (
    choices,
    last_token_scores,
    token_entropy,
    token_logprobs,
    token_values,
)
from training.packing import PackedBatch, packs


def response_logprobs(
    model: Any, batch: Batch, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token of the responses.

    Args:
        model: a causal LM or its DeepSpeed engine.
        batch: [batch, time] ids and masks.
        temperature: divides the logits, as in sampling.
        with_entropy: also the entropy of the distribution that each token was drawn from.

    Returns: logprobs [batch, time] float32, 0 outside of the response; entropy likewise, or None.
    """
    if packs(model):
        packed = PackedBatch(batch.input_ids, batch.attention_mask)
        chosen, before = choices(batch.response_mask)
        asked = Choices(batch.input_ids.flatten()[chosen], temperature, with_entropy)
        inputs = packed.inputs | {"logits_to_keep": packed.number_of(before), "use_cache": False}
        numbers = run_with_choices(model, asked, **inputs)
        logprobs, *entropy = (packed.unpack(column, chosen) for column in numbers.unbind(1))
        return logprobs, entropy[0] if with_entropy else None
    columns = batch.response_mask.any(0)
    first = int(columns.int().argmax()) if columns.any() else columns.shape[0] - 1
    time = batch.input_ids.shape[1]
    # The logits of position t - 1 choose token t.
    kept = min(time, time - first + 1)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        logits_to_keep=kept,
        use_cache=False,
    ).logits
    logprobs = only_response(token_logprobs(logits, batch.input_ids, temperature), batch)
    return logprobs, only_response(token_entropy(logits, time, temperature), batch) if with_entropy else None


def only_response(values: Tensor, batch: Batch) -> Tensor:
    """[batch, time] values, 0 outside of the response."""
    return torch.where(batch.response_mask, values, 0.0)


def critic_values(model: Any, batch: Batch) -> Tensor:
    """[batch, time] float32: value of the state in which each token was chosen."""
    return token_values(model(batch.input_ids, batch.attention_mask.long()))


def reward_scores(model: Any, batch: Batch) -> Tensor:
    """[batch] float32: the reward model's score of each whole row, read at its last token."""
    return last_token_scores(model(batch.input_ids, batch.attention_mask.long()), batch.attention_mask)
