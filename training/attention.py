"""Attention within sequences that stand one after the other, without padding."""

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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Causal attention within each sequence.

        Args:
            query: [heads, tokens, head_dim].
            key, value: [kv_heads, tokens, head_dim].

        Returns: [tokens, heads, head_dim].
        """
        group = query.shape[0] // key.shape[0]
        mask = causal_mask(self.shape[1], rule.sliding_window, query.device)
        key, value = (self._laid_out(part).repeat_interleave(group, 1) for part in (key, value))
        attended = attention(self._laid_out(query), key, value, mask, rule)
        return attended.transpose(1, 2).flatten(0, 1).index_select(0, self.places)

    def _laid_out(self, x: Tensor) -> Tensor:
        """[heads, tokens, head_dim] -> [sequences, heads, longest, head_dim], 0 in padding."""
        rows = x.new_zeros(self.shape[0] * self.shape[1], x.shape[0], x.shape[2])
        return rows.index_copy(0, self.places, x.transpose(0, 1)).unflatten(0, self.shape).transpose(1, 2)


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


# On a CPU, up to so many tokens, torch's attention in 16 bits takes up to three times as long, forwards and backwards,
# as the products that it stands for. Forwards alone it is the faster one, but scorer and trainer must do the same.
SHORT_TOKENS = 192


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: AttentionRule) -> Tensor:
    """[batch, heads, queries, head_dim]; a mask is bool or additive, and without one it is causal."""
    in_16_bits = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    is_short = in_16_bits and query.shape[-2] == key.shape[-2] <= SHORT_TOKENS
    if rule.softcap is None and not is_short:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=rule.scaling)
    scale = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    products = (query @ key.transpose(-1, -2)).float().mul_(scale)
    if rule.softcap is not None:
        products = rule.softcap * torch.tanh(products / rule.softcap)
    if mask is None:
        mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask.dtype == torch.bool:
        mask = additive(mask, torch.float32)
    return (products + mask).softmax(-1).to(value.dtype) @ value


def configs_of(module: nn.Module) -> list[PretrainedConfig]:
    """Every configuration that a part of a Hugging Face module looks its attention up in."""
    configs = [getattr(part, "config", None) for part in module.modules()]
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())
