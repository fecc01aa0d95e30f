"""Keys and values of the rows that are being decoded, one slot a row, and attention over them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FlatTokens:
    """What the tokens of one forward are: [1, tokens] ids without any padding.

    First one token of each row that decodes, in the order of slots; then whole prompts, one after the other.
    """

    lengths: Tensor
    """[decoding] long: tokens of each decoding row that the cache holds already."""
    prompts: Sequence[tuple[slice, Sequence[int]]] = ()
    """Where each prompt stands among the tokens, and the slots that it is to be written to."""

    @property
    def decoding(self) -> int:
        return self.lengths.shape[0]


@dataclass
class SlotCache:
    """A cache whose rows in use are its first ones, so that attention reads slices of it and copies nothing."""

    slots: int
    """Rows that it has room for."""
    capacity: int
    """Tokens that a row has room for."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """[slots, capacity, kv_heads, head_dim] for each layer, made when the layer is first met."""
    values: dict[int, Tensor] = field(default_factory=dict)
    _tokens: FlatTokens | None = None
    _places: Tensor | None = None
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def begin(self, tokens: FlatTokens) -> None:
        """Say what the next forward holds."""
        self._tokens = tokens
        # Where the new tokens go, in a layer's memory seen as [slots x capacity, kv_heads, head_dim].
        self._places = torch.arange(tokens.decoding, device=tokens.lengths.device) * self.capacity + tokens.lengths
        self._masks = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store the new keys and values and attend from each token to its own row up to itself.

        Args:
            layer: its number.
            query: [heads, tokens, head_dim].
            key, value: [kv_heads, tokens, head_dim].
            scaling: of the products of queries and keys; None for 1 / sqrt(head_dim).
            sliding_window: how many tokens are seen, the own one included; None for all.
            softcap: bound of the scaled products, softcap * tanh(product / softcap); None for none.

        Returns: [tokens, heads, head_dim].
        """
        assert self._tokens is not None and self._places is not None, "begin() comes before the forward"
        if layer not in self.keys:
            # Zeros: attention gives what is behind a row's end no weight, and 0 * nan would be nan.
            self.keys[layer] = key.new_zeros(self.slots, self.capacity, key.shape[0], key.shape[2])
            self.values[layer] = value.new_zeros(self.slots, self.capacity, value.shape[0], value.shape[2])
        keys, values = self.keys[layer], self.values[layer]
        parts = []
        count = self._tokens.decoding
        if count:
            keys.flatten(0, 1).index_copy_(0, self._places, key[:, :count].transpose(0, 1))
            values.flatten(0, 1).index_copy_(0, self._places, value[:, :count].transpose(0, 1))
            mask = self._decoding_mask(sliding_window)
            seen = mask.shape[-1]
            # Heads that share keys stand where several queries of one head would: nothing is repeated.
            grouped = query[:, :count].transpose(0, 1).reshape(count, key.shape[0], -1, query.shape[2])
            seen_keys, seen_values = keys[:count, :seen].transpose(1, 2), values[:count, :seen].transpose(1, 2)
            attended = _attention(grouped, seen_keys, seen_values, mask, scaling, softcap)
            parts.append(attended.reshape(count, query.shape[0], -1))
        for where, slots in self._tokens.prompts:
            length = where.stop - where.start
            own_key, own_value = key[:, where], value[:, where]
            for slot in slots:
                keys[slot, :length] = own_key.transpose(0, 1)
                values[slot, :length] = own_value.transpose(0, 1)
            group = query.shape[0] // key.shape[0]
            attended = _attention(
                query[None, :, where],
                own_key[None].repeat_interleave(group, dim=1),
                own_value[None].repeat_interleave(group, dim=1),
                causal_mask(length, sliding_window, query.device),
                scaling,
                softcap,
            )
            parts.append(attended[0].transpose(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first `length` tokens into another slot."""
        for layer in (*self.keys.values(), *self.values.values()):
            layer[target, :length] = layer[source, :length]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(layer.numel() * layer.element_size() for layer in (*self.keys.values(), *self.values.values()))

    def _decoding_mask(self, sliding_window: int | None) -> Tensor:
        """[decoding, 1, 1, longest] bool, true where a row's new token looks; made once for all layers."""
        if sliding_window not in self._masks:
            assert self._tokens is not None
            last = self._tokens.lengths[:, None]
            position = torch.arange(int(last.max()) + 1, device=last.device)
            mask = position <= last
            if sliding_window is not None:
                mask &= position > last - sliding_window
            self._masks[sliding_window] = mask[:, None, None]
        return self._masks[sliding_window]


def causal_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[length, length] bool, true where a token (row) looks; None where every earlier token is seen."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < sliding_window)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """[batch, heads, queries, head_dim]; without a mask it is causal."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    products = softcap * torch.tanh((query @ key.transpose(-1, -2)).float() * scale / softcap)
    if mask is None:
        mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=query.device).tril()
    return products.masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype) @ value
