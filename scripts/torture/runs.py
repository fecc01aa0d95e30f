"""The tiny runs that are tortured, and what must be the same at the end of each."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from scripts.torture.ranks import start
from tests.tiny_models import save_tiny_model, write_tiny_data
from tests.tiny_runs import STAGES, depends_on_machine, tiny_configs, with_lora
from training import storage
from training.checkpoint import FOLDER
from training.manifest import checkpoint_step

WAIT_SECONDS = 300.0


class Run:
    """One stage in a folder of its own."""

    def __init__(self, stage: str, folder: Path, options: dict[str, Any]) -> None:
        self.stage, self.options = stage, options
        self.output = folder / stage
        self.log = folder / f"{stage}.log"
        self.file = folder / f"{stage}.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self, **changes: Any) -> None:
        """Write the options, some of them changed, for the next start."""
        run = self.options["run"] | {"output_dir": str(self.output)}
        self.file.write_text(yaml.safe_dump(self.options | {"run": run} | changes))

    @property
    def checkpoints(self) -> Path:
        return self.output / FOLDER

    def newest(self) -> int:
        """Steps in the newest folder that has a checkpoint's name; 0 without one."""
        names = storage.checkpoint_names(self.checkpoints)
        return checkpoint_step(names[-1]) if names else 0

    def steps_logged(self) -> int:
        """The step in the last line of metrics.jsonl."""
        file = self.output / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        whole = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        return whole[-1] if whole else 0

    def finish(self, ranks: int = 2) -> None:
        """Run to the end. Raises AssertionError if it does not go well."""
        processes = start(self.stage, self.file, self.log, ranks)
        ended = processes.wait(WAIT_SECONDS)
        processes.kill()
        codes = sorted(processes.codes.values())
        assert ended and codes == [0] * ranks, f"{self.stage} ended with {codes}:\n{self.log.read_text()[-3000:]}"

    def forget(self) -> None:
        """Remove all that the run has written."""
        shutil.rmtree(self.output, ignore_errors=True)

    def digest(self) -> str:
        """Of all final weights, and of all numbers in metrics.jsonl and results.json but clocks."""
        result = hashlib.sha256()
        for file in sorted((self.output / "final").rglob("*.safetensors")):
            result.update(str(file.relative_to(self.output)).encode() + file.read_bytes())
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        for text in [*lines, (self.output / "results.json").read_text()]:
            result.update(json.dumps(_without_clocks(json.loads(text)), sort_keys=True).encode())
        return result.hexdigest()

    def numbers(self) -> list[float]:
        """Losses, scores and the like in metrics.jsonl, without clocks."""
        lines = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        rows = [_without_clocks(line) for line in lines]
        return [float(row[name]) for row in rows for name in sorted(row) if row[name] is not None and name != "tokens"]


def _without_clocks(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if not depends_on_machine(name)}


class Workshop:
    """A folder with a tiny model, data, and finished runs of the three stages to compare with."""

    def __init__(self, folder: Path, *, zero_stage: int, lora: bool, precision: str) -> None:
        self.folder, self.zero_stage = folder, zero_stage
        for part in ("model", "data"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        model = save_tiny_model(folder / "model")
        data = write_tiny_data(folder / "data")
        self.options = tiny_configs(folder / "right", model, data, zero_stage=zero_stage, precision=precision)
        if lora:
            with_lora(self.options)
        for stage, options in self.options.items():
            options["run"] |= {"save_every": 1 if stage == "step3_ppo" else 2, "timeout_minutes": 1.0, "eval_every": 3}
        for stage in STAGES[:2]:
            self.options[stage] |= {"max_steps": 12, "epochs": 9}
        # Micro-batches of 1, so that 4 ranks can have one each.
        self.options["step3_ppo"] |= {"iterations": 5, "ema_decay": 0.5, "micro_batch_size": 1}
        self.right = {stage: Run(stage, folder / "right", options) for stage, options in self.options.items()}
        self.seconds: dict[str, float] = {}
        for stage, run in self.right.items():
            started = time.monotonic()
            run.finish()
            self.seconds[stage] = time.monotonic() - started

    def copy(self, stage: str, folder: str, **changes: Any) -> Run:
        """The same run in another folder, with some options of `run` changed."""
        options = self.options[stage]
        return Run(stage, self.folder / folder, options | {"run": options["run"] | changes})
