"""A worker that runs iterations of step 3: `scripts.benchmark.ppo` starts it."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from scripts.benchmark.turns import Turns
from scripts.benchmark.workloads import FIRST_WORD, PAD, PpoJob
from step3_ppo import train as stage
from training import distributed
from training.data import collate
from training.engine import generation_mode
from training.forward import response_logprobs
from training.generation.backends import GENERATORS
from training.generation.interface import Completion, Endings, SamplingConfig

PHASES = ("generate", "score", "train")


class NobodyAsks(Exception):
    """Leaves the stage's `main`."""


class ForcedLengths:
    """A rollout backend whose responses have the lengths that the job asks for; nothing else ends them."""

    def __init__(self, generator: Any, job: PpoJob) -> None:
        self.generator, self.job = generator, job

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def generate(
        self, prompt_ids: list[list[int]], sampling: SamplingConfig, seeds: list[int], *args: Any, **options: Any
    ) -> list[Completion]:
        """As `Generator.generate`, with limits of its own for the job's prompts."""
        left = {tuple(ids): iter(n) for ids, n in zip(self.job.prompt_ids, self.job.response_lengths, strict=True)}
        limits = [next(left[tuple(ids)]) if tuple(ids) in left else 1 for ids in prompt_ids]
        return self.generator.generate(prompt_ids, sampling, seeds, limits, *args[1:], **options)


class GivenResponses:
    """In place of a rollout backend: the job's responses, with log-probabilities from a plain forward of the actor."""

    def __init__(self, actor: Any, job: PpoJob) -> None:
        self.actor, self.job = actor, job

    def generate(
        self, prompt_ids: list[list[int]], sampling: SamplingConfig, *args: Any, **options: Any
    ) -> list[Completion]:
        """As `Generator.generate`; to other prompts than the job's, one word."""
        assert self.job.responses is not None
        left = {tuple(ids): iter(given) for ids, given in zip(self.job.prompt_ids, self.job.responses, strict=True)}
        responses = [next(left[tuple(ids)]) if tuple(ids) in left else [FIRST_WORD] for ids in prompt_ids]
        rows = [
            (ids + response, [False] * len(ids) + [True] * len(response))
            for ids, response in zip(prompt_ids, responses, strict=True)
        ]
        batch = collate(rows, pad_id=PAD).to(distributed.device())
        with torch.no_grad():
            logprobs = response_logprobs(self.actor, batch, sampling.temperature)[0]
        return [
            Completion(response, row[mask].tolist(), finished=False)
            for response, row, mask in zip(responses, logprobs, batch.response_mask, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """See `Generator.metrics`."""
        return {}

    def sleep(self) -> None:
        """See `Generator.sleep`."""


class Iterations:
    """Pauses `step3_ppo.train` before each rollout, and takes the place of the functions that it looks up by name."""

    def __init__(self, turns: Turns, job: PpoJob) -> None:
        self.turns, self.job = turns, job
        self.load, self.rollout, self.logger = stage.load_models, stage.collect, stage.MetricsLogger
        self.metrics: Mapping[str, float] = {}
        self.lengths: list[int] = []
        self.is_running = False

    def load_models(self, *args: Any) -> Any:
        models, config = self.load(*args), args[0]
        if self.job.responses is not None:
            return replace(models, generator=GivenResponses(models.actor, self.job))
        open_module = partial(generation_mode, models.actor)
        generator = GENERATORS[config.generator](open_module, Endings.of(()), config.generation_batch_size)
        return replace(models, generator=ForcedLengths(generator, self.job))

    def collect(self, *args: Any) -> Any:
        """The iteration before is over when the next one begins."""
        if self.is_running:
            seconds = {name: self.metrics.get(f"seconds/{name}", 0.0) for name in PHASES}
            self.turns.end(within=seconds, response_tokens=self.lengths, metrics=self.metrics)
        self.is_running = True
        if not self.turns.begin("other"):
            raise NobodyAsks
        rollout = self.rollout(*args)
        self.lengths = [len(completion.response_ids) for completion in rollout.completions]
        return rollout

    def make_logger(self, *args: Any, **options: Any) -> Any:
        logger = self.logger(*args, **options)
        log = logger.log

        def keep(step: int, metrics: Mapping[str, float], *rest: Any, **named: Any) -> None:
            self.metrics = metrics
            log(step, metrics, *rest, **named)

        logger.log = keep  # type: ignore[method-assign]
        return logger


def options_of(job: PpoJob, folder: Path) -> list[str]:
    """The stage's command line; the job's settings come last and win."""
    options: dict[str, Any] = {
        "actor.path": job.actor,
        "reward.path": job.reward,
        "data.paths": write_prompts(folder / "prompts.jsonl", job.prompt_ids),
        # A short prompt that is none of the others: every stage wants one.
        "data.eval_paths": write_prompts(folder / "held_out.jsonl", [[FIRST_WORD]]),
        "data.format": "prompt",
        "data.template": "plain",
        "data.max_prompt_tokens": max(map(len, job.prompt_ids)),
        "run.output_dir": folder / "run",
        "engine.precision": job.precision,
        "engine.zero_stage": 0,
        "sampling.max_new_tokens": job.max_response,
        "rollout_batch_size": len(job.prompt_ids),
        "samples_per_prompt": job.samples_per_prompt,
        "train_batch_size": job.rows,
        "micro_batch_size": job.micro_batch_size,
        "generation_batch_size": job.rows,
        "estimator": "gae" if job.samples_per_prompt == 1 else "rloo",
        "ppo_epochs": job.epochs,
        "iterations": 1000,
    }
    if job.reference != job.actor:
        options["reference_path"] = job.reference
    for model in ("actor", "critic"):
        options |= {f"{model}_optim.lr": job.lr, f"{model}_optim.schedule": "constant"}
        options |= {f"{model}_optim.warmup_fraction": 0, f"{model}.lora.rank": job.lora_rank}
    return [*(part for name, value in options.items() for part in (f"--{name}", str(value))), *job.settings]


def write_prompts(path: Path, prompts: Sequence[Sequence[int]]) -> str:
    texts = [" ".join(f"w{index}" for index in ids) for ids in prompts]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def run(turns: Turns, job: PpoJob) -> None:
    """Runs step 3, one iteration for each turn."""
    iterations = Iterations(turns, job)
    with tempfile.TemporaryDirectory() as name:
        arguments = ["step3_ppo.train", *options_of(job, Path(name))]
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(stage, "load_models", iterations.load_models),
            mock.patch.object(stage, "collect", iterations.collect),
            mock.patch.object(stage, "MetricsLogger", iterations.make_logger),
            contextlib.suppress(NobodyAsks),
        ):
            stage.main()


if __name__ == "__main__":
    turns = Turns()
    run(turns, PpoJob(**turns.job))
    distributed.stop()
