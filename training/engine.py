"""DeepSpeed engines from typed options, and the mode in which their weights can generate."""

import contextlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from training.compiling import compile_layers, uncompiled
from training.config import EngineConfig, OptimConfig
from training.distributed import world_size
from training.optim import adamw, lr_lambda, parameter_groups

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def deepspeed_options(config: EngineConfig, *, zero_stage: int, train_batch_size: int | None = None) -> dict:
    """The DeepSpeed configuration that `config` stands for.

    Args:
        config: precision, offload and clipping; its `deepspeed_config` file is merged over the result.
        zero_stage: 0 to 3; given apart from `config` because frozen models know only 0 and 3.
        train_batch_size: rows of one optimizer step over all GPUs; None for a model that is not trained.
    """
    zero: dict = {"stage": zero_stage}
    if config.offload_optimizer and train_batch_size is not None:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters and zero_stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    if zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 10_000
    options = {
        # For DeepSpeed's own counts only: micro-batches are cut here, and `backward_and_step` says which is the last.
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": train_batch_size or world_size(),
        "gradient_accumulation_steps": (train_batch_size or world_size()) // world_size(),
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": zero,
        # The optimizer is a torch one on every device, so that no compiler is needed to start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if config.precision != "fp32":
        options[config.precision] = {"enabled": True}
    if config.deepspeed_config is not None:
        options = merged(options, json.loads(Path(config.deepspeed_config).read_text()))
    return options


def merged(base: dict, over: dict) -> dict:
    """`base` with the values of `over` laid on top, dictionary by dictionary."""
    result = dict(base)
    for key, value in over.items():
        both_nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both_nested else value
    return result


def loading_options(config: EngineConfig, zero_stage: int) -> dict | None:
    """What a loader needs to split weights over ranks while they are read: the ZeRO-3 options, else None."""
    return deepspeed_options(config, zero_stage=3) if zero_stage == 3 else None


def train_engine(
    model: nn.Module,
    config: EngineConfig,
    optim: OptimConfig,
    *,
    train_batch_size: int,
    total_steps: int,
) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine that trains the parameters of `model` that require a gradient."""
    model.train()  # loaders leave it in eval mode, which switches gradient checkpointing and adapter dropout off
    optimizer = adamw(parameter_groups(model, optim.weight_decay), optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda(optim, total_steps))
    engine = _initialize(
        model,
        config,
        zero_stage=config.zero_stage,
        train_batch_size=train_batch_size,
        optimizer=optimizer,
        lr_scheduler=schedule,
    )
    _undo_first_step(engine.optimizer)
    return engine


def frozen_engine(model: nn.Module, config: EngineConfig) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine without an optimizer: split over ranks at ZeRO-3, a full copy on each otherwise."""
    model.eval().requires_grad_(False)
    return _initialize(model, config, zero_stage=frozen_zero_stage(config))


def _initialize(
    model: nn.Module, config: EngineConfig, *, zero_stage: int, train_batch_size: int | None = None, **arguments: Any
) -> deepspeed.DeepSpeedEngine:
    if config.compile_layers:
        compile_layers(model, splits_weights=zero_stage == 3, activation_budget=config.activation_budget)
    options = deepspeed_options(config, zero_stage=zero_stage, train_batch_size=train_batch_size)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints memory statistics for each engine
        return deepspeed.initialize(model=model, config=options, **arguments)[0]


def _undo_first_step(optimizer: Any) -> None:
    """Where ZeRO 0 keeps float32 copies, DeepSpeed takes a step of zeros as it starts: AdamW would begin at step 2."""
    if hasattr(optimizer, "fp32_groups"):
        optimizer.optimizer.state.clear()
        for copies, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for copy, weight in zip(copies, weights, strict=True):
                copy.data.copy_(weight.data)


def frozen_zero_stage(config: EngineConfig) -> int:
    """ZeRO 1 and 2 split the optimizer and gradients, which a frozen model does not have."""
    return 3 if config.zero_stage == 3 else 0


def backward_and_step(
    engine: deepspeed.DeepSpeedEngine,
    loss: torch.Tensor,
    *,
    last: bool = True,
    stepping: contextlib.AbstractContextManager = contextlib.nullcontext(),  # noqa: B008 (holds nothing)
) -> bool:
    """Add one micro-batch's gradient; the last micro-batch of a step also updates the weights.

    Args:
        loss: scalar, a sum over this micro-batch divided by the count of the whole step over all ranks. DeepSpeed
            averages gradients over ranks, so the loss is multiplied by their number to make that a sum.
        last: whether no other micro-batch of this step follows. All ranks say the same.
        stepping: entered while the weights are updated, for whoever takes the time of that.

    Returns: False where the step's gradient was not finite, and the weights stay as they are. The same on all ranks.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * world_size(), scale_wrt_gas=False)
    if not last:
        return True
    with stepping:
        if isinstance(engine.optimizer, torch.optim.Optimizer):  # ZeRO 0 in float32, where DeepSpeed does not look
            gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
            if not torch.nn.utils.get_total_norm(gradients).isfinite():
                engine.zero_grad()
                return False
        engine.step()
    return engine.was_step_applied()


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Norm of the last step's whole gradient before clipping; nan where DeepSpeed does not keep it (ZeRO 0, fp32)."""
    norm = engine.get_global_grad_norm()
    return math.nan if norm is None else float(norm)


@contextlib.contextmanager
def evaluation_mode(engine: nn.Module) -> Iterator[None]:
    """No gradients, and adapters without dropout."""
    was_training = engine.training
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train(was_training)


@contextlib.contextmanager
def generation_mode(engine: deepspeed.DeepSpeedEngine, module: nn.Module | None = None) -> Iterator[nn.Module]:
    """The engine's module with whole weights and LoRA folded in: ready for many forwards of one token.

    Under ZeRO-3 every weight is gathered once and the hooks that would gather it again at each call are taken off, so
    ranks whose rows end at different times need not wait for each other. Everything is put back on leaving, to the
    bit, also after an exception.
    """
    module = module or engine.module
    with evaluation_mode(module), uncompiled(), _gathered(engine), _lora_folded(module):
        yield module


@contextlib.contextmanager
def _gathered(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if not hasattr(offload, "_register_deepspeed_module"):  # not ZeRO-3
        yield
        return
    parameters = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        # The first one lets ranks compare notes at each forward: those that generate on would wait for the others.
        for hook in [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            coordinator = offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()  # the recorded order of gathers no longer holds
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(lambda *_: coordinator.reset_step())
            offload._register_deepspeed_module(offload.module)


@contextlib.contextmanager
def _lora_folded(module: nn.Module) -> Iterator[None]:
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    # Unmerging subtracts what was added and leaves rounding behind, so the bits are kept and put back.
    saved = [(layer, layer.get_base_layer().weight.detach().clone()) for layer in layers]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, weight in saved:
            layer.merged_adapters.clear()
            layer.get_base_layer().weight.data.copy_(weight)
