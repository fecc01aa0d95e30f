"""Forwards over the real tokens of a padded batch: the interface stays [batch, time], and padding costs nothing."""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from training.attention import AttentionRule, SideBySide, configs_of

NAME = "sdpa_packed"
# Architectures that hand what a call brings along down to their attention; tests compare each with its padded forward.
ARCHITECTURES = {"gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"}


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
        self._numbers = real.flatten().cumsum(0) - 1
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
        """[tokens] long: which of the packed tokens stand at `places` [tokens] of the flat batch."""
        return self._numbers[places]


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
    return packed_batch.sequences.attend(query[0], key[0], value[0], rule)[None], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
