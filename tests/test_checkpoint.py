"""What a run saves it goes on from; what it must not go on from is refused, by name."""

import json
import random
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from step1_sft.config import SftConfig
from training import distributed, storage
from training.checkpoint import FOLDER, Checkpoints, RunState, refuse_changes
from training.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from training.engine import backward_and_step, train_engine
from training.supervision import EXIT_STOPPED

pytestmark = pytest.mark.usefixtures("process_group")

FP32 = EngineConfig(zero_stage=0, precision="fp32")
STEADY = OptimConfig(lr=0.1, schedule="constant", warmup_fraction=0.0)


class Stopper:
    """A supervisor that is asked to stop when a test says so."""

    stop = False

    def __init__(self) -> None:
        self.moved: list[tuple[str, int]] = []

    def progress(self, phase: str, step: int) -> None:
        self.moved.append((phase, step))

    def should_stop(self) -> bool:
        return self.stop


class Trial:
    """A run of one weight, whose state is kept."""

    def __init__(self, folder: Path, data: str = "as it was", lr: float = 0.1, **run: Any) -> None:
        options = {"save_minutes": 0.0} | run
        self.config = SftConfig(
            model=ModelConfig(path="unused"),
            data=DataConfig(paths=("unused.jsonl",), format="prompt_response"),
            run=RunConfig(output_dir=str(folder), **options),
            optim=OptimConfig(lr=lr),
        )
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        self.engine = train_engine(model, FP32, STEADY, train_batch_size=1, total_steps=99)
        self.supervisor = Stopper()
        self.checkpoints = Checkpoints(self.config, {"model": self.engine}, self.supervisor, data=data)  # type: ignore[arg-type]
        self.root = folder / FOLDER

    @property
    def weight(self) -> float:
        return float(self.engine.module.weight)

    def step(self, number: int, metric: float | None = None, **options: Any) -> None:
        backward_and_step(self.engine, self.engine(torch.ones(1, 1)).sum())
        state = RunState(number, {"number": number}, {"tensor": torch.tensor([float(number)])}, metric)
        self.checkpoints.after_step(number, lambda: state, **options)

    def names(self) -> list[str]:
        return storage.checkpoint_names(self.root)


@pytest.fixture
def trial(tmp_path: Path) -> Callable[..., Trial]:
    def make(**options: Any) -> Trial:
        return Trial(tmp_path / "run", **options)

    return make


def test_a_new_run_finds_nothing_to_go_on_from(trial: Callable[..., Trial]) -> None:
    assert trial().checkpoints.restore() is None


def test_a_run_goes_on_with_all_that_was_saved(trial: Callable[..., Trial]) -> None:
    first = trial(save_every=2)
    for step in (1, 2):
        first.step(step, metric=0.25)
    weight = first.weight
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(1)))
    first.checkpoints.close()
    second = trial(save_every=2)
    restored = second.checkpoints.restore()
    assert restored is not None
    assert (restored.step, restored.values, restored.metric) == (2, {"number": 2}, 0.25)
    assert restored.tensors["tensor"].tolist() == [2.0]
    assert second.weight == weight != 1.0
    assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == drawn
    assert second.engine.global_steps == 2


