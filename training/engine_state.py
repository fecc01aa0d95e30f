"""What a training engine must remember to go on: saved from any ZeRO stage and number of ranks, loaded into any other.

The state of AdamW is kept as ranges of flattened parameters. Each rank writes the ranges that it owns, and reads those
that it owns later, from whichever files hold them: no rank waits for another, and nothing is converted.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.distributed import own_share, rank, world_size

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW names its running means of the gradient and of its square
SCALARS_FILE, RANK_FILE = "engine.json", "rank-{:05d}.safetensors"
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # DeepSpeed's own
# What fp16's loss scaler changes as it goes. The optimizer of ZeRO 0 has no hysteresis.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
BYTES_PER_VALUE = 4 * (1 + len(MOMENTS))  # float32


@dataclass(frozen=True)
class EngineState:
    """A copy of an engine's state in host memory, as one rank saves it."""

    tensors: dict[str, Tensor]
    """[length] float32 values by "master/NAME/START", "exp_avg/NAME/START" and "exp_avg_sq/NAME/START"."""
    scalars: dict[str, Any]
    """What is the same on all ranks; fit for JSON."""


class Fragment(NamedTuple):
    """A range of one flattened parameter."""

    name: str
    start: int
    tensors: dict[str, Tensor]
    """Views of the live float32 values, [length] each: "master" and, once AdamW has taken a step, its two moments."""


class _Piece(NamedTuple):
    """Where values `start` to `start + length` of a flattened parameter lie in a tensor that AdamW updates."""

    name: str
    start: int
    offset: int
    length: int
    """0 where other ranks hold the parameter."""


class _Group(NamedTuple):
    """A float32 tensor that AdamW updates, with one count of steps, and all parameters that are flattened into it."""

    master: Tensor
    pieces: list[_Piece]


def snapshot(engine: deepspeed.DeepSpeedEngine) -> EngineState:
    """A copy of what this rank has to save, which later steps leave as it is. To be called between optimizer steps.

    Every trainable parameter is saved, and no frozen one: those come from the folder that the model was loaded from.
    """
    _check_supported(engine)
    tensors = {}
    for name, start, live in fragments(engine):
        saved = slice(0, len(live[MASTER]))
        if engine.zero_optimization_stage() == 0:  # every rank has all values and saves its share of them
            saved = own_share(saved.stop)
        if saved.start < saved.stop:
            for kind, values in live.items():
                tensors[f"{kind}/{name}/{start + saved.start}"] = values[saved].to("cpu", copy=True)
    return EngineState(tensors, _scalars(engine))


def write(state: EngineState, folder: Path, rank: int, is_main: bool) -> list[Path]:
    """Writes what `load` reads; returns the files of this rank. Calls neither torch.distributed nor the engine.

    Args:
        state: of this rank, from `snapshot`.
        folder: an existing one, the same for all ranks.
        rank: of this process.
        is_main: true on the one rank that also writes what is the same on all ranks.
    """
    paths = [folder / RANK_FILE.format(rank)]
    save_file(state.tensors, paths[0])
    if is_main:
        paths.append(folder / SCALARS_FILE)
        paths[1].write_text(json.dumps(state.scalars))
    return paths


def size(engine: deepspeed.DeepSpeedEngine) -> int:
    """Bytes that all ranks together write, without the files' headers."""
    return BYTES_PER_VALUE * sum(torch.Size(shape).numel() for shape in _shapes(engine).values())


