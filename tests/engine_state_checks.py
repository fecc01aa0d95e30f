"""Engines that are saved, resumed and resharded by 1, 2 and 4 ranks: for `test_engine_state.py`.

A case takes BEFORE steps, saves, takes AFTER more and records all that it holds then, read by DeepSpeed's own accessors
or, where DeepSpeed has none, from the optimizer. Another process resumes and must hold the same.

Ranks are forked from one process that has imported everything and done nothing yet: to start them one by one would take
longer than all that they do.
"""

import gc
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch._dynamo  # DeepSpeed does so for the first engine, and each rank would again
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from step1_sft.train import demonstration_loss
from tests import distributed_checks
from tests.distributed_checks import PAD, outcomes, rows
from tests.launching import tell
from tests.tiny_models import save_tiny_model
from tests.tiny_runs import SPLIT_EVERYTHING
from training import distributed
from training.config import EngineConfig, LoraConfig, ModelConfig, OptimConfig
from training.data import collate
from training.engine import DTYPES, backward_and_step, loading_options, train_engine
from training.engine_state import load, snapshot, write
from training.export import whole
from training.models import load_causal_lm

BEFORE, AFTER = 2, 3
TRAIN_BATCH = 4
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, warmup_fraction=0.3)
MOMENTS = ("exp_avg", "exp_avg_sq")
# By whether there are adapters: loss scales that change before and after the engine is saved.
FP16_OPTIONS = {
    False: {"initial_scale_power": 19, "loss_scale_window": 1, "hysteresis": 2},
    True: {"initial_scale_power": 17, "loss_scale_window": 1, "hysteresis": 1},
}

calls = itertools.count()
Held = tuple[dict[str, Tensor], dict[str, Any]]


class Case(NamedTuple):
    """One way to train the tiny model."""

    zero_stage: Literal[0, 1, 2, 3]
    lora: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    kind: Literal["", "whole", "offload"] = ""
    """"whole": parameters as small as these stay so at ZeRO 3; "offload": to the CPU, at ZeRO 3 also of the weights."""

    @property
    def name(self) -> str:
        words = [f"zero{self.zero_stage}", "lora" if self.lora else "full", self.precision, self.kind]
        return "-".join(word for word in words if word)


FULL, LORA, BF16, BF16_LORA, FP16, FP16_LORA = (
    # fp16 is refused at ZeRO 0.
    [Case(stage, lora, precision) for stage in (0, 1, 2, 3) if (stage, precision) != (0, "fp16")]
    for precision in ("fp32", "bf16", "fp16")
    for lora in (False, True)
)
WHOLE = Case(3, True, "bf16", "whole")
OFFLOADED = [Case(stage, False, "bf16", "offload") for stage in (2, 3)]
EVERY = [*FULL, *LORA, *BF16, *BF16_LORA, *FP16, *FP16_LORA, WHOLE, *OFFLOADED]
SAVED = {1: [case for case in EVERY if case not in FP16_LORA], 2: EVERY, 4: [FULL[0], FULL[3], LORA[1], LORA[2]]}
"""What each number of ranks saves."""


class Move(NamedTuple):
    """A state that `ranks` have saved in one case, and the case that loads it."""

    ranks: int
    source: Case
    target: Case

    @property
    def name(self) -> str:
        return f"{self.source.name} of {self.ranks} into {self.target.name}"


def cycle(ranks: int, cases: list[Case], by: int) -> list[Move]:
    return [Move(ranks, case, cases[(index + by) % len(cases)]) for index, case in enumerate(cases)]


MOVES = {
    1: [
        *(Move(2, source, target) for source in FULL for target in FULL),
        *cycle(2, LORA, 1),
        *cycle(2, LORA, 3),
        *cycle(2, BF16, 1),
        *cycle(2, FP16, 1),
        Move(2, OFFLOADED[0], WHOLE._replace(lora=False)),
        Move(2, BF16_LORA[0], WHOLE),
        Move(2, BF16[1], FULL[2]),  # to another precision
        Move(4, FULL[0], FULL[2]),
        Move(4, FULL[3], FULL[1]),
        Move(4, LORA[1], LORA[3]),
        Move(4, LORA[2], LORA[0]),
    ],
    2: [*cycle(1, FULL, 1), *cycle(1, LORA, 3), Move(1, FP16[0], FP16[1]), Move(1, BF16[0], OFFLOADED[1])],
    4: [Move(2, FULL[0], FULL[3]), Move(2, FULL[2], FULL[0]), Move(2, LORA[1], LORA[2]), Move(2, LORA[3], LORA[1])],
}
"""What each number of ranks loads from another."""

# In this order: each number of ranks, and whether it saves, resumes what it has saved, and loads what others have.
PHASES = [(1, "save"), (2, "save"), (4, "save"), (4, "move"), (2, "resume"), (2, "move"), (1, "resume"), (1, "move")]


