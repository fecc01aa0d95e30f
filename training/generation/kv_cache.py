"""Keys and values of the rows that are being decoded, and attention over them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.attention import AttentionRule, SideBySide, additive, attention


@dataclass(frozen=True)
class FlatTokens:
    """What the tokens of one forward are: [1, tokens] ids without any padding.

    First one token of each row that decodes, in the order of slots; then whole prompts, one after the other.
    """

    lengths: Tensor
    """[decoding] long: tokens of each decoding row that the cache holds already."""
    prompts: Sequence[tuple[int, Sequence[int]]] = ()
    """Tokens of each prompt, and the slots of the rows that begin with it."""

    @property
    def decoding(self) -> int:
        return self.lengths.shape[0]


class KvCache(ABC):
    """Memory for tokens, [places, kv_heads, head_dim] for each layer; its kinds say which place a token has."""

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values of each layer, made when the layer is first met."""
        self._tokens: FlatTokens | None = None

    @abstractmethod
    def admit(self, slot: int, prompt_tokens: int, limit: int, twin: int | None) -> bool:
        """Give a new row its memory; False, and nothing is done, if there is no room now.

        Args:
            slot: its number, behind all others.
            prompt_tokens, limit: tokens of its prompt, and those of its response at most.
            twin: slot of a row that is admitted with it and has the same prompt.
        """

    @abstractmethod
    def retire(self, slot: int, last: int, cached: Tensor) -> None:
        """Take back the memory of the row in `slot` and give the row in slot `last`, of `cached` tokens, that slot."""

    @abstractmethod
    def decoding_places(self, lengths: Tensor) -> Tensor:
        """[rows] long: where the next token of each row goes, given [rows] tokens that it has."""

    @abstractmethod
    def prompt_places(self, slot: int, positions: Tensor) -> Tensor:
        """[tokens] long, on the CPU: where a row's tokens at `positions` are."""

    @abstractmethod
    def shared_tokens(self, prompt_tokens: int) -> int:
        """How many first tokens of such a prompt are stored once for all rows that are admitted with it."""

    @abstractmethod
    def attend_rows(self, keys: Tensor, values: Tensor, query: Tensor, seen: Tensor, rule: AttentionRule) -> Tensor:
        """Attend from the newest token of each row, which is stored already.

        Args:
            keys, values: [places, kv_heads, head_dim], the layer's memory.
            query: [rows, heads, head_dim].
            seen: [rows] int32, tokens of each row, the newest one included.
            rule: how the layer attends.

        Returns: [rows, heads, head_dim].
        """

    def begin(self, tokens: FlatTokens) -> None:
        """Say what the next forward holds."""
        self._tokens = tokens
        # Where tokens go, and which ones go there; None for all in their order.
        self._places = self.decoding_places(tokens.lengths)
        self._stored: Tensor | None = None
        self._seen = (tokens.lengths + 1).int()
        self._masks: dict[int | None, Tensor] = {}
        if not tokens.prompts:
            return
        places, stored = [], []
        lengths = torch.tensor([length for length, _ in tokens.prompts])
        starts = lengths.cumsum(0) - lengths
        for start, (length, slots) in zip(starts.tolist(), tokens.prompts, strict=True):
            for slot in slots:
                positions = torch.arange(0 if slot == slots[0] else self.shared_tokens(length), length)
                places.append(self.prompt_places(slot, positions))
                stored.append(tokens.decoding + start + positions)
        device = tokens.lengths.device
        self._places = torch.cat([self._places, torch.cat(places).to(device)])
        self._stored = torch.cat([torch.arange(tokens.decoding), *stored]).to(device)
        self._prompts = SideBySide(lengths, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Store the new keys and values and attend from each token to its own row up to itself.

        Args:
            layer: its number.
            query: [heads, tokens, head_dim].
            key, value: [kv_heads, tokens, head_dim].
            rule: how the layer attends.

        Returns: [tokens, heads, head_dim].
        """
        assert self._tokens is not None, "begin() comes before the forward"
        if layer not in self.layers:
            # Zeros: attention gives what is behind a row's end no weight, and 0 * nan would be nan.
            self.layers[layer] = (
                key.new_zeros(self.num_places, key.shape[0], key.shape[2]),
                value.new_zeros(self.num_places, value.shape[0], value.shape[2]),
            )
        for memory, new in zip(self.layers[layer], (key, value), strict=True):
            new = new.transpose(0, 1)
            memory.index_copy_(0, self._places, new if self._stored is None else new[self._stored])
        count = self._tokens.decoding
        parts = []
        if count:
            rows = query[:, :count].transpose(0, 1)
            parts.append(self.attend_rows(*self.layers[layer], rows, self._seen, rule))
        if self._tokens.prompts:
            parts.append(self._prompts.attend(query[:, count:], key[:, count:], value[:, count:], rule))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def attend_laid_out(self, keys: Tensor, values: Tensor, query: Tensor, seen: Tensor, rule: AttentionRule) -> Tensor:
        """As `attend_rows`, where rows lie side by side: keys and values are [rows, width, kv_heads, head_dim]."""
        if rule.sliding_window not in self._masks:  # the same for all layers
            mask = row_mask(seen, keys.shape[1], rule.sliding_window)
            self._masks[rule.sliding_window] = additive(mask, query.dtype)[:, None, None]
        # Heads that share keys stand where several queries of one head would: nothing is repeated.
        grouped = query.reshape(query.shape[0], keys.shape[2], -1, query.shape[2])
        mask = self._masks[rule.sliding_window]
        return attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), mask, rule).reshape(query.shape)

    @property
    @abstractmethod
    def peak_share(self) -> float:
        """The largest part of the memory that was in use at one time."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(memory.nbytes for pair in self.layers.values() for memory in pair)


class SlotCache(KvCache):
    """Rows in memory of equal size, those in use the first ones: attention reads slices of it and copies nothing."""

    def __init__(self, slots: int, capacity: int) -> None:
        """
        Args:
            slots: rows that it has room for.
            capacity: tokens that a row has room for.
        """
        super().__init__(slots * capacity)
        self.slots, self.capacity = slots, capacity
        self._most_used = 0

    @property
    def peak_share(self) -> float:
        return self._most_used / self.slots

    def admit(self, slot: int, prompt_tokens: int, limit: int, twin: int | None) -> bool:
        self._most_used = max(self._most_used, min(slot + 1, self.slots))
        return slot < self.slots

    def retire(self, slot: int, last: int, cached: Tensor) -> None:
        if slot == last:
            return
        length = int(cached)
        for memory in (memory for pair in self.layers.values() for memory in pair):
            rows = memory.unflatten(0, (self.slots, self.capacity))
            rows[slot, :length] = rows[last, :length]

    def decoding_places(self, lengths: Tensor) -> Tensor:
        return torch.arange(lengths.shape[0], device=lengths.device) * self.capacity + lengths

    def prompt_places(self, slot: int, positions: Tensor) -> Tensor:
        return slot * self.capacity + positions

    def shared_tokens(self, prompt_tokens: int) -> int:
        return 0

    def attend_rows(self, keys: Tensor, values: Tensor, query: Tensor, seen: Tensor, rule: AttentionRule) -> Tensor:
        longest = int(seen.max())
        seen_keys, seen_values = (
            memory.unflatten(0, (self.slots, self.capacity))[: len(seen), :longest] for memory in (keys, values)
        )
        return self.attend_laid_out(seen_keys, seen_values, query, seen, rule)


def row_mask(seen: Tensor, width: int, sliding_window: int | None) -> Tensor:
    """[rows, width] bool: where the newest token of each row looks, given [rows] tokens with the newest one."""
    position = torch.arange(width, device=seen.device)
    mask = position < seen[:, None]
    if sliding_window is not None:
        mask &= position >= seen[:, None] - sliding_window
    return mask
