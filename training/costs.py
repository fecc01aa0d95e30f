"""What a decoder must compute, counted from its own weights and from true lengths: no padding, nothing done twice."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class DecoderShape:
    """What decides the cost of a token: a matrix of n numbers costs it 2 n FLOPs; lookups and norms cost nothing."""

    body: int
    """Numbers in the matrices that a token passes in the layers, adapters apart."""
    head: int
    """Numbers in the matrix that makes logits; 0 for a scalar model."""
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    """For each layer that attends: how many tokens a token sees, itself included; None for all before it."""
    adapters: int = 0
    """Numbers in LoRA's matrices."""
    trained: int = 0
    """Numbers of body and adapters that learn."""
    trained_head: int = 0
    """Numbers of the head that learn."""
    trained_parameters: int = 0
    """All numbers of the model that learn, embeddings and norms included."""

    @classmethod
    def of(cls, model: nn.Module) -> "DecoderShape":
        """Counted from the weights of a model: see `transformer_of`.

        Of a mixture of experts, those that a token passes. Layers that do not attend cost no more than their matrices.
        """
        transformer = transformer_of(model)
        config, decoder = transformer.config.get_text_config(), transformer.base_model
        head = transformer.get_output_embeddings()
        outside = [m for m in decoder.modules() if isinstance(m, nn.Embedding)] + ([] if head is None else [head])
        not_passed = {id(parameter) for module in outside for parameter in module.parameters()}
        body = adapters = trained = 0
        for name, parameter in decoder.named_parameters():
            if id(parameter) in not_passed or len(_sizes(parameter)) < 2:
                continue
            passed = int(_numbers(parameter) * _passed_share(parameter, config))
            if "lora_" in name:
                adapters += passed
            else:
                body += passed
            trained += passed * parameter.requires_grad
        heads = config.num_attention_heads
        return cls(
            body=body,
            head=0 if head is None else _numbers(head.weight),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            windows=_windows(config),
            adapters=adapters,
            trained=trained,
            trained_head=0 if head is None else _numbers(head.weight) * head.weight.requires_grad,
            trained_parameters=sum(_numbers(p) for p in model.parameters() if p.requires_grad),
        )

    @property
    def cached(self) -> int:
        """Numbers that the key-value cache holds for one token, where no layer has a window."""
        return 2 * len(self.windows) * self.kv_heads * self.head_dim

    @property
    def pair_flops(self) -> int:
        """Of one token that attends to one token in one layer: a product with its key and one with its value."""
        return 4 * self.heads * self.head_dim

    def attention_flops(self, lengths: Sequence[int]) -> int:
        """Of causal attention within each row."""
        layers = Counter(self.windows)
        pairs = sum(count * sum(attended(length, window) for length in lengths) for window, count in layers.items())
        return self.pair_flops * pairs

    def forward_flops(self, lengths: Sequence[int], logits: int = 0, *, adapters: bool = True) -> int:
        """Of one forward.

            2 N T + 2 H R + attention

        with N numbers in the body, T tokens, H numbers in the head.

        Args:
            lengths: tokens of each row.
            logits: R, the positions whose logits somebody reads: those of the responses.
            adapters: false where they are off, or folded into the body.
        """
        matrices = self.body + adapters * self.adapters
        return 2 * (matrices * sum(lengths) + self.head * logits) + self.attention_flops(lengths)

    def training_flops(self, lengths: Sequence[int], logits: int = 0) -> int:
        """Of a forward and its backward, arguments as for `forward_flops`.

        Backward, each matrix is multiplied once more for the gradient of its input, and if it learns once for its own
        gradient; attention costs twice its forward. So three forwards, and two for the matrices under LoRA. What
        gradient checkpointing computes again is no useful work.
        """
        own_gradients = 2 * (self.trained * sum(lengths) + self.trained_head * logits)
        return 2 * self.forward_flops(lengths, logits) + own_gradients + self.attention_flops(lengths)

    def rollout_flops(self, prompt_ids: Sequence[Sequence[int]], response_lengths: Sequence[int]) -> int:
        """Of a rollout that computes equal prompts once, with adapters folded into the body.

        The logits behind a prompt draw the first token of its responses; each token but the last of a response is then
        read, for the logits that draw the next one.

        Args:
            prompt_ids: one list for each response.
            response_lengths: tokens of each response.
        """
        prompts = [len(ids) for ids in {tuple(ids) for ids in prompt_ids}]
        before = [len(ids) for ids in prompt_ids]
        after = [prompt + max(length - 1, 0) for prompt, length in zip(before, response_lengths, strict=True)]
        steps = sum(after) - sum(before)
        matrices = 2 * (self.body * (sum(prompts) + steps) + self.head * (len(prompts) + steps))
        return matrices + self.attention_flops(prompts) + self.attention_flops(after) - self.attention_flops(before)


def transformer_of(model: nn.Module) -> Any:
    """The model of transformers inside what wraps it: adapters, a scalar model, an engine of any ZeRO stage.

    Raises: ValueError, if there is none.
    """
    transformer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if transformer is None:
        raise ValueError(f"the costs of {type(model).__name__} are not known: give a model of transformers")
    return transformer


def attended(length: int, window: int | None = None) -> int:
    """Pairs of a token and one that it sees, itself included, in a causal row.

    n (n + 1) / 2, and with a window w the sum of min(i, w) over i = 1 ... n.
    """
    growing = length if window is None else min(length, window)
    return growing * (growing + 1) // 2 + (length - growing) * growing


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    known = {"full_attention": None, "sliding_attention": window}
    return tuple(known[kind] for kind in kinds if kind in known)


def _passed_share(parameter: nn.Parameter, config: Any) -> float:
    """Of the experts whose matrices lie in one tensor, the share that a token passes; else 1."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    sizes = _sizes(parameter)
    return config.num_experts_per_tok / experts if len(sizes) == 3 and sizes[0] == experts else 1.0


def _sizes(parameter: nn.Parameter) -> Sequence[int]:
    """The shape of the whole parameter, also where ZeRO-3 has split it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _numbers(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
