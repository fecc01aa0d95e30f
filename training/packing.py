"""Forwards over the real tokens of a padded batch: the interface stays [batch, time], and padding costs nothing."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_packed"
# Architectures that hand what a call brings along down to their attention; tests compare each with its padded forward.
ARCHITECTURES = {"gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"}


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


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: AttentionRule) -> Tensor:
    """[batch, heads, queries, head_dim]; a mask is bool or additive, and without one it is causal."""
    if rule.softcap is None:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=rule.scaling)
    scale = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    products = rule.softcap * torch.tanh((query @ key.transpose(-1, -2)).float() * scale / rule.softcap)
    if mask is None:
        mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask.dtype == torch.bool:
        mask = additive(mask, torch.float32)
    return (products + mask).softmax(-1).to(value.dtype) @ value


class PackedBatch:
    """The real tokens of a padded batch, and the way back."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """
        Args:
            input_ids: [batch, time], padded on the right.
            attention_mask: [batch, time] bool or long, true on real tokens; one at least in each row.
        """
        real = attention_mask.bool()
        self.shape = input_ids.shape
        self.places = real.flatten().nonzero()[:, 0]
        self.sequences = SideBySide(real.sum(1).cpu(), input_ids.device)
        self.inputs: dict[str, Any] = {
            "input_ids": input_ids.flatten()[self.places][None],
            "position_ids": (real.cumsum(1) - 1).flatten()[self.places][None],
            # Transformers takes a mask of 4 dimensions as it is, and makes none.
            "attention_mask": real.new_zeros(1, 1, 1, 1),
            "packed_batch": self,
        }

    def unpack(self, values: Tensor, places: Tensor | None = None) -> Tensor:
        """[tokens] numbers -> [batch, time], 0 elsewhere; `places` [tokens] in the flat batch, None for all tokens."""
        places = self.places if places is None else places
        return values.new_zeros(self.shape.numel()).index_copy(0, places, values).view(self.shape)

    def number_of(self, places: Tensor) -> Tensor:
        """Which of the packed tokens stand at these places of the flat batch."""
        numbers = torch.zeros(self.shape.numel(), dtype=torch.long, device=places.device)
        numbers[self.places] = torch.arange(len(self.places), device=places.device)
        return numbers[places]


def let_pack(model: PreTrainedModel) -> None:
    """Make the attention of `model`, if it is torch's and of a known architecture, take packed batches as well."""
    if model.config.model_type not in ARCHITECTURES or model.config._attn_implementation != "sdpa":
        return
    for part in model.modules():
        config = getattr(part, "config", None)
        if isinstance(config, PretrainedConfig):
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
    return packed_batch.sequences.attend(query[0], key[0], value[0], rule)[None], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
