"""Attention within sequences that stand one after the other, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig


@dataclass(frozen=True)
class AttentionRule:
    """How a layer attends."""

    scaling: float | None = None
    """Of the products of queries and keys; None for 1 / sqrt(head_dim)."""
    sliding_window: int | None = None
    """How many tokens are seen, the own one included; None for all."""
    softcap: float | None = None
    """Bound of the scaled products, softcap * tanh(product / softcap); None for none."""


class SideBySide:
    """Sequences that stand one after the other in memory, for attention laid out next to each other."""

    def __init__(self, lengths: Tensor, device: torch.device | str) -> None:
        """`lengths` [sequences], on the CPU: tokens of each."""
        column = torch.arange(int(lengths.max()))
        self.shape = (len(lengths), len(column))
        # Where each token stands in [sequences x longest]. Padding is on the right: causal attention never looks there.
        self.places = (column < lengths[:, None]).flatten().nonzero()[:, 0].to(device)
        self._has_padding = len(self.places) < self.shape[0] * self.shape[1]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Causal attention within each sequence.

        Args:
            query: [heads, tokens, head_dim].
            key, value: [kv_heads, tokens, head_dim].

        Returns: [tokens, heads, head_dim].
        """
        return self.attend_laid_out(self.laid_out(query), self.laid_out(key), self.laid_out(value), rule)

    def attend_laid_out(
        self, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, mask: Tensor | None = None
    ) -> Tensor:
        """As `attend`, of what `laid_out` gives; where keys and values are more, with a mask as `attention` has it."""
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, 1) for part in (key, value))
        if mask is None:
            mask = causal_mask(self.shape[1], rule.sliding_window, query.device)
        in_16_bits = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
        is_short = in_16_bits and key.shape[2] <= SHORT_TOKENS
        attended = (by_products if is_short else attention)(query, key, value, mask, rule)
        return attended.transpose(1, 2).flatten(0, 1).index_select(0, self.places)

    def laid_out(self, x: Tensor) -> Tensor:
        """[heads, tokens, head_dim] -> [sequences, heads, longest, head_dim], 0 in padding."""
        if not self._has_padding:
            return x.unflatten(1, self.shape).transpose(0, 1)
        rows = x.new_zeros(self.shape[0] * self.shape[1], x.shape[0], x.shape[2])
        return rows.index_copy(0, self.places, x.transpose(0, 1)).unflatten(0, self.shape).transpose(1, 2)


class ByLength:
    """Sequences that stand one after the other by `length_classes`, those of a class laid out next to each other."""

    def __init__(self, lengths: Tensor, device: torch.device | str) -> None:
        """`lengths` [sequences], on the CPU: tokens of each."""
        alike = lengths.split(length_classes(lengths).unique_consecutive(return_counts=True)[1].tolist())
        self._sizes = [int(part.sum()) for part in alike]
        self._parts = [SideBySide(part, device) for part in alike]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """As `SideBySide.attend`."""
        queries, keys, values = (x.split(self._sizes, dim=1) for x in (query, key, value))
        parts = zip(self._parts, queries, keys, values, strict=True)
        return torch.cat([part.attend(q, k, v, rule) for part, q, k, v in parts])


