"""A moving average of the actor's weights, held where the weights are held."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.distributed import is_main, rank, world_size


class MovingAverage:
    """Float32 average of every trained parameter: w_ema = decay * w_ema + (1 - decay) * w.

    In float32 because in bf16 a step of 1 - decay rounds to nothing. Under ZeRO-3 each rank averages its own shard.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: the module inside the DeepSpeed engine.
            decay: in [0, 1); 0.992 averages over about 125 steps.
        """
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadows = {name: _local(p).detach().float().clone() for name, p in self.parameters.items()}

    def update(self) -> None:
        """Take in the weights as they are now; call after each optimizer step."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.shadows[name].lerp_(_local(parameter).float(), 1 - self.decay)

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Put back what `whole_weights` gave, on every rank whole."""
        parameter: Any
        for name, parameter in self.parameters.items():
            value = weights[name].to(self.shadows[name])
            if hasattr(parameter, "ds_tensor"):
                padding = world_size() * len(self.shadows[name]) - value.numel()
                value = torch.nn.functional.pad(value.flatten(), (0, padding)).chunk(world_size())[rank()]
            self.shadows[name].copy_(value)

    def whole_weights(self) -> dict[str, Tensor]:
        """The averages by name, in host memory on the main rank, empty elsewhere. Every rank must call this."""
        result = {}
        parameter: Any
        for name, parameter in self.parameters.items():
            average = self.shadows[name]
            if hasattr(parameter, "ds_tensor"):  # ranks hold equal shards in order, the last one padded
                shards = [torch.empty_like(average) for _ in range(world_size())]
                torch.distributed.all_gather(shards, average)
                average = torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)
            if is_main():
                result[name] = average.cpu()
        return result


def _local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its shard under ZeRO-3, else all of it."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data
