"""Engines go on where they were saved, to the bit, and at any ZeRO stage and number of ranks."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from safetensors.torch import load_file, save_file

from tests import engine_state_checks
from tests.engine_state_checks import (
    BF16,
    FP16,
    FULL,
    LORA,
    OPTIM,
    PHASES,
    Case,
    build,
    checks,
    differences,
    held,
    resumed_differs,
    saved_at,
    take_steps,
)
from tests.launching import alone, failures_of
from training.config import EngineConfig, LoraConfig, ModelConfig
from training.engine import train_engine
from training.engine_state import fragments, load, size, snapshot, write
from training.models import load_causal_lm

pytestmark = pytest.mark.usefixtures("process_group")

NAMES = [name for ranks, phase in PHASES for name in checks(ranks, phase)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def failures(folder: Path) -> dict[str, str]:
    """What went wrong in each check of all ranks."""
    return failures_of(alone("tests.engine_state_checks", str(folder)), timeout_seconds=600)


@pytest.fixture(scope="module")
def saved(folder: Path, failures: dict[str, str]) -> Callable[[Case], Path]:
    """Where one rank has saved a case."""
    assert failures
    return lambda case: saved_at(folder, case, 1)


@pytest.mark.parametrize("name", NAMES)
def test_engines_go_on_where_they_were_saved(failures: dict[str, str], name: str) -> None:
    """O1. "resume": to the bit. "into": masters and moments to the bit, losses to 1e-4."""
    assert failures[name] == ""


def forget_tensors(state: Path, kind: str) -> None:
    """Takes out of a saved state what one matrix has learnt of one kind."""
    path = state / "rank-00000.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.startswith(f"{kind}/") and key.endswith("mlp.up_proj.weight/0"))
    tensors[key] = torch.zeros_like(tensors[key])
    save_file(tensors, path)


def forget_number(state: Path, name: str, value: Any) -> None:
    """Sets a number of a saved state, or all of that name, to what a new engine has; "a.b" is number b of a."""
    path = state / "engine.json"
    scalars = json.loads(path.read_text())
    outer, _, inner = name.partition(".")
    if inner:
        assert scalars[outer][inner] != value
        scalars[outer][inner] = value
    elif isinstance(scalars[outer], dict):
        scalars[outer] = dict.fromkeys(scalars[outer], value)
    else:
        scalars[outer] = value
    path.write_text(json.dumps(scalars))


@pytest.mark.parametrize("case", [FULL[0], FULL[2], FULL[3], BF16[0]], ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["nothing", "master", "exp_avg", "exp_avg_sq"])
def test_no_tensor_may_be_forgotten(
    folder: Path, saved: Callable[[Case], Path], tmp_path: Path, case: Case, kind: str
) -> None:
    """The check of resuming sees it if the state of one matrix is lost; and nothing if none is."""
    state = shutil.copytree(saved(case), tmp_path / "state")
    if kind != "nothing":
        forget_tensors(state, kind)
    found = resumed_differs(build(case, folder, seed=1), state, saved(case))
    assert any(name.startswith("weight/") for name in found) == (kind != "nothing"), found
    assert ("losses" in found) == (kind != "nothing"), found


@pytest.mark.parametrize(
    ("case", "name", "value", "seen_in"),
    [
        (FULL[0], "adamw_steps", 1, "losses"),
        (FULL[2], "adamw_steps", 1, "losses"),
        (FULL[3], "adamw_steps", 1, "losses"),
        (FULL[2], "schedule_step", 0, "losses"),
        (FULL[2], "learning_rates", [OPTIM.lr / 2] * 2, "losses"),
        (FP16[2], "loss_scale.cur_scale", 2.0**18, "loss_scale"),
        (FP16[2], "loss_scale.cur_iter", 0, "loss_scale"),
        (FP16[2], "loss_scale.last_overflow_iter", -1, "loss_scale"),
        (FP16[2], "loss_scale.cur_hysteresis", 2, "loss_scale"),
        (FP16[0], "loss_scale.cur_scale", 2.0**18, "loss_scale"),
        (FULL[2], "counters.global_steps", 0, "counters"),
        (FULL[2], "counters.global_samples", 0, "counters"),
        (FULL[2], "counters.micro_steps", 0, "counters"),
        (FP16[2], "counters.skipped_steps", 0, "counters"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_no_number_may_be_forgotten(
    folder: Path, saved: Callable[[Case], Path], tmp_path: Path, case: Case, name: str, value: Any, seen_in: str
) -> None:
    state = shutil.copytree(saved(case), tmp_path / "state")
    forget_number(state, name, value)
    assert seen_in in resumed_differs(build(case, folder, seed=1), state, saved(case))


@pytest.mark.parametrize("case", [*FULL, BF16[0]], ids=lambda case: case.name)
def test_an_engine_that_has_taken_no_step_is_saved_and_loaded(
    folder: Path, saved: Callable[[Case], Path], tmp_path: Path, case: Case
) -> None:
    """Into one that has: what is loaded takes the place of all that it held."""
    fresh = build(case, folder)
    write(snapshot(fresh), tmp_path, rank=0, is_main=True)
    used = build(case, folder)
    take_steps(used, 0, 2)
    load(used, tmp_path)
    assert not used.basic_optimizer.state
    expected, losses = take_steps(fresh, 0, 2), take_steps(used, 0, 2)
    assert losses == expected
    assert not differences(held(used), held(fresh))


@pytest.mark.parametrize("case", [FULL[2], LORA[3]], ids=lambda case: case.name)
def test_a_state_is_loaded_twice_and_into_an_engine_that_has_finished(
    folder: Path, saved: Callable[[Case], Path], case: Case
) -> None:
    engine = build(case, folder)
    for _ in range(2):
        assert not resumed_differs(engine, saved(case), saved(case))


@pytest.mark.parametrize("case", [FULL[2], LORA[0]], ids=lambda case: case.name)
def test_the_size_is_told_before(folder: Path, saved: Callable[[Case], Path], case: Case) -> None:
    """12 bytes for each trainable value; the headers of a model this small are not small beside it."""
    files = list(saved(case).glob("rank-*.safetensors"))
    values = sum(tensor.numel() for tensor in load_file(files[0]).values())
    assert len(files) == 1
    assert size(build(case, folder)) == 4 * values
    assert 4 * values < files[0].stat().st_size < 4 * values + 300 * 100


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_frozen_parameter_is_saved(folder: Path, saved: Callable[[Case], Path], stage: int) -> None:
    names = {key.split("/")[1] for key in load_file(saved(LORA[stage]) / "rank-00000.safetensors")}
    assert names and all("lora_" in name for name in names)


def test_fragments_are_views_of_what_training_updates(folder: Path) -> None:
    engine = build(FULL[2], folder)
    take_steps(engine, 0, 1)
    before = {(name, start): live["master"].clone() for name, start, live in fragments(engine)}
    take_steps(engine, 1, 2)
    assert all(not torch.equal(live["master"], before[name, start]) for name, start, live in fragments(engine))


def test_deepspeed_reads_what_was_loaded(folder: Path, saved: Callable[[Case], Path]) -> None:
    """Its accessors hold on to the moments of the first step: those that `load` has put there take their place."""
    engine = build(FULL[2], folder)
    take_steps(engine, 0, 1)
    load(engine, saved(FULL[2]))
    take_steps(engine, 1, 2)
    parameters = dict(engine.module.named_parameters())
    for name, _, live in fragments(engine):
        assert torch.equal(safe_get_full_optimizer_state(parameters[name], "exp_avg").flatten(), live["exp_avg"])


def edited(state: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(state, target)
    scalars = json.loads((target / "engine.json").read_text())
    edit(scalars)
    (target / "engine.json").write_text(json.dumps(scalars))
    return target


@pytest.fixture(scope="module")
def engine(folder: Path, failures: dict[str, str]) -> Iterator[Any]:
    yield build(FULL[2], folder)


def test_a_state_of_another_model_is_refused(
    engine: Any, folder: Path, saved: Callable[[Case], Path], tmp_path: Path
) -> None:
    name = "model.norm.weight"
    cases: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda scalars: scalars["shapes"].pop(name), f"does not hold {name}, which this run trains: resume with"),
        (lambda scalars: scalars["shapes"].update(extra=[2]), "holds extra, which this run does not train: resume"),
        (lambda scalars: scalars["shapes"].update({name: [31]}), rf"{name} has the shape \[31\] .* and \[32\] here"),
    ]
    for index, (edit, message) in enumerate(cases):
        before = held_masters(engine)
        with pytest.raises(ValueError, match=message):
            load(engine, edited(saved(FULL[2]), tmp_path / str(index), edit))
        assert all(map(torch.equal, held_masters(engine), before))
    with pytest.raises(ValueError, match=r"does not hold .*which this run trains.*the LoRA options"):
        load(build(LORA[2], folder), saved(FULL[2]))


def held_masters(engine: Any) -> list[torch.Tensor]:
    return [live["master"].clone() for _, _, live in fragments(engine)]


def test_adapters_of_another_rank_are_refused(
    folder: Path, saved: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_state_checks, "LoraConfig", lambda rank: LoraConfig(rank=2 * rank))
    with pytest.raises(ValueError, match=r"lora_A.* has the shape \[4, 32\] in the checkpoint and \[8, 32\] here"):
        load(build(LORA[2], folder), saved(LORA[2]))


def test_a_missing_file_is_named(engine: Any, folder: Path, failures: dict[str, str], tmp_path: Path) -> None:
    assert failures
    state = shutil.copytree(saved_at(folder, FULL[2], 2), tmp_path / "state")
    (state / "rank-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rank-00001.safetensors is missing: bring the files of all 2 ranks"):
        load(engine, state)


def test_values_that_no_file_holds_are_named(engine: Any, saved: Callable[[Case], Path], tmp_path: Path) -> None:
    state = shutil.copytree(saved(FULL[2]), tmp_path / "state")
    tensors = load_file(state / "rank-00000.safetensors")
    tensors["exp_avg/model.norm.weight/0"] = tensors["exp_avg/model.norm.weight/0"][:30].clone()
    save_file(tensors, state / "rank-00000.safetensors")
    with pytest.raises(ValueError, match=r"holds 30 of 32 values exp_avg of model.norm.weight"):
        load(engine, state)


def test_an_optimizer_whose_state_lies_elsewhere_is_refused(folder: Path, engine: Any, tmp_path: Path) -> None:
    """Gradients added up in float32 beside bf16 weights: another optimizer of DeepSpeed."""
    raw = tmp_path / "deepspeed.json"
    raw.write_text(json.dumps({"data_types": {"grad_accum_dtype": "fp32"}}))
    config = EngineConfig(zero_stage=1, precision="bf16", deepspeed_config=str(raw))
    model = load_causal_lm(ModelConfig(path=str(folder / "model")), torch.bfloat16)
    other = train_engine(model, config, OPTIM, train_batch_size=4, total_steps=1)
    with pytest.raises(ValueError, match=r"BF16_Optimizer .* take data_types"):
        snapshot(other)
