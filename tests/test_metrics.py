import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training import metrics
from training.config import RunConfig
from training.durable import CannotWrite
from training.metrics import Averages, MetricsLogger, format_line, format_seconds_left, write_json


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(output_dir=str(tmp_path))


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(tensor: Tensor) -> Tensor:
    return tensor


def test_averages_are_weighted_by_their_counts() -> None:
    averages = Averages()
    averages.add("loss", 6.0, 2)
    averages.add("loss", torch.tensor(4.0, requires_grad=True), torch.tensor(3))
    averages.add("kl", 1.0, 4)
    assert averages.reduce(same) == {"kl": 0.25, "loss": 2.0}


def test_averages_start_again_after_reduce() -> None:
    averages = Averages()
    averages.add("loss", 6.0, 2)
    averages.reduce(same)
    averages.add("loss", 1.0, 1)
    assert averages.reduce(same) == {"loss": 1.0}
    assert averages.reduce(same) == {}


def test_averages_over_two_ranks_equal_those_of_one() -> None:
    parts = [(6.0, 2.0), (1.0, 5.0)]
    seen: list[Tensor] = []

    def record(sums: Tensor) -> Tensor:
        seen.append(sums)
        return sums

    for total, count in parts:
        averages = Averages()
        averages.add("loss", total, count)
        averages.reduce(record)
    averages = Averages()
    averages.add("loss", *parts[0])
    assert averages.reduce(lambda sums: seen[0] + seen[1]) == {"loss": 1.0}


def test_a_metric_that_was_never_counted_is_left_out() -> None:
    averages = Averages()
    averages.add("loss", 0.0, 0)
    assert averages.reduce(same) == {}


def test_averages_of_many_small_numbers_do_not_drift() -> None:
    averages = Averages()
    for _ in range(20000):
        averages.add("loss", torch.tensor(0.1), 1)
    assert averages.reduce(same)["loss"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_every_line_has_step_seconds_and_tokens(tmp_path: Path, config: RunConfig) -> None:
    logger = MetricsLogger(tmp_path, 20, config, is_main=True)
    logger.log(10, {"loss": 1.5, "lr": 1e-5}, tokens=640)
    logger.log(15, {}, tokens=320)  # counted, not reported
    logger.log(20, {"loss": 1.25}, tokens=320)
    first, second = read_lines(tmp_path)  # before close: a run that is killed leaves its lines
    logger.close()
    assert list(first) == ["step", "seconds", "tokens", "loss", "lr"]
    assert (first["step"], first["tokens"], first["loss"], first["lr"]) == (10, 640, 1.5, 1e-5)
    assert (second["step"], second["tokens"], second["loss"]) == (20, 1280, 1.25)
    assert 0 <= first["seconds"] <= second["seconds"] < 60


def test_a_run_that_goes_on_appends_and_one_from_the_start_begins_anew(tmp_path: Path, config: RunConfig) -> None:
    state = None
    for resumed, step, tokens, expected in (
        (False, 1, 5, [1]),
        (True, 2, 8, [1, 2]),
        (True, 2, 8, [1, 2]),
        (False, 1, 5, [1]),
    ):
        logger = MetricsLogger(tmp_path, 2, config, is_main=True, resumed=state if resumed else None)
        logger.log(step, {"train/loss": 1.0}, tokens=5 if step == 1 else 3)
        if step == 1:
            state = logger.state(1)
        logger.close()
        lines = read_lines(tmp_path)
        assert [line["step"] for line in lines] == expected  # what came after the checkpoint is cut off
        assert lines[-1]["tokens"] == tokens


def test_a_log_that_is_shorter_than_at_the_checkpoint_is_refused(tmp_path: Path, config: RunConfig) -> None:
    logger = MetricsLogger(tmp_path, 2, config, is_main=True)
    logger.log(1, {"train/loss": 1.0}, tokens=1)
    state = logger.state(1)
    logger.close()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="put the whole file back"):
        MetricsLogger(tmp_path, 2, config, is_main=True, resumed=state)


def test_a_log_that_vanishes_stops_the_run(tmp_path: Path, config: RunConfig) -> None:
    logger = MetricsLogger(tmp_path / "run", 3, config, is_main=True)
    logger.log(1, {"train/loss": 1.0}, tokens=1)
    (tmp_path / "run").rename(tmp_path / "moved")
    for reported in ({"train/loss": 1.0}, {}):  # at every step, not only at one that is logged
        with pytest.raises(CannotWrite, match=r"run/metrics.jsonl is gone"):
            logger.log(2, reported, tokens=1)
    (tmp_path / "moved").rename(tmp_path / "run")
    logger.log(2, {"train/loss": 1.0}, tokens=1)
    logger.close()
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [1, 2]