def length_classes(lengths: Tensor) -> Tensor:
    """Which sequences are laid out next to each other: [sequences] long, the class of each.

    Next to a long sequence a short one costs as much: on a CPU, attention to 16 sequences of 8 to 256 tokens took three
    times as long as in classes up to 96, 192 and 384. None goes past `SHORT_TOKENS` from below, so that the length of a
    sequence alone says how its attention is computed.
    """
    return torch.bucketize(lengths, SHORT_TOKENS // 4 * 2 ** torch.arange(32))


class Branches:
    """What some sequences go on with, each in as many ways; all of it stands side by side."""

    def __init__(self, numbers: Tensor, ends: Tensor, lengths: Tensor, device: torch.device | str) -> None:
        """All on the CPU.

        Args:
            numbers: [sequences] which of all sequences branch.
            ends: [sequences] tokens of each of them.
            lengths: [sequences, branches] tokens of each branch.
        """
        self.sizes = lengths.shape
        self.own = SideBySide(lengths.flatten(), device)
        self._numbers = numbers.to(device)
        self._seen_before = int(ends.max())
        column, own = torch.arange(self._seen_before), torch.arange(self.own.shape[1])
        start = ends.repeat_interleave(lengths.shape[1])[:, None]
        behind_all = self._seen_before + len(own)  # the place of padding, which so is never seen
        before = torch.where(column < start, column, behind_all)
        self._positions = (start + own).to(device), torch.cat([before, start + own], dim=1).to(device)
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, keys: Tensor, values: Tensor
    ) -> Tensor:
        """As `SideBySide.attend`, with `keys` and `values` of all sequences as its `laid_out` gives them."""
        keys = torch.cat([self._for_each_branch(keys), self.own.laid_out(key)], dim=2)
        values = torch.cat([self._for_each_branch(values), self.own.laid_out(value)], dim=2)
        return self.own.attend_laid_out(self.own.laid_out(query), keys, values, rule, self._mask(rule.sliding_window))

    def _for_each_branch(self, x: Tensor) -> Tensor:
        # Expanded, not indexed: the gradients of branches add up in one sum, and always in the same order.
        shared = x.index_select(0, self._numbers)[:, None, :, : self._seen_before]
        return shared.expand(-1, self.sizes[1], -1, -1, -1).flatten(0, 1)

    def _mask(self, sliding_window: int | None) -> Tensor:
        """[branches, 1, queries, keys] bool, true where a token looks."""
        if sliding_window not in self._masks:  # the same for all layers
            queries, keys = self._positions[0][:, None, :, None], self._positions[1][:, None, None]
            seen = keys <= queries
            self._masks[sliding_window] = seen if sliding_window is None else seen & (keys > queries - sliding_window)
        return self._masks[sliding_window]


class Branching:
    """Sequences that stand one after the other, and behind all of them the branches that some go on in."""

    def __init__(self, lengths: Tensor, branches: Sequence[tuple[Tensor, Tensor]], device: torch.device | str) -> None:
        """All on the CPU.

        Args:
            lengths: [all sequences] tokens of each, up to where it branches.
            branches: which sequences branch [sequences], and tokens of their branches [sequences, branches]: one pair
                for all sequences with as many branches.
        """
        self._sequences = SideBySide(lengths, device)
        self._branches = [Branches(numbers, lengths[numbers], own, device) for numbers, own in branches]
        self._sizes = [int(lengths.sum()), *(int(own.sum()) for _, own in branches)]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """As `SideBySide.attend`; a branch also sees the sequence that it goes on from."""
        queries, keys, values = (part.split(self._sizes, dim=1) for part in (query, key, value))
        laid_query, laid_key, laid_value = (self._sequences.laid_out(part[0]) for part in (queries, keys, values))
        attended = [self._sequences.attend_laid_out(laid_query, laid_key, laid_value, rule)]
        for number, branches in enumerate(self._branches, start=1):
            attended.append(branches.attend(queries[number], keys[number], values[number], rule, laid_key, laid_value))
        return torch.cat(attended)


def causal_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[length, length] bool, true where a token (row) looks; None where every earlier token is seen."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < sliding_window)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a mask is true, else minus infinity: attention would make this of it at every layer."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


# On a CPU, up to so many tokens, torch's attention in 16 bits takes one and a half to three times as long, forwards and
# backwards, as the products that it stands for. Forwards alone it is faster, but scorer and trainer must do the same.
SHORT_TOKENS = 384


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: AttentionRule) -> Tensor:
    """[batch, heads, queries, head_dim]; a mask is bool or additive in their type, and without one it is causal."""
    if rule.softcap is not None:
        return by_products(query, key, value, mask, rule)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=rule.scaling)


def by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: AttentionRule) -> Tensor:
    """As `attention`, by its definition. The softmax sums in float32, whatever the type of what it gets."""
    scale = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask.dtype == torch.bool:
        mask = additive(mask, query.dtype)
    if rule.softcap is None:
        # Scaled and masked as they are made: on a CPU each pass over them would take as long.
        seen = mask.expand(*query.shape[:3], key.shape[2]).flatten(0, 1)
        products = torch.baddbmm(seen, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scale)
        products = products.unflatten(0, query.shape[:2])
    else:
        products = (query @ key.mT).float() * (scale / rule.softcap)
        products = rule.softcap * torch.tanh(products) + mask
    return products.softmax(-1).to(value.dtype) @ value


def configs_of(module: nn.Module) -> list[PretrainedConfig]:
    """Every configuration that a part of a Hugging Face module looks its attention up in."""
    configs = [getattr(part, "config", None) for part in module.modules()]
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())
