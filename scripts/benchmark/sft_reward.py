"""Seconds per token of supervised fine-tuning and reward models: `python -m scripts.benchmark.sft_reward --shape 135m`.

Ours and TRL's trainers run in processes of their own with the same weights and texts, and take turns. TRL comes from
`bash scripts/benchmark/peers.sh`.
"""

import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from scripts.benchmark.peers import PEERS_PYTHON, has_trl, peer_versions
from scripts.benchmark.reporting import circumstances, run_and_keep
from scripts.benchmark.sides import figures, ratio_text, take_turns
from scripts.benchmark.supervised import SupervisedJob, draw_examples
from scripts.benchmark.turns import Worker, WorkerFailed
from scripts.benchmark.workloads import write_models
from training.config import check_batch_sizes, check_range
from training.config_files import load_config

BASELINES = ("trl", "trl-tuned", "trl-packed")
DEFAULTS = {"cpu": (32, 64), "cuda": (256, 512)}
"""Sequences and their mean tokens."""


@dataclass(frozen=True, kw_only=True)
class SupervisedBenchmark:
    """Seconds per real token of steps 1 and 2, ours beside TRL's."""

    model: str | None = None
    """Folder of a causal language model in the Hugging Face layout."""
    shape: Literal["tiny", "135m", "1b", "3b", "8b"] | None = None
    """In place of a model: random weights in the sizes of SmolLM2-135M, Llama-3.2-1B and 3B, or Llama-3.1-8B."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """TRL then trains bf16 weights; ours keeps float32 ones beside them."""
    stages: tuple[Literal["sft", "reward"], ...] = ("sft", "reward")
    """What is trained."""
    lengths: tuple[Literal["equal", "mixed"], ...] = ("equal", "mixed")
    """equal: all sequences have the same tokens. mixed: log-normal ones of the same mean."""
    sides: tuple[Literal["ours", "trl", "trl-tuned", "trl-packed"], ...] = ()
    """What to run; empty means all. trl is TRL as it comes, trl-tuned keeps activations in memory, trl-packed also puts
    several texts into a row (SFT alone)."""
    repeats: int = 3
    """Rounds in which every side has a turn, which is one pass over the data."""
    sequences: int | None = None
    """Sequences of a pass, two of which are a pair; None takes 32 on a CPU and 256 on a GPU."""
    tokens: int | None = None
    """Mean tokens of a sequence; None takes 64 on a CPU and 512 on a GPU."""
    train_batch_size: int = 16
    """Texts or pairs of an optimizer step."""
    micro_batch_size: int = 8
    """Texts or pairs of one forward and backward pass."""
    ours: tuple[str, ...] = ()
    """More options of the step for our side, as in `micro_batch_tokens=2048 engine.zero_stage=2`."""
    interleaved: bool | None = None
    """Keep all sides in memory and let them take turns; None does so on a CPU. Else one runs after the other."""
    peer_python: str = PEERS_PYTHON
    """Interpreter that has TRL: .venv-peers, or this one where that is missing."""
    seed: int = 1
    """Seed of weights and texts."""
    output: str | None = None
    """File for all figures as JSON; None writes none."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise ValueError("model and shape are both given or both missing: give one of them")
        check_range(self, "repeats", "sequences", low=1)
        check_range(self, "tokens", low=3)
        check_batch_sizes(self.train_batch_size, self.micro_batch_size, 1)
        if (self.sequences or DEFAULTS["cpu"][0]) % (2 * self.train_batch_size):
            raise ValueError(f"sequences is {self.sequences}: choose a multiple of 2 x train_batch_size")


