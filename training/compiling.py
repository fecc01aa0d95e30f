"""Decoder layers in compiled form: the small operations between their matrix products become few."""

import contextlib

import torch
import torch._dynamo
import torch._functorch.config
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from transformers.modeling_layers import GradientCheckpointingLayer

# One layer's code is compiled for each kind of model and pass: actor, critic, adapters on and off, with a gradient and
# without. What goes beyond this would run uncompiled.
VARIANTS = 64
BACKEND = "inductor"


def compile_layers(model: nn.Module, *, splits_weights: bool, activation_budget: float = 1.0) -> None:
    """Have the decoder layers of `model` compiled when they are first called, once for all layers that are alike.

    To be called before the model gets its engine. Results are those of the uncompiled layers to rounding: numbers of 16
    bits are rounded less often.

    Args:
        model: a causal LM or a `ScalarModel`, with its adapters.
        splits_weights: whether the engine is to split weights over ranks (ZeRO 3). Those of a layer are then gathered
            together: gathering one by one would break the layer into a dozen parts.
        activation_budget: share of the activations that is kept for the backward pass; the same for all models of a
            process.

    Raises:
        ValueError: there is no C++ compiler, or no layer that transformers knows as one.
    """
    if BACKEND == "inductor":
        _check_compiler()
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # else the number of a layer is a reason to compile anew
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._functorch.config.activation_memory_budget = activation_budget
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            "engine.compile_layers is True, but the model has no decoder layers of transformers' kind: leave it out"
        )
    if splits_weights:
        set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    for layer in layers:  # the method alone, not the call: that would include the hooks by which weights are gathered
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=BACKEND)  # type: ignore[method-assign]


def uncompiled() -> contextlib.AbstractContextManager[None]:
    """Inside this context compiled layers run as they were written."""
    return torch.compiler.set_stance("force_eager")


def _check_compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "engine.compile_layers is True, but there is no C++ compiler: install g++, name one in the environment "
            "variable CXX, or leave compile_layers out"
        ) from error
