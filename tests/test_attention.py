"""Attention by its definition, beside torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.attention import AttentionRule, additive, by_products

ROWS, HEADS, QUERIES, KEYS, SIZE = 3, 2, 5, 9, 6
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def masks() -> dict[str, Tensor | None]:
    seen = torch.rand(ROWS, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) < 0.6
    seen[..., 0] = True
    return {"causal": None, "for all rows": seen[0, 0], "for each row": seen, "additive": additive(seen, torch.float64)}


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_outputs_and_gradients_are_those_of_float64(name: str, dtype: torch.dtype, scaling: float | None) -> None:
    exact_mask = masks()[name]
    mask = exact_mask.to(dtype) if exact_mask is not None and exact_mask.is_floating_point() else exact_mask
    generator = torch.Generator().manual_seed(0)
    keys = QUERIES if mask is None else KEYS
    parts = [
        torch.randn(ROWS, HEADS, length, SIZE, generator=generator).to(dtype).requires_grad_()
        for length in (QUERIES, keys, keys)
    ]
    exact = [part.detach().double().requires_grad_() for part in parts]
    found = by_products(parts[0], parts[1], parts[2], mask, AttentionRule(scaling))
    query, key, value = exact
    expected = F.scaled_dot_product_attention(query, key, value, exact_mask, is_causal=mask is None, scale=scaling)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(dtype)
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert found.dtype == dtype
    compared = [(found, expected), *((part.grad, other.grad) for part, other in zip(parts, exact, strict=True))]
    for one, other in compared:
        assert one is not None and other is not None
        torch.testing.assert_close(one.double(), other, rtol=0, atol=TOLERANCES[dtype] * float(other.abs().max()))
