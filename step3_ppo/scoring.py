"""What models say of a batch, each row read on one rank; and the score of a response from a reward model."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from step3_ppo.config import PpoConfig
from training import distributed
from training.accounting import Accounting
from training.data import Batch, collate, share_out
from training.examples import PromptExample
from training.forward import reward_scores
from training.generation.interface import Completion
from training.packing import SHARED_TOKENS, repeated_tokens
from training.supervision import alive


class OwnRows:
    """The rows of a batch that this rank's models read, and which of them together."""

    def __init__(self, batch: Batch, config: PpoConfig) -> None:
        """Every rank must give the same batch, and has as many forwards as the others."""
        self.batch = batch
        sizes = batch.sizes
        together = [[row] for row in range(len(batch))]
        if config.micro_batch_tokens is not None:
            even_share = -(-sum(tokens for tokens, _ in sizes) // distributed.world_size())
            most_tokens = min(config.micro_batch_tokens, even_share)
            together = samples_together(batch, most_tokens)
        lengths = [sum(sizes[row][0] for row in rows) for rows in together]
        shares = share_out(lengths, distributed.world_size(), config.micro_batch_size, config.micro_batch_tokens)
        own = [sorted(row for number in part for row in together[number]) for part in shares[distributed.rank()]]
        # In the order of the batch, in which samples of one prompt are neighbours: packed rows then share it. A rank
        # without rows runs along with some, because its weights may be needed; what it finds is left out.
        parts = [(rows or [0], bool(rows)) for rows in own]
        self.counts = [is_counted for _, is_counted in parts]
        self.rows = [torch.tensor(part, dtype=torch.long, device=batch.input_ids.device) for part, _ in parts]
        self.micro_batches = [batch.rows(rows) for rows in self.rows]
        self.sizes = [[sizes[row] for row in part] for part, _ in parts]
        """Tokens and response tokens of each row of each micro-batch."""

    @cached_property
    def repeated(self) -> list[list[int]]:
        """Tokens of each micro-batch that packing computes once for several rows; asked for by the accounts alone."""
        return [repeated_tokens(b.input_ids, b.attention_mask) for b in self.micro_batches]

    def run(self, forward: Callable[[Batch], Tensor]) -> Tensor:
        """What `forward` says of all rows, each computed on one rank. Every rank must call this.

        Args:
            forward: Batch of some rows -> [rows] or [rows, time].

        Returns: [batch] or [batch, time], 0 in padding.
        """
        found = []
        with torch.no_grad():
            for micro_batch in self.micro_batches:
                found.append(forward(micro_batch))
                alive()
        result = found[0].new_zeros(self.batch.input_ids.shape[: found[0].dim()])
        for rows, values, is_counted in zip(self.rows, found, self.counts, strict=True):
            if is_counted:
                columns = () if values.dim() == 1 else (slice(values.shape[1]),)
                result[rows, *columns] = values
        return distributed.sum_over_ranks(result)

    def count_passes(self, accounting: Accounting, phase: str, model: Any, **kind: bool) -> None:
        """Tell `accounting` of a forward of `model` over these rows; `kind` as `Accounting.add_pass` has it."""
        for micro_batch, sizes, repeated in zip(self.micro_batches, self.sizes, self.repeated, strict=True):
            tokens, logits = (list(column) for column in zip(*sizes, strict=True))
            accounting.add_pass(phase, model, micro_batch.input_ids, tokens, sum(logits), repeated=repeated, **kind)


def samples_together(batch: Batch, most_tokens: int) -> list[list[int]]:
    """All rows, in order, in parts: samples of one prompt, which packing computes once, as far as `most_tokens` go.

    Nothing else that rows begin with alike keeps them together, or a system prompt would make one part of all.
    """
    ids, prompt = batch.input_ids, batch.attention_mask & ~batch.response_mask
    alike = (prompt[1:] == prompt[:-1]) & ((ids[1:] == ids[:-1]) | ~prompt[1:])
    goes_on = alike.all(1) & (prompt[1:].sum(1) >= SHARED_TOKENS)
    parts: list[list[int]] = []
    tokens = 0
    for row, (length, same_prompt) in enumerate(zip(batch.lengths, [False, *goes_on.tolist()], strict=True)):
        if not same_prompt or tokens + length > most_tokens:
            parts.append([])
            tokens = 0
        parts[-1].append(row)
        tokens += length
    return parts


Scorer = Callable[[OwnRows, Sequence[PromptExample], Sequence[Completion]], Tensor]
"""(rows, and their prompts and completions) -> [batch] scores; every rank must call it."""


def model_scorer(engine: Any) -> Scorer:
    """Scores from a reward model that reads the actor's token ids."""

    def score(own: OwnRows, prompts: Sequence[PromptExample], completions: Sequence[Completion]) -> Tensor:
        return own.run(partial(reward_scores, engine))

    return score


def retokenizing_scorer(
    engine: Any,
    config: PpoConfig,
    actor_tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase,
) -> Scorer:
    """Scores from a reward model with another tokenizer: each text is decoded and tokenized again."""

    def score(own: OwnRows, prompts: Sequence[PromptExample], completions: Sequence[Completion]) -> Tensor:
        rows = []
        responses = texts(actor_tokenizer, completions)
        for prompt, response, completion in zip(prompts, responses, completions, strict=True):
            ids = reward_tokenizer(prompt.text + response)["input_ids"]
            if completion.finished:  # a response that the limit has cut must not look like one that ended
                ids = [*ids, reward_tokenizer.eos_token_id]
            rows.append((ids, [True] * len(ids)))
        batch = collate(rows, pad_id=reward_tokenizer.pad_token_id).to(own.batch.input_ids.device)
        return OwnRows(batch, config).run(partial(reward_scores, engine))

    return score


def texts(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion]) -> list[str]:
    """Responses as text, without special tokens."""
    return tokenizer.batch_decode([completion.response_ids for completion in completions], skip_special_tokens=True)
