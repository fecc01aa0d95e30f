"""A worker that runs passes of steps 1 and 2 over their data: `scripts.benchmark.sft_reward` starts it."""

import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from scripts.benchmark.supervised import SupervisedJob
from scripts.benchmark.turns import Turns
from training import distributed

MODULES = {"sft": "step1_sft.train", "reward": "step2_reward.train"}


class NobodyAsks(Exception):
    """Leaves the stage's `main`."""


def write_records(path: Path, records: Sequence[Mapping[str, str]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def options_of(job: SupervisedJob, folder: Path) -> list[str]:
    """The stage's command line; the job's settings come last and win."""
    options: dict[str, Any] = {
        "model.path": job.model,
        "data.paths": write_records(folder / "train.jsonl", job.records),
        "data.eval_paths": write_records(folder / "held_out.jsonl", job.held_out),
        "data.format": "prompt_response" if job.stage == "sft" else "chosen_rejected",
        "data.template": "plain",
        "data.max_response_tokens": job.longest,
        "run.output_dir": folder / "run",
        "engine.precision": job.precision,
        "engine.zero_stage": 0,
        "optim.lr": 1e-6,
        "optim.schedule": "constant",
        "optim.warmup_fraction": 0,
        "train_batch_size": job.train_batch_size,
        "micro_batch_size": job.micro_batch_size,
        "epochs": 1000,
    }
    if job.stage == "sft":
        options["loss_on"] = "all"
    return [*(part for name, value in options.items() for part in (f"--{name}", str(value))), *job.settings]


def main() -> None:
    turns = Turns()
    job = SupervisedJob(**turns.job)
    stage: Any = importlib.import_module(MODULES[job.stage])
    make_steps = stage.own_steps

    def own_steps(*args: Any, **options: Any) -> Iterator[Any]:
        """The stage's steps, as many at a time as make one pass."""
        steps = make_steps(*args, **options)
        while turns.begin("train"):
            tokens = 0
            for _ in range(len(job.records) // job.train_batch_size):
                micro_batches = next(steps)
                tokens += sum(micro_batch.num_tokens for micro_batch in micro_batches)
                yield micro_batches
            turns.end(tokens=tokens)
        raise NobodyAsks

    with tempfile.TemporaryDirectory() as name:
        arguments = [MODULES[job.stage], *options_of(job, Path(name))]
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(stage, "own_steps", own_steps),
            contextlib.suppress(NobodyAsks),
        ):
            stage.main()
    distributed.stop()


if __name__ == "__main__":
    main()
