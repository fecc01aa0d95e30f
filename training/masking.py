"""Sums, means and whitening over the true positions of a mask.

Everywhere `where`, never multiplication: padding may hold inf or nan, and 0 * nan is nan.
"""

import torch
from torch import Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors of unequal shapes, which would broadcast in silence."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these tensors must have one shape, but have: {found}")


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `values` where `mask` is true.

    Args:
        values: any shape.
        mask: bool, the shape of `values`.
        dim: the dimension to sum over; None for all of them.
    """
    check_same_shape(values=values, mask=mask)
    return torch.where(mask, values, 0.0).sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where a mask is empty. Arguments as for `masked_sum`."""
    return masked_sum(values, mask, dim) / mask.sum(dim=dim).clamp(min=1)


def last_true(mask: Tensor) -> Tensor:
    """Mark the last true position of every row.

    Args:
        mask: [batch, time] bool.

    Returns: [batch, time] bool, one true per row; none in a row whose mask is empty.
    """
    true_from_here_on = mask.flip(1).cumsum(1).flip(1)
    return mask & (true_from_here_on == 1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale `values` to variance 1 and, with `shift_mean`, move them to mean 0; computed in float64.

    Args:
        values: any shape.
        mask: bool, the shape of `values`.
        shift_mean: False keeps the mean (rewards do, advantages do not).
        eps: added to the population variance.

    Returns: the shape of `values`, 0 outside `mask`.
    """
    mean = masked_mean(values.double(), mask)
    variance = masked_mean((values.double() - mean).square(), mask)
    whitened = (values.double() - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(values.dtype)