def test_it_is_saved_when_it_is_time_and_not_else(trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    by_steps = trial(save_every=3, keep_checkpoints=9)
    for step in range(1, 8):
        by_steps.step(step, may_save=step != 3)
    by_steps.checkpoints.close()
    assert by_steps.names() == ["step-000006"]
    shutil.rmtree(by_steps.root)
    clock = 0.0
    monkeypatch.setattr("training.checkpoint.time", SimpleNamespace(monotonic=lambda: clock))
    by_time = trial(save_minutes=2.0, keep_checkpoints=9)
    for step in range(1, 8):
        clock += 50.0
        by_time.step(step)
    by_time.checkpoints.close()
    assert by_time.names() == ["step-000003", "step-000006"]


def test_the_newest_and_the_best_are_kept(trial: Callable[..., Trial]) -> None:
    run = trial(save_every=1, keep_checkpoints=2)
    for step, metric in enumerate([0.1, 0.7, None, 0.3, 0.2, None], start=1):
        run.step(step, metric=metric)
    run.checkpoints.close()
    assert run.names() == ["step-000002", "step-000005", "step-000006"]


def test_a_run_that_is_asked_to_stop_saves_first(trial: Callable[..., Trial]) -> None:
    run = trial()
    run.step(1)
    run.supervisor.stop = True
    with pytest.raises(SystemExit) as end:
        run.step(2, may_save=False)
    assert end.value.code == EXIT_STOPPED
    assert run.names() == ["step-000002"]


def test_of_a_damaged_checkpoint_the_one_before_is_taken(
    trial: Callable[..., Trial], capfd: pytest.CaptureFixture[str]
) -> None:
    run = trial(save_every=1)
    for step in (1, 2):
        run.step(step)
    run.checkpoints.close()
    file = next((run.root / "step-000002" / "model").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    restored = trial().checkpoints.restore()
    assert restored is not None and restored.step == 1
    assert "has changed" in capfd.readouterr().out
    assert (run.root / "damaged-step-000002").is_dir()


def test_where_no_checkpoint_is_good_nothing_is_begun_anew_in_silence(trial: Callable[..., Trial]) -> None:
    run = trial(save_every=1)
    run.step(1)
    run.checkpoints.close()
    (run.root / "step-000001" / "state.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is good: set run\.resume never"):
        trial().checkpoints.restore()


def test_a_run_that_begins_anew_puts_old_checkpoints_aside(trial: Callable[..., Trial]) -> None:
    run = trial(save_every=1)
    run.step(1)
    run.checkpoints.close()
    anew = trial(resume="never")
    assert anew.checkpoints.restore() is None
    assert anew.names() == []
    assert (run.root / "old-step-000001").is_dir()


def test_other_options_are_listed_and_refused_unless_allowed(trial: Callable[..., Trial]) -> None:
    run = trial(save_every=1)
    run.step(1)
    run.checkpoints.close()
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.1 then, 0\.2 now\n.*run\.allow_changes True"):
        trial(lr=0.2).checkpoints.restore()
    with pytest.raises(ValueError, match="digest of the training data: as it was then, another now"):
        trial(data="another").checkpoints.restore()
    assert trial(lr=0.2, data="another", allow_changes=True).checkpoints.restore() is not None


def test_options_that_change_nothing_learnt_may_change() -> None:
    saved = {"optim": {"lr": 0.1}, "engine": {"zero_stage": 2}, "micro_batch_size": 8, "run": {"output_dir": "a"}}
    own = {"optim": {"lr": 0.1}, "engine": {"zero_stage": 3}, "micro_batch_size": 4, "run": {"output_dir": "b"}}
    refuse_changes(saved, own, Path("there"), allowed=False)
    with pytest.raises(ValueError, match=r"there comes from a run with other options:\n  seed: not there then, 1 now"):
        refuse_changes(saved, own | {"seed": 1}, Path("there"), allowed=False)


def test_weights_that_are_not_finite_are_never_saved(trial: Callable[..., Trial]) -> None:
    run = trial(save_every=1)
    run.step(1)
    run.checkpoints.close()
    with torch.no_grad():
        run.engine.module.weight.fill_(float("nan"))
    run.step(2)
    with pytest.raises(RuntimeError, match=r"master/weight/0 of model is not finite\. The last good checkpoint"):
        run.checkpoints.close()
    assert run.names() == ["step-000001"]


def test_a_full_disk_leaves_the_last_good_one_and_says_so(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trial(save_every=1)
    run.step(1)
    run.checkpoints.close()

    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.engine_state.save_file", no_room)
    run.step(2)
    with pytest.raises(OSError, match=r"No space left.*bytes needed.*The last good checkpoint is untouched"):
        run.checkpoints.close()
    assert run.names() == ["step-000001"]
    monkeypatch.undo()
    again = trial(save_every=1)
    restored = again.checkpoints.restore()
    assert restored is not None and restored.step == 1
    again.step(2)
    again.checkpoints.close()
    assert run.names() == ["step-000001", "step-000002"]


def test_what_fails_on_one_rank_ends_the_save_on_all(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trial(save_every=1)
    run.step(1)
    monkeypatch.setattr("training.checkpoint.gather_objects", lambda own: [own, "its disk is full"])
    with pytest.raises(OSError, match="rank 1: its disk is full"):
        run.checkpoints.close()
    assert run.names() == []


def test_every_step_is_told_to_the_watchdog(trial: Callable[..., Trial]) -> None:
    run = trial()
    for step in (1, 2):
        run.step(step)
    assert run.supervisor.moved == [("train", 1), ("train", 2)]


def test_a_checkpoint_says_what_it_comes_from(trial: Callable[..., Trial]) -> None:
    run = trial(save_every=1)
    run.step(1)
    run.checkpoints.close()
    facts = json.loads((run.root / "step-000001" / "MANIFEST.json").read_text())["facts"]
    assert facts["step"] == 1 and facts["ranks"] == distributed.world_size() == 1
    assert facts["options"]["optim"]["lr"] == 0.1
    assert facts["versions"]["torch"] == version("torch")