@torch.no_grad()
def load(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Puts a saved state into an engine, whatever that held before. To be called between optimizer steps.

    Args:
        engine: of the same trainable parameters; its ZeRO stage, precision and number of ranks may be others.
        folder: where all ranks have written.

    Raises:
        ValueError: the files hold other parameters, or not all of them.
    """
    _check_supported(engine)
    scalars = json.loads((folder / SCALARS_FILE).read_text())
    steps = scalars["adamw_steps"]
    _check_same_parameters(scalars["shapes"], _shapes(engine))
    saved = _SavedValues(folder, scalars["ranks"])
    for group in _groups(engine):
        _restart_adamw(engine, group, max(steps[piece.name] for piece in group.pieces))
    for name, start, live in fragments(engine):
        for kind, values in live.items():
            if kind == MASTER or steps[name] > 0:
                values.copy_(saved.read(kind, name, start, len(values)))
    _weights_from_masters(engine, saved)
    _load_scalars(engine, scalars)


def fragments(engine: deepspeed.DeepSpeedEngine) -> Iterator[Fragment]:
    """What this rank holds of each trainable parameter's state. At ZeRO 0 that is all of it, on every rank."""
    for group in _groups(engine):
        live = {MASTER: group.master} | engine.basic_optimizer.state.get(group.master, {})
        flat = {kind: live[kind].detach().view(-1) for kind in (MASTER, *MOMENTS) if kind in live}
        for name, start, offset, length in group.pieces:
            if length > 0:
                yield Fragment(name, start, {kind: values.narrow(0, offset, length) for kind, values in flat.items()})


def _groups(engine: deepspeed.DeepSpeedEngine) -> Iterator[_Group]:
    optimizer = engine.optimizer
    name_of = {parameter: name for name, parameter in engine.module.named_parameters()}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for master, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            pieces, offset = [], 0
            for p in parameters:
                shard = p.partition_numel()  # of the same length on all ranks: the last ones have padding
                pieces.append(_own_part(name_of[p], 0, p.ds_numel, shard, offset))
                offset += shard
            yield _Group(master, pieces)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
            offsets = optimizer.round_robin_bit16_offsets[index]
            placed = zip(optimizer.round_robin_bit16_groups[index], offsets, strict=True)
            yield _Group(master, [_own_part(name_of[p], at, p.numel(), len(master), 0) for p, at in placed])
    else:
        weights = [p for group in getattr(optimizer, "fp16_groups", []) for p in group]
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        for weight, master in zip(weights or masters, masters, strict=True):
            yield _Group(master, [_Piece(name_of[weight], 0, 0, weight.numel())])


def _own_part(name: str, begin: int, length: int, share: int, offset: int) -> _Piece:
    """What this rank owns of a parameter that lies in a flat buffer, of which each rank owns `share` values.

    Args:
        name: of the parameter, whose `length` values begin at `begin` of the buffer.
        offset: where the tensor that holds this rank's share has the first of it.
    """
    first, last = max(begin, rank() * share), min(begin + length, (rank() + 1) * share)
    return _Piece(name, first - begin, offset + first - rank() * share, max(0, last - first))


def _check_supported(engine: deepspeed.DeepSpeedEngine) -> None:
    optimizer = engine.optimizer
    known = (torch.optim.AdamW, FP16_UnfusedOptimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    scalers = (getattr(optimizer, "torch_autocast_gradscaler", None), engine.torch_autocast_z0_gradscaler)
    if type(optimizer) not in known or getattr(optimizer, "swap_optimizer", False) or any(scalers):
        raise ValueError(
            f"the state of DeepSpeed's {type(optimizer).__name__} with these raw options cannot be saved: take "
            "data_types, torch_autocast, zenflow and offloading to NVMe out of the file engine.deepspeed_config"
        )


def _check_same_parameters(saved: dict[str, list[int]], own: dict[str, list[int]]) -> None:
    advice = "resume with the model and the LoRA options of the run that saved it, or start a new run"
    for name in sorted(own.keys() - saved.keys()):
        raise ValueError(f"the checkpoint does not hold {name}, which this run trains: {advice}")
    for name in sorted(saved.keys() - own.keys()):
        raise ValueError(f"the checkpoint holds {name}, which this run does not train: {advice}")
    for name, shape in own.items():
        if saved[name] != shape:
            raise ValueError(f"{name} has the shape {saved[name]} in the checkpoint and {shape} here: {advice}")


def _shapes(engine: deepspeed.DeepSpeedEngine) -> dict[str, list[int]]:
    """The shape of each trainable parameter, by its name."""
    trained = {piece.name for group in _groups(engine) for piece in group.pieces}
    parameters = ((name, p) for name, p in engine.module.named_parameters() if name in trained)
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters}


def _scalars(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    adamw, scaler = engine.basic_optimizer, _loss_scaler(engine)
    steps: dict[str, int] = {}
    for group in _groups(engine):
        step = int(adamw.state.get(group.master, {}).get("step", 0))
        steps |= dict.fromkeys((piece.name for piece in group.pieces), step)
    return {
        "ranks": world_size(),
        "shapes": _shapes(engine),
        "adamw_steps": steps,
        "learning_rates": [group["lr"] for group in adamw.param_groups],
        "schedule_step": engine.lr_scheduler.last_epoch,
        "loss_scale": {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)},
        "counters": {name: getattr(engine, name) for name in COUNTERS},
    }


def _load_scalars(engine: deepspeed.DeepSpeedEngine, scalars: dict[str, Any]) -> None:
    rates, schedule, scaler = scalars["learning_rates"], engine.lr_scheduler, _loss_scaler(engine)
    for group, rate in zip(engine.basic_optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.last_epoch, schedule._step_count = scalars["schedule_step"], scalars["schedule_step"] + 1
    schedule._last_lr = rates
    for name, value in scalars["loss_scale"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    for name, value in scalars["counters"].items():
        setattr(engine, name, value)


def _loss_scaler(engine: deepspeed.DeepSpeedEngine) -> Any:
    """What holds the loss scale and its course; None where losses are not scaled."""
    if not engine.fp16_enabled():
        return None
    optimizer = engine.optimizer
    return optimizer.loss_scale_config if isinstance(optimizer, FP16_UnfusedOptimizer) else optimizer.loss_scaler


def _restart_adamw(engine: deepspeed.DeepSpeedEngine, group: _Group, step: int) -> None:
    """Gives AdamW moments of zeros after `step` steps; none at all where it has not begun."""
    adamw, optimizer, master = engine.basic_optimizer, engine.optimizer, group.master
    adamw.state.pop(master, None)
    if step > 0:
        # Where AdamW itself would put its count: on the tensor's device in the fused kernel, else in host memory.
        device = master.device if adamw.defaults["fused"] or adamw.defaults["capturable"] else "cpu"
        count = torch.tensor(float(step), dtype=torch.float32, device=device)
        adamw.state[master] = {"step": count} | {kind: torch.zeros_like(master) for kind in MOMENTS}
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer._hp_optimizer_states_linked = False  # what it lends to DeepSpeed's own readers is gone


def _weights_from_masters(engine: deepspeed.DeepSpeedEngine, saved: "_SavedValues") -> None:
    """Rounds the float32 masters into the weights of the forward pass, as DeepSpeed does at the end of a step."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._partition_all_parameters()  # whole copies are out of date: the next forward gathers anew
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.invalidate_secondary_tensor()
        return
    for name in _shapes(engine):
        weight = engine.module.get_parameter(name)  # a view of DeepSpeed's flat buffer
        weight.copy_(saved.read(MASTER, name, 0, weight.numel()).view_as(weight))


class _SavedValues:
    """The values in the files of all ranks, by range; only what is asked for is read."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.parts: dict[tuple[str, str], list[tuple[int, Any]]] = defaultdict(list)
        for path in (folder / RANK_FILE.format(index) for index in range(ranks)):
            if not path.exists():
                raise ValueError(f"{path} is missing: bring the files of all {ranks} ranks into one folder")
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("/")
                self.parts[kind, name].append((int(start), file.get_slice(key)))

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """[length] float32 values of a flattened parameter, from value `start` on."""
        values = torch.empty(length, dtype=torch.float32)
        found = 0
        for part_start, part in self.parts[kind, name]:
            first = max(start, part_start)
            last = min(start + length, part_start + part.get_shape()[0])
            if first < last:
                values[first - start : last - start] = part[first - part_start : last - part_start]
                found += last - first
        if found != length:
            raise ValueError(f"{self.folder} holds {found} of {length} values {kind} of {name}: take an older one")
        return values
