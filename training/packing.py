"""Forwards over the real tokens of a padded batch: the interface stays [batch, time], and padding costs nothing."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from training.attention import AttentionRule, Branching, ByLength, SideBySide, configs_of, length_classes

NAME = "sdpa_packed"
# Architectures that hand what a call brings along down to their attention; tests compare each with its padded forward.
ARCHITECTURES = {"gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"}

# Fewer tokens than these are computed for each row: 4 saved no time in a small model, 16 a fifth of it for 2 rows.
SHARED_TOKENS = 16


class PackedBatch:
    """The real tokens of a padded batch, and the way back.

    What consecutive rows begin with alike, such as the prompt of several samples, is there once.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """
        Args:
            input_ids: [batch, time], padded on the right.
            attention_mask: [batch, time] bool or long, true on real tokens; one at least in each row.
        """
        real = attention_mask.bool()
        self.shape = input_ids.shape
        self.places = real.flatten().nonzero()[:, 0]
        lengths, groups = _lengths_and_groups(input_ids, real)
        # On a GPU each class would be kernels of its own.
        classes = length_classes(lengths) if input_ids.device.type == "cpu" else torch.zeros_like(lengths)
        self.sequences: SideBySide | ByLength | Branching
        if groups:
            own, self._numbers = (x.to(input_ids.device) for x in _numbered_once(self.shape, lengths, groups))
            self.sequences = _branching(lengths, groups, input_ids.device)
        elif classes.min() < classes.max():
            order = classes.argsort(stable=True)
            row, column = real[order].nonzero().unbind(1)
            own = order[row] * self.shape[1] + column
            self._numbers = own.new_zeros(real.numel()).index_copy(0, own, torch.arange(len(own)))
            self.sequences = ByLength(lengths[order], input_ids.device)
        else:
            own, self._numbers = self.places, real.flatten().cumsum(0) - 1
            self.sequences = SideBySide(lengths, input_ids.device)
        self.inputs: dict[str, Any] = {
            "input_ids": input_ids.flatten()[own][None],
            "position_ids": (real.cumsum(1) - 1).flatten()[own][None],
            # Transformers takes a mask of 4 dimensions as it is, and makes none.
            "attention_mask": real.new_zeros(1, 1, 1, 1),
            "packed_batch": self,
        }

    def unpack(self, values: Tensor, places: Tensor | None = None) -> Tensor:
        """Numbers -> [batch, time], 0 elsewhere.

        Args:
            values: [places], or [packed tokens] without `places`.
            places: [places] in the flat batch, each once; None for all real tokens.
        """
        if places is None:
            places, values = self.places, values.index_select(0, self.number_of(self.places))
        return values.new_zeros(self.shape.numel()).index_copy(0, places, values).view(self.shape)

    def number_of(self, places: Tensor) -> Tensor:
        """[places] long: which of the packed tokens stand at `places` [places] of the flat batch."""
        return self._numbers[places]


def repeated_tokens(input_ids: Tensor, attention_mask: Tensor) -> list[int]:
    """How many first tokens of rows, of each such row, a packed batch does not compute: an earlier row has them."""
    _, groups = _lengths_and_groups(input_ids, attention_mask.bool())
    return [shared for rows, shared in groups for _ in rows[1:]]


class Group(NamedTuple):
    """Consecutive rows that begin alike."""

    rows: range
    shared: int
    """How many first tokens are computed once."""


def groups_of(common: Sequence[int]) -> list[Group]:
    """Those that leave the fewest tokens to compute; those of few rows first.

    Args:
        common: how many first tokens each row but the first has in common with the row before it.
    """
    best: list[tuple[int, list[Group]]] = [(0, [])]  # tokens saved in so many first rows, and by what
    for end in range(1, len(common) + 2):
        saved, groups = best[-1]
        shared = max(common, default=0)
        for start in range(end - 2, -1, -1):
            shared = min(shared, common[start])
            if shared < SHARED_TOKENS:
                break
            together = best[start][0] + (end - start - 1) * shared
            if together > saved:
                saved, groups = together, [*best[start][1], Group(range(start, end), shared)]
        best.append((saved, groups))
    return sorted(best[-1][1], key=lambda group: len(group.rows))


def _lengths_and_groups(input_ids: Tensor, real: Tensor) -> tuple[Tensor, list[Group]]:
    """Tokens of each row [batch], on the CPU, and which rows begin alike."""
    alike = (input_ids[1:] == input_ids[:-1]) & real[1:] & real[:-1]
    counts = torch.cat([real.sum(1), alike.cumprod(1).sum(1)]).cpu()
    return counts[: len(real)], groups_of(counts[len(real) :].tolist())


def _numbered_once(shape: torch.Size, lengths: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """In the order of `_branching`: places [tokens] of what is computed, and which of it stands at [batch x time]."""
    row, column = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    first, shared = row.clone(), torch.zeros_like(row)
    for rows, tokens in groups:
        first[rows], shared[rows] = rows.start, tokens
    ends = torch.where(shared > 0, shared, lengths[:, None])
    sequences = ((first == row) & (column < ends)).flatten().nonzero()[:, 0]
    order = torch.cat([row[rows, 0] for rows, _ in groups])
    branch, place = ((column >= shared) & (column < lengths[:, None]))[order].nonzero().unbind(1)
    places = torch.cat([sequences, order[branch] * shape[1] + place])
    numbers = torch.zeros(shape.numel(), dtype=torch.long).index_copy(0, places, torch.arange(len(places)))
    source = torch.where(column < shared, first, row) * shape[1] + column
    return places, numbers[source.flatten()]


def _branching(lengths: Tensor, groups: Sequence[Group], device: torch.device) -> Branching:
    """Rows that share nothing and what others share, by row; then what is left of those, group by group."""
    ends, is_sequence = lengths.clone(), torch.ones_like(lengths)
    for rows, shared in groups:
        ends[rows.start] = shared
        is_sequence[rows[1:]] = 0
    numbers = is_sequence.cumsum(0) - 1
    branches = []
    for _, alike in itertools.groupby(groups, key=lambda group: len(group.rows)):
        members = list(alike)
        first = torch.tensor([rows.start for rows, _ in members])
        own = torch.stack([lengths[rows] - shared for rows, shared in members])
        branches.append((numbers[first], own))
    return Branching(ends[is_sequence.bool()], branches, device)


def let_pack(model: PreTrainedModel) -> None:
    """Make the attention of `model`, if it is torch's and of a known architecture, take packed batches as well."""
    if model.config.model_type not in ARCHITECTURES or model.config._attn_implementation != "sdpa":
        return
    for config in configs_of(model):
        config._attn_implementation = NAME


def packs(model: Any) -> bool:
    """Whether a model, its peft wrapper or its engine takes packed batches."""
    config = getattr(getattr(model, "module", model), "config", None)
    return getattr(config, "_attn_implementation", None) == NAME


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_batch: PackedBatch | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it. What is packed travels with the call, so that a checkpointed layer finds it again."""
    if packed_batch is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rule = AttentionRule(options.get("scaling"), options.get("sliding_window"), options.get("softcap"))
    return _attend_within(packed_batch, query, key, value, rule), None


@torch.compiler.disable  # each batch would be a reason to compile anew
def _attend_within(packed_batch: PackedBatch, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    return packed_batch.sequences.attend(query[0], key[0], value[0], rule)[None]


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