def build(case: Case, folder: Path, seed: int = 0) -> Any:
    raw: dict[str, Any] = {} if case.kind == "whole" else dict(SPLIT_EVERYTHING)
    if case.precision == "fp16":
        raw["fp16"] = dict(FP16_OPTIONS[case.lora])
        # `backward_and_step` multiplies the loss by the number of ranks.
        raw["fp16"]["initial_scale_power"] -= distributed.world_size() - 1
    options = folder / f"{case.name}-{os.getpid()}.json"
    options.write_text(json.dumps(raw))
    config = EngineConfig(
        zero_stage=case.zero_stage,
        precision=case.precision,
        offload_optimizer=case.kind == "offload",
        offload_parameters=case.kind == "offload" and case.zero_stage == 3,
        deepspeed_config=str(options),
    )
    torch.manual_seed(seed)  # of new adapters
    model_config = ModelConfig(path=str(folder / "model"), lora=LoraConfig(rank=4 if case.lora else 0))
    model = load_causal_lm(model_config, DTYPES[case.precision], loading_options(config, case.zero_stage))
    return train_engine(model, config, OPTIM, train_batch_size=TRAIN_BATCH, total_steps=BEFORE + AFTER)


def take_steps(engine: Any, first: int, last: int) -> list[float]:
    """The loss of each step over all ranks, which does not depend on how many there are."""
    losses = []
    for step in range(first, last):
        batch = rows(TRAIN_BATCH, seed=step)
        count = torch.tensor(sum(sum(mask) for _, mask in batch))
        share = TRAIN_BATCH // distributed.world_size()
        own = batch[distributed.rank() * share :][:share]
        parts = [own[:2], own[2:]] if share > 2 else [own]
        total = torch.zeros(())
        for part in parts:
            loss, _ = demonstration_loss(engine, collate(part, PAD), count)
            backward_and_step(engine, loss, last=part is parts[-1])
            total += loss.detach()
        losses.append(float(distributed.sum_over_ranks(total)))
    return losses


def held(engine: Any) -> Held:
    """All that an engine holds: whole tensors, and numbers."""
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        with whole(parameter):
            tensors[f"weight/{name}"] = parameter.detach().clone()
        if parameter.requires_grad:
            for kind, values in optimizer_state(engine, parameter).items():
                tensors[f"{kind}/{name}"] = values.detach().clone().view(tensors[f"weight/{name}"].shape)
    scaler = getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
    scaler = scaler if engine.fp16_enabled() else None
    schedule = engine.lr_scheduler.state_dict()
    numbers = {
        "steps": sorted({float(state["step"]) for state in engine.basic_optimizer.state.values()}),
        "learning_rates": [group["lr"] for group in engine.basic_optimizer.param_groups],
        "schedule": {name: schedule[name] for name in ("last_epoch", "_step_count", "_last_lr", "base_lrs")},
        "loss_scale": {name: value for name, value in vars(scaler).items() if name != "dtype"} if scaler else {},
        "counters": [engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps],
    }
    return tensors, json.loads(json.dumps(numbers))


def optimizer_state(engine: Any, parameter: Tensor) -> dict[str, Tensor]:
    if engine.zero_optimization_stage() > 0:
        if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
            # DeepSpeed does this once, after the step of the first group of parameters, and forgets the second.
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
        return {"master": safe_get_full_fp32_param(parameter)} | moments
    weights, masters = [parameter], [parameter]
    if hasattr(engine.optimizer, "fp32_groups"):
        weights = list(itertools.chain(*engine.optimizer.fp16_groups))
        masters = list(itertools.chain(*engine.optimizer.fp32_groups))
    master = next(master for weight, master in zip(weights, masters, strict=True) if weight is parameter)
    state = engine.basic_optimizer.state[master]
    return {"master": master} | {kind: state[kind] for kind in MOMENTS}


def differences(found: Held, expected: Held) -> list[str]:
    """Names of what differs in as much as a bit."""
    tensors = [name for name in expected[0] if not torch.equal(found[0][name], expected[0][name])]
    numbers = [name for name in expected[1] if found[1][name] != expected[1][name]]
    return sorted([*tensors, *numbers, *(found[0].keys() ^ expected[0].keys())])


def record(path: Path, what: Held) -> None:
    if distributed.is_main():
        save_file(what[0], path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps(what[1]))


def recorded(path: Path) -> Held:
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())


def saved_at(folder: Path, case: Case, ranks: int) -> Path:
    return folder / f"ranks{ranks}" / case.name


def save(folder: Path, case: Case) -> None:
    """Takes BEFORE steps, saves, takes AFTER more; records both states."""
    target = saved_at(folder, case, distributed.world_size())
    target.mkdir(parents=True, exist_ok=True)
    engine = build(case, folder)
    take_steps(engine, 0, BEFORE)
    state = snapshot(engine)
    record(target / "saved", held(engine))
    losses = take_steps(engine, BEFORE, BEFORE + AFTER)
    write(state, target, distributed.rank(), distributed.is_main())  # what training went on with must not show
    tensors, numbers = held(engine)
    record(target / "end", (tensors, numbers | {"losses": losses}))
    if case.precision == "fp16":
        assert engine.skipped_steps > 0, "no step overflowed"


