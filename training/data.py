"""Batches of token ids: padding, and each rank's share of a fixed order."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.examples import PreferenceDataset, PreferenceRows, Row, TokenizedDataset


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences: input_ids [batch, time] long, attention_mask and response_mask [batch, time] bool."""

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row that are not padding."""
        return self.attention_mask.sum(1).tolist()

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Tokens and response tokens of each row."""
        counts = torch.stack([self.attention_mask.sum(1), self.response_mask.sum(1)], dim=1)
        return [(tokens, response) for tokens, response in counts.tolist()]

    @property
    def num_response_tokens(self) -> int:
        """How many tokens `response_mask` selects."""
        return int(self.response_mask.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    def rows(self, index: Tensor) -> "Batch":
        """The rows of `index` [rows] long, without the columns that are padding in all of them."""
        attention_mask = self.attention_mask[index]
        time = int(attention_mask.sum(1).max())
        return Batch(self.input_ids[index, :time], attention_mask[:, :time], self.response_mask[index, :time])

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.response_mask.to(device))

    def as_filler(self) -> "Batch":
        """The same sequences, none of whose tokens count."""
        return replace(self, response_mask=torch.zeros_like(self.response_mask))


@dataclass(frozen=True)
class PairBatch:
    """Responses to compare. The rows of one preference are consecutive, best first.

    better, worse: [pairs] long, rows of `batch`. weights: [pairs] float; those of one preference add up to 1.
    margins: [pairs] float, how much better at least.
    """

    batch: Batch
    better: Tensor
    worse: Tensor
    weights: Tensor
    margins: Tensor

    def __len__(self) -> int:
        return self.better.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.batch.num_tokens

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same pairs on another device."""
        pairs = (tensor.to(device) for tensor in (self.better, self.worse, self.weights, self.margins))
        return PairBatch(self.batch.to(device), *pairs)

    def as_filler(self) -> "PairBatch":
        """The same pairs, none of which counts."""
        return replace(self, batch=self.batch.as_filler(), weights=torch.zeros_like(self.weights))


def collate(rows: Sequence[Row], pad_id: int, pad_to_multiple: int = 8) -> Batch:
    """Pad rows on the right to one length, a multiple of `pad_to_multiple`. Masks go by position, never by id."""
    time = max(len(np.asarray(ids)) for ids, _ in rows)
    time = -(-time // pad_to_multiple) * pad_to_multiple
    input_ids = torch.full((len(rows), time), pad_id, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), time, dtype=torch.bool)
    response_mask = torch.zeros(len(rows), time, dtype=torch.bool)
    for row, (ids, mask) in enumerate(rows):
        length = len(np.asarray(ids))
        input_ids[row, :length] = torch.from_numpy(np.asarray(ids, np.int64))
        attention_mask[row, :length] = True
        response_mask[row, :length] = torch.from_numpy(np.asarray(mask, np.bool_))
    return Batch(input_ids, attention_mask, response_mask)


def collate_pairs(items: Sequence[PreferenceRows], pad_id: int, pad_to_multiple: int = 8) -> PairBatch:
    """Put all responses in one batch and compare each with all worse ones to the same prompt.

    The k (k - 1) / 2 pairs of a ranking share a weight of 1                  (Ouyang et al. 2022, eq. 1)
    """
    rows: list[Row] = []
    pairs: list[tuple[int, int, float, float]] = []
    for item in items:
        ranked = range(len(rows), len(rows) + len(item.rows))
        compared = list(combinations(ranked, 2))
        pairs += [(better, worse, 1 / len(compared), item.margin) for better, worse in compared]
        rows += item.rows
    better, worse, weights, margins = zip(*pairs, strict=True)
    return PairBatch(
        batch=collate(rows, pad_id, pad_to_multiple),
        better=torch.tensor(better),
        worse=torch.tensor(worse),
        weights=torch.tensor(weights),
        margins=torch.tensor(margins),
    )


def num_steps(num_examples: int, train_batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps that show every example `epochs` times; the last one is filled up from the next epoch."""
    steps = max(1, math.ceil(num_examples * epochs / train_batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def sample_index(position: int, size: int, seed: int) -> int:
    """The example at a position of the endless training order, in which every epoch is a new permutation.

    Being a function of the position alone, it needs no state to resume and does not depend on the number of ranks.
    """
    epoch, place = divmod(position, size)
    return int(_epoch_order(epoch, size, seed)[place])


@lru_cache(maxsize=4)
def _epoch_order(epoch: int, size: int, seed: int) -> NDArray[np.int64]:
    # Sorted raw bits, not Generator.permutation: only the raw stream stays the same between versions of numpy.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(size), kind="stable")


BatchType = TypeVar("BatchType", Batch, PairBatch)


def train_batches(
    dataset: TokenizedDataset | PreferenceDataset,
    collate_fn: Callable[[list[Any]], BatchType],
    *,
    train_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    micro_batch_tokens: int | None = None,
) -> Iterator[list[BatchType]]:
    """Yield this rank's micro-batches for each of the steps `start_step` to `num_steps` - 1.

    Step s takes the positions s * train_batch_size onwards of the training order. Their micro-batches are those of
    `share_out`: more ranks share out the same rows.
    """
    for step in range(start_step, num_steps):
        positions = range(step * train_batch_size, (step + 1) * train_batch_size)
        items = [dataset[sample_index(position, len(dataset), seed)] for position in positions]
        shares = share_out([num_tokens(item) for item in items], world_size, micro_batch_size, micro_batch_tokens)
        yield [collate_fn([items[row] for row in part]) for part in shares[rank]]


def eval_batches(
    dataset: TokenizedDataset | PreferenceDataset,
    collate_fn: Callable[[list[Any]], BatchType],
    *,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    micro_batch_tokens: int | None = None,
) -> Iterator[BatchType]:
    """Yield this rank's part of the data: each item once over all ranks, equally many batches on each.

    Ranks that run out yield filler, a batch in which nothing counts, because a collective needs every rank.
    """
    lengths = [num_tokens(dataset[index]) for index in range(len(dataset))]
    for part in share_out(lengths, world_size, micro_batch_size, micro_batch_tokens)[rank]:
        yield collate_fn([dataset[index] for index in part]) if part else collate_fn([dataset[0]]).as_filler()


def share_out(
    lengths: Sequence[int], world_size: int, micro_batch_size: int, micro_batch_tokens: int | None = None
) -> list[list[list[int]]]:
    """Which rows each rank computes together: [rank][micro-batch], row numbers.

    Every row is computed once, and every rank has equally many micro-batches, of which the last may be empty where the
    rows do not suffice. All ranks get the same answer without asking each other.

    Args:
        lengths: tokens of each row.
        micro_batch_size: rows of a micro-batch, which are then consecutive, if there is no budget of tokens.
        micro_batch_tokens: most tokens of a micro-batch: as few micro-batches as that allows, each of rows of like
            length, all of about as many tokens. A row that is longer stands alone.
    """
    rows = len(lengths)
    if micro_batch_tokens is None:
        parts = [list(range(start, min(start + micro_batch_size, rows))) for start in range(0, rows, micro_batch_size)]
        per_rank = -(-len(parts) // world_size)
        parts += [[] for _ in range(per_rank * world_size - len(parts))]
        return [parts[rank * per_rank : (rank + 1) * per_rank] for rank in range(world_size)]
    longest_first = sorted(range(rows), key=lambda row: -lengths[row])
    per_rank = max(1, -(-sum(lengths) // (micro_batch_tokens * world_size)))
    parts = _even_parts(longest_first, lengths, per_rank * world_size)
    while any(len(part) > 1 and sum(lengths[row] for row in part) > micro_batch_tokens for part in parts):
        per_rank += 1
        parts = _even_parts(longest_first, lengths, per_rank * world_size)
    shares: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for part in sorted(parts, key=lambda part: -sum(lengths[row] for row in part)):
        lightest = min((rank for rank in range(world_size) if len(shares[rank]) < per_rank), key=loads.__getitem__)
        shares[lightest].append(part)
        loads[lightest] += sum(lengths[row] for row in part)
    return [share + [[] for _ in range(per_rank - len(share))] for share in shares]


def num_tokens(item: Row | PreferenceRows) -> int:
    """Tokens of a row, or of all rows that are compared."""
    rows = item.rows if isinstance(item, PreferenceRows) else [item]
    return sum(len(np.asarray(ids)) for ids, _ in rows)


def _even_parts(rows: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`rows`, in their order, in `count` parts of about as many tokens; one part for each row if they are fewer."""
    parts: list[list[int]] = []
    left, tokens_left = list(rows), sum(lengths[row] for row in rows)
    for parts_left in range(min(count, len(rows)), 0, -1):
        taken, tokens = 0, 0
        # Every part takes a row at least and leaves as many for those to come.
        while taken == 0 or len(left) - taken > parts_left - 1:
            if taken and parts_left > 1 and tokens + lengths[left[taken]] / 2 > tokens_left / parts_left:
                break
            tokens += lengths[left[taken]]
            taken += 1
        parts.append(left[:taken])
        left, tokens_left = left[taken:], tokens_left - tokens
    return parts