def test_other_ranks_write_and_print_nothing(
    tmp_path: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = MetricsLogger(tmp_path / "run", 10, config, is_main=False)
    logger.log(1, {"loss": 1.0}, tokens=1)
    logger.event("saved")
    logger.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_numbers_that_json_lacks_become_null(tmp_path: Path, config: RunConfig) -> None:
    logger = MetricsLogger(tmp_path, 10, config, is_main=True)
    logger.log(1, {"loss": float("nan"), "kl": float("inf")}, tokens=1)
    logger.close()
    (line,) = read_lines(tmp_path)
    assert (line["loss"], line["kl"]) == (None, None)


def test_console_line_is_for_a_person(tmp_path: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    logger = MetricsLogger(tmp_path, 400, config, is_main=True)
    logger.event("training on 12 examples")
    logger.log(0, {"loss": 2.0}, tokens=0)
    logger.log(40, {"loss": 1.23456, "lr": 1e-5}, tokens=640)
    logger.log(400, {"loss": 0.5, "lr": 0.0}, tokens=640)
    logger.close()
    event, before, middle, last = capsys.readouterr().out.splitlines()
    assert event == "training on 12 examples"
    assert before == "step   0/400  loss 2  eta --"
    assert re.fullmatch(r"step  40/400  loss 1\.235       lr 1e-05  eta \d+s", middle)
    assert last == "step 400/400  loss 0.5         lr 0  eta 0s"


def test_columns_stay_in_their_places() -> None:
    lines = [
        format_line(step, 1000, {"loss": loss, "kl": kl, "lr": 1e-5})
        for step, loss, kl in [(1, 1.0, -0.5), (10, 123456.789, 1e-12), (1000, float("nan"), -1.234e-10)]
    ]
    for name in ("loss", "kl", "lr"):
        assert len({line.index(f" {name} ") for line in lines}) == 1


def test_console_line_holds_the_first_metrics_only() -> None:
    line = format_line(1, 10, {f"metric{i}": float(i) for i in range(30)})
    assert "metric0" in line
    assert "metric29" not in line
    assert len(line) < 200


@pytest.mark.parametrize(
    ("done", "left", "seconds", "text"),
    [
        (0, 10, 5.0, "--"),
        (10, 10, 45.0, "45s"),
        (10, 100, 20.0, "3m20s"),
        (1, 1, 7500.0, "2h05m"),
        (10, 0, 45.0, "0s"),
        (10, -3, 45.0, "0s"),
    ],
)
def test_time_left(done: int, left: int, seconds: float, text: str) -> None:
    assert format_seconds_left(done, left, seconds) == text


def test_a_continued_run_counts_all_its_time_and_steps(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([1000.0, 1010.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    resumed = {"step": 100, "tokens": 5, "seconds": 100.0, "bytes": 0, "wandb_id": None}
    logger = MetricsLogger(tmp_path, 200, config, is_main=True, resumed=resumed)
    logger.log(110, {"loss": 1.0}, tokens=1)
    logger.close()
    assert capsys.readouterr().out == "step 110/200  loss 1  eta 1m30s\n"
    (line,) = read_lines(tmp_path)
    assert (line["seconds"], line["tokens"]) == (110.0, 6)


def test_a_terminal_gets_a_progress_bar(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    logger = MetricsLogger(tmp_path, 400, config, is_main=True)
    logger.event("kept 3 of [red]4[/red] files")
    logger.log(39, {}, tokens=640)
    logger.log(40, {"loss": 1.25}, tokens=640)
    logger.close()
    printed = capsys.readouterr().out
    assert "kept 3 of [red]4[/red] files" in printed
    assert "step  40/400  loss 1.25" in printed
    assert "40/400 " in printed
    assert "\x1b[?25h" in printed  # the cursor is shown again
    assert read_lines(tmp_path)[0]["step"] == 40


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = RunConfig(output_dir=str(tmp_path), tensorboard=True)
    logger = MetricsLogger(tmp_path, 10, config, is_main=True)
    logger.log(1, {"loss": 0.5}, tokens=1)
    logger.log(2, {"loss": 0.25}, tokens=2)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize(
    ("module", "options"),
    [("torch.utils.tensorboard", {"tensorboard": True}), ("wandb", {"wandb_project": "mine"})],
)
def test_a_missing_service_is_named(
    module: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {module.rpartition('.')[2]}"):
        MetricsLogger(tmp_path, 10, RunConfig(output_dir=str(tmp_path), **options), is_main=True)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"score": 1.5, "share": float("nan"), "names": ("é", "b")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"score": 1.5, "share": None, "names": ["é", "b"]}
    with pytest.raises(TypeError):
        write_json(path, {"score": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["score"] == 1.5
    assert [file.name for file in path.parent.iterdir()] == ["summary.json"]


def test_importing_metrics_loads_no_service() -> None:
    code = "import sys, training.metrics; print([m for m in ('tensorboard', 'wandb', 'deepspeed') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