def load_in_turn(engine: Any, folder: Path) -> None:
    """Loads on one rank after another, while the others take part in no collective: one that needed them would hang."""
    store, call = torch.distributed.distributed_c10d._get_default_store(), next(calls)
    for turn in range(distributed.world_size()):
        if turn == distributed.rank():
            try:
                load(engine, folder)
            finally:
                store.set(f"{call}-{turn}", "")
        else:
            store.wait([f"{call}-{turn}"])


def resume(folder: Path, case: Case) -> None:
    """A new engine loads and goes on: to the bit what went on without a pause."""
    source = saved_at(folder, case, distributed.world_size())
    engine = build(case, folder, seed=1)
    if case.kind == "whole":
        take_steps(engine, 0, 1)  # only then are there whole copies, which what is loaded makes stale
    found = resumed_differs(engine, source, source)
    assert not found, found


def resumed_differs(engine: Any, state: Path, records: Path) -> list[str]:
    """What is not as recorded in an engine that has loaded `state`, at once or when it has gone on."""
    load_in_turn(engine, state)
    at_once = differences(held(engine), recorded(records / "saved"))
    losses = take_steps(engine, BEFORE, BEFORE + AFTER)
    tensors, numbers = held(engine)
    return at_once + differences((tensors, numbers | {"losses": losses}), recorded(records / "end"))


def move(folder: Path, move: Move) -> None:
    """Another stage, or number of ranks, loads: masters and moments to the bit, and its losses are the same to 1e-4."""
    source = saved_at(folder, move.source, move.ranks)
    engine = build(move.target, folder, seed=1)
    load_in_turn(engine, source)
    tensors, numbers = held(engine)
    expected_tensors, expected_numbers = recorded(source / "saved")
    scale, expected_scale = numbers.pop("loss_scale"), expected_numbers.pop("loss_scale")
    for name in ("cur_scale", "cur_iter", "last_overflow_iter"):  # ZeRO 0 holds the others under other names, or not
        assert scale.get(name) == expected_scale.get(name) or move.target.precision != "fp16", name
    if move.source.precision != move.target.precision:
        expected_tensors = {name: value for name, value in expected_tensors.items() if not name.startswith("weight")}
        tensors = {name: tensors[name] for name in expected_tensors}
    found = differences((tensors, numbers), (expected_tensors, expected_numbers))
    assert not found, found
    if move.source.precision == move.target.precision == "fp32":
        losses = take_steps(engine, BEFORE, BEFORE + AFTER)
        expected = recorded(source / "end")[1]["losses"]
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-4, (losses, expected)


def checks(ranks: int, phase: str) -> dict[str, Callable[[Path], None]]:
    """What each rank does, by name."""
    if phase == "move":
        return {f"{each.name} on {ranks}": partial(move, move=each) for each in MOVES[ranks]}
    action = save if phase == "save" else resume
    return {f"{phase} {case.name} on {ranks}": partial(action, case=case) for case in SAVED[ranks]}


def run_rank(rank: int, ranks: int, port: int, phases: list[str], folder: Path) -> None:
    """Tells how each check went, from the first rank."""
    values = (rank, rank, ranks, "127.0.0.1", port)
    os.environ.update(zip(distributed.LAUNCHER_VARIABLES, map(str, values), strict=True))
    distributed.start(timeout_minutes=3)
    for phase in phases:
        distributed_checks.CHECKS = checks(ranks, phase)
        for name, failure in outcomes(folder, list(distributed_checks.CHECKS)):
            if distributed.is_main():
                tell(name, failure)
    distributed.stop()


def main() -> None:
    """Arguments: a folder to work in, and perhaps phases, such as "2-resume", to do no others."""
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    if not (folder / "model").exists():
        save_tiny_model(folder / "model", hidden_scale=1.5)
    gc.freeze()  # DeepSpeed collects garbage for each engine, and need not look at all that was imported
    context = multiprocessing.get_context("fork")
    chosen = [(ranks, phase) for ranks, phase in PHASES if not only or f"{ranks}-{phase}" in only]
    for ranks, group in itertools.groupby(chosen, key=lambda each: each[0]):
        phases = [phase for _, phase in group]
        # Where one rank is all there is, phases that follow one another run side by side.
        together = [phases] if ranks > 1 else [[phase] for phase in phases]
        started = [
            context.Process(target=run_rank, args=(rank, ranks, port, names, folder), daemon=True)
            for names, port in [(names, distributed.free_port()) for names in together]
            for rank in range(ranks)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise SystemExit(f"a rank of {ranks} died while they did: {', '.join(phases)}")


if __name__ == "__main__":
    main()
