"""Decoder layers of the Llama family in fewer and larger operations, for as long as a rollout lasts.

What a decoding step costs beside its matrix products is the number of operations. Here projections of the same input
are one product, norms and rotations pass over the rows fewer times, and a layer is one function instead of thirteen
modules. Its numbers are the module's own but for rounding.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.attention import AttentionRule
from training.generation.attention_hook import AttentionCache

# All of them: RMSNorm, attention with rotary positions, residual; RMSNorm, gated MLP, residual.
KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
KNOWN_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}

TensorFunction = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def lean_layers(module: nn.Module, cache: AttentionCache, rows: int) -> Iterator[None]:
    """Every layer of `module` that is known here runs lean inside this context; other modules are not touched.

    On a CPU the 16-bit weights of all `nn.Linear` are copied into the layout that its matrix units read, which oneDNN
    would otherwise make anew at every call, at a third of the time of decoding. The products are the same to the bit.

    Args:
        module: a causal LM with whole weights, and adapters, if it has any, merged into them.
        cache: attends, as in `attention_through`.
        rows: how many rows are multiplied at a time, for which the layout is chosen.
    """
    replaced: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    def replace(part: nn.Module, forward: Callable[..., Any]) -> None:
        replaced.append((part, vars(part).get("forward")))  # that of a compiled layer, else its class's
        part.forward = forward  # type: ignore[method-assign]

    inside: set[nn.Module] = set()
    try:
        for layer in module.modules():
            if type(layer).__name__ in KNOWN and (forward := _lean(layer, cache, rows)) is not None:
                replace(layer, forward)
                inside.update(layer.modules())
        for layer in module.modules():
            if type(layer) is nn.Linear and layer not in inside and _can_be_packed(layer.weight):
                replace(layer, _projection([layer], rows))
        yield
    finally:
        for part, own in replaced:
            del part.forward
            if own is not None:
                part.forward = own  # type: ignore[method-assign]


def _lean(layer: Any, cache: AttentionCache, rows: int) -> Callable[..., Tensor] | None:
    """The layer's forward; None if it has been changed in a way that is not known."""
    attention, mlp = layer.self_attn, layer.mlp
    groups = [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)]
    groups += [(mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
    linears = [[_merged(part) for part in group] for group in groups]
    if any(type(part) is not nn.Linear for group in linears for part in group):
        return None
    qkv, out, gate_up, down = (_projection(group, rows) for group in linears)
    head_dim, layer_idx = attention.head_dim, attention.layer_idx
    heads = [part.out_features // head_dim for part in linears[0]]
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    rule = AttentionRule(attention.scaling, window)
    norm_before, norm_between = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    query_norm, key_norm = (_norm(getattr(attention, name, None)) for name in ("q_norm", "k_norm"))

    def forward(hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        projected = qkv(norm_before(hidden))[0].unflatten(-1, (-1, head_dim))  # [tokens, heads, head_dim]
        turning, value = projected.split([heads[0] + heads[1], heads[2]], dim=1)
        if query_norm is not None and key_norm is not None:
            query, key = turning.split(heads[:2], dim=1)
            turning = torch.cat([query_norm(query), key_norm(key)], dim=1)
        query, key = _rotated(turning, *position_embeddings).split(heads[:2], dim=1)
        attended = cache.attend(layer_idx, query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), rule)
        hidden = hidden + out(attended.flatten(1)[None])
        gate, up = gate_up(norm_between(hidden)).chunk(2, dim=-1)
        return hidden + down(mlp.act_fn(gate) * up)

    return forward


def _merged(part: Any) -> Any:
    """What an adapter is merged into."""
    return part.base_layer if getattr(part, "merged", False) else part


def _norm(module: Any) -> Any:
    """RMSNorm (Zhang and Sennrich 2019, eq. 4) in float32, as the module's forward; what is no such norm, as it is."""
    if type(module).__name__ not in KNOWN_NORMS:
        return module
    weight, epsilon = module.weight.detach(), module.variance_epsilon

    def normed(x: Tensor) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return weight * (wide * length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()).to(x.dtype)

    return normed


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34) of [tokens, heads, head_dim]; cosine and sine [1, tokens, head_dim]."""
    cosine, sine = cosine[0, :, None], sine[0, :, None]
    half = x.shape[-1] // 2
    rotated = x * cosine
    rotated[..., :half].addcmul_(x[..., half:], sine[..., :half], value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sine[..., half:])
    return rotated


def _projection(layers: Sequence[nn.Linear], rows: int) -> TensorFunction:
    """The products of one input with the weights of several layers, side by side."""
    weights = [layer.weight.detach() for layer in layers]
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    if _can_be_packed(weights[0]):
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), rows)
        packed_bias = torch.cat(biases) if biases else None
        multiply = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: multiply(x, packed, packed_bias, "none", [], "")
    weight, bias = _as_one(weights), _as_one(biases) if biases else None
    if weight is None or (biases and bias is None):
        return lambda x: torch.cat([F.linear(x, layer.weight, layer.bias) for layer in layers], dim=-1)
    return lambda x: F.linear(x, weight, bias)


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """View of tensors that lie one after the other in memory, as in ZeRO's flat buffers, along dim 0; else None."""
    first = parts[0]
    expected = first.storage_offset()
    for part in parts:
        beside = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not beside or not part.is_contiguous() or part.storage_offset() != expected:
            return None
        expected += part.numel()
    return first.as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride())


def _can_be_packed(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
