"""The attention of a live Hugging Face module, replaced while it decodes.

Transformers looks its attention up by name at every call. While the hook is on, each layer hands its queries, keys and
values to a cache of ours, so that the module decodes rows of any lengths without padding: on the very weights that are
trained, with no second copy of the model.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from training.attention import AttentionRule, configs_of

NAME = "rollout"


class AttentionCache(Protocol):
    """What stores keys and values and attends over them: see `KvCache.attend`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor: ...


_cache: AttentionCache | None = None


@contextlib.contextmanager
def attention_through(module: nn.Module, cache: AttentionCache) -> Iterator[None]:
    """Every attention layer of `module` calls `cache.attend` inside this context."""
    global _cache
    assert _cache is None, "one module decodes at a time"
    configs = configs_of(module)
    before = [config._attn_implementation for config in configs]
    _cache = cache
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        _cache = None
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, heads, tokens, head_dim] queries -> [1, tokens, heads, head_dim], as transformers calls it."""
    assert _cache is not None
    rule = AttentionRule(scaling, sliding_window, softcap)
    output = _cache.attend(module.layer_idx, query[0], key[0], value[0], rule)
    return output[None], None


AttentionInterface.register(NAME, _attend)