def run(config: SupervisedBenchmark) -> dict[str, Any]:
    """Measures, prints a table for each stage and kind of lengths, and returns what the JSON holds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not has_trl(config.peer_python) and set(config.sides) != {"ours"}:
        raise ValueError(
            f"{config.peer_python} has no TRL: run `bash scripts/benchmark/peers.sh`, or choose sides ours"
        )
    interleaved = device.type == "cpu" if config.interleaved is None else config.interleaved
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_models(folder, config.model, config.shape, None, config.seed)["actor"]
        for stage in config.stages:
            for lengths in config.lengths:
                job = make_job(config, stage, lengths, model, device)
                starts = {side: partial(start, config, side, job, folder) for side in chosen_sides(config, stage)}
                look = partial(check_tokens, job)
                measured = take_turns(starts, config.repeats, interleaved=interleaved, look=look)
                one = {"tokens": job.tokens, "longest": job.longest, "sides": figures(measured, BASELINES)}
                found[f"{stage}, {lengths}"] = one
                print_table(f"{stage} {config.precision}, {lengths} lengths", one)
    return {
        **circumstances("scripts.benchmark.sft_reward", config, device, ("torch", "transformers", "deepspeed")),
        "peers": peer_versions(config.peer_python) if has_trl(config.peer_python) else {},
        "runs": found,
    }


def chosen_sides(config: SupervisedBenchmark, stage: str) -> list[str]:
    return [side for side in config.sides or ("ours", *BASELINES) if stage == "sft" or side != "trl-packed"]


def make_job(config: SupervisedBenchmark, stage: str, lengths: str, model: str, device: torch.device) -> SupervisedJob:
    sequences, tokens = DEFAULTS[device.type]
    per_example = 1 if stage == "sft" else 2
    mean_tokens = config.tokens or tokens
    vocab_size = AutoConfig.from_pretrained(model).vocab_size
    count = (config.sequences or sequences) // per_example
    return SupervisedJob(
        stage=stage,
        model=model,
        precision=config.precision,
        sequences=draw_examples(count, per_example, mean_tokens, lengths == "mixed", vocab_size, config.seed),
        train_batch_size=config.train_batch_size,
        micro_batch_size=config.micro_batch_size,
        mean_tokens=mean_tokens,
        settings=[part for o in config.ours for part in (f"--{o.partition('=')[0]}", o.partition("=")[2])],
    )


def start(config: SupervisedBenchmark, side: str, job: SupervisedJob, folder: Path) -> Worker:
    job = replace(job, tuned=side in ("trl-tuned", "trl-packed"), packed=side == "trl-packed")
    python, module = (sys.executable, "ours_supervised") if side == "ours" else (config.peer_python, "trl_supervised")
    return Worker(python, f"scripts.benchmark.workers.{module}", asdict(job), folder / f"{side}.log")


def check_tokens(job: SupervisedJob, answer: Mapping[str, Any]) -> None:
    """Raises WorkerFailed if a pass had other tokens than those that were asked for."""
    if answer["tokens"] != job.tokens:
        raise WorkerFailed(f"its pass had {answer['tokens']} tokens, not {job.tokens}")


def print_table(title: str, one: Mapping[str, Any]) -> None:
    print(f"\n{title}: {one['tokens']} tokens in sequences of up to {one['longest']}")
    print(f"{'':12}{'seconds':>9}{'spread':>8}{'tokens/s':>10}", end="")
    print("".join(f"{baseline + ' / it':>20}" for baseline in BASELINES) + f"{'memory':>11}")
    for side, figure in one["sides"].items():
        if "failure" in figure:
            print(f"{side:12}{figure['failure']}")
            continue
        seconds = statistics.median(figure["seconds"])
        ratios = "".join(f"{ratio_text(figure['ratios'].get(baseline)):>20}" for baseline in BASELINES)
        print(
            f"{side:12}{seconds:9.2f}{figure['spread']:8.0%}{one['tokens'] / seconds:10.0f}{ratios}"
            f"{figure['peak_memory_bytes'] / 2**20:7.0f} MiB"
        )


def main() -> None:
    config = load_config(SupervisedBenchmark)
    run_and_keep(run, config)


if __name__ == "__main__":
    main()
