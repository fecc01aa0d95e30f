"""What AdamW updates, and how fast: parameter groups and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from training.config import OptimConfig

# Progress after the warm-up, from 0 to 1 -> factor on the learning rate, from 1 to 0.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def lr_lambda(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """The factor on `config.lr` at each step, for torch.optim.lr_scheduler.LambdaLR.

    With W = ceil(warmup_fraction * total_steps), step s (from 0) gets

        (s + 1) / W                                            while s < W
        m + (1 - m) * schedule((s - W) / (total_steps - W))    after that, with m = min_lr_fraction

    so no step has a learning rate of 0 at the start, and steps past the end keep the last factor.
    """
    schedule = SCHEDULES[config.schedule]
    # Rounded first: 0.03 * 100 is 3.0000000000000004 in some orders of arithmetic, which ceil would take for 4.
    warmup_steps = math.ceil(round(config.warmup_fraction * total_steps, 6))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return config.min_lr_fraction + (1.0 - config.min_lr_fraction) * schedule(progress)

    return factor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: matrices, which decay, and biases and norms, which do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter: set lora.rank, or load it with its weights trainable")
    # Under ZeRO-3 a parameter is an empty vector here, and ds_shape tells what it is gathered to.
    matrices = [parameter for parameter in trainable if len(getattr(parameter, "ds_shape", parameter.shape)) > 1]
    taken = {id(parameter) for parameter in matrices}
    vectors = [parameter for parameter in trainable if id(parameter) not in taken]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(parameters: Iterable[torch.Tensor] | Iterable[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over parameters or parameter groups, in torch's fused kernel. Needs no compiler."""
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
