"""A run holds its folder, and one that has finished is not run again by accident."""

from pathlib import Path

import pytest

from step1_sft.config import SftConfig
from training.config import DataConfig, ModelConfig, RunConfig
from training.durable import OutputLock
from training.run import has_finished, running, write_results


def config(folder: Path, max_steps: int = 3, **run: str) -> SftConfig:
    return SftConfig(
        model=ModelConfig(path="unused"),
        data=DataConfig(paths=("unused.jsonl",), format="prompt_response"),
        run=RunConfig(output_dir=str(folder), **run),  # type: ignore[arg-type]
        max_steps=max_steps,
    )


def test_a_run_has_finished_when_its_results_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not has_finished(config(tmp_path))
    write_results(config(tmp_path), {"loss_after": 1.0})
    assert has_finished(config(tmp_path))
    assert "this run has finished" in capsys.readouterr().out
    assert not has_finished(config(tmp_path, resume="never"))


def test_results_of_another_run_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    write_results(config(tmp_path), {})
    with pytest.raises(ValueError, match="max_steps: 3 then, 4 now"):
        has_finished(config(tmp_path, max_steps=4))


def test_a_folder_in_use_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match=r"is in use by pid \d+ on host")
    with OutputLock(tmp_path), refused, running(config(tmp_path)):
        raise AssertionError("two runs in one folder")
