"""What a run reports: means over ranks, a line on the console, metrics.jsonl, and TensorBoard or W&B when asked for."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.config import RunConfig
from training.durable import CannotWrite, cut_lines, synced_length, write_durably
from training.spikes import Spikes

# A console line holds the first few metrics in the order given; metrics.jsonl holds them all.
CONSOLE_METRICS = 8


class Averages:
    """Sums of numbers and of their counts, until `reduce` makes means over all ranks of them."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, Any]] = {}

    def add(self, name: str, total: float | Tensor, count: float | Tensor) -> None:
        """Adds `total`, a sum over `count` things, to a metric. Tensors hold one number, which is not waited for."""
        total_before, count_before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total_before + _as_float64(total), count_before + _as_float64(count))

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each metric since the last call, over all ranks; then starts again at nothing.

        Every rank must have added the same names, with a count of 0 where it had nothing. A metric that no rank counted
        is left out.

        Args:
            sum_over_ranks: adds up a tensor [metrics, 2] of sums and counts elementwise over the ranks.
        """
        names = sorted(self._sums)
        pairs = [[float(total), float(count)] for total, count in (self._sums[name] for name in names)]
        self._sums = {}
        sums = sum_over_ranks(torch.tensor(pairs, dtype=torch.float64).reshape(len(names), 2)).tolist()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count != 0}


class MetricsLogger:
    """Writes a run's metrics: on the main rank to the console and to files, on the others to nowhere.

    Args:
        output_dir: folder of metrics.jsonl, which a run from step 0 begins anew and one from a later step continues.
        total_steps: number of steps that the run will have taken at its end, for the time left.
        config: which services to write to.
        is_main: true on the rank that writes.
        resumed: what `state` gave at the checkpoint that the run goes on from; None for a new run.
    """

    def __init__(
        self,
        output_dir: str | Path,
        total_steps: int,
        config: RunConfig,
        is_main: bool,
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        self._is_main, self._total_steps = is_main, total_steps
        resumed = resumed or {"step": 0, "tokens": 0, "seconds": 0.0, "bytes": 0, "wandb_id": None}
        self._start_step = resumed["step"]
        self._start_seconds = time.monotonic() - resumed["seconds"]
        self.tokens = resumed["tokens"]
        self._wandb: Any = None
        if not is_main:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._tensorboard = open_tensorboard(folder / "tensorboard", self._start_step) if config.tensorboard else None
        if config.wandb_project:
            self._wandb = open_wandb(config.wandb_project, folder, resumed["wandb_id"])
        self._path = folder / "metrics.jsonl"
        cut_lines(self._path, resumed["bytes"])
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._spikes = Spikes()
        for line in self._path.read_text(encoding="utf-8").splitlines():
            self._spikes.look(json.loads(line))
        self._bar = ProgressBar(total_steps, self._start_step) if sys.stdout.isatty() else None

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between a stop and going on."""
        return time.monotonic() - self._start_seconds

    def state(self, step: int) -> dict[str, Any]:
        """What a run that goes on after `step` steps must know of the log, whose lines are then on the disk."""
        if not self._is_main:
            return {"step": step, "tokens": self.tokens, "seconds": self.seconds}
        return {
            "step": step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "bytes": synced_length(self._path),
            "wandb_id": None if self._wandb is None else self._wandb.id,
        }

    def log(self, step: int, metrics: Mapping[str, float], tokens: int) -> None:
        """Reports the metrics of a step.

        Args:
            step: number of steps done.
            metrics: numbers by name, the most telling first; if there are none, the step is counted but not reported.
            tokens: tokens that this step trained on, over all ranks; files show their sum up to here.

        Raises: `CannotWrite` if somebody moved or removed metrics.jsonl or its folder: what the run would save is lost.
        """
        self.tokens += tokens
        if not self._is_main:
            return
        if not self._path.exists():
            raise CannotWrite(f"{self._path} is gone, so the run stops: leave the folder of a run in its place")
        if not metrics:
            if self._bar is not None:
                self._bar.advance(step)
            return
        seconds = self.seconds
        record = {"step": step, "seconds": round(seconds, 3), "tokens": self.tokens, **metrics}
        self._file.write(json.dumps(finite_or_null(record)) + "\n")
        line = format_line(step, self._total_steps, metrics)
        if self._bar is not None:
            self._bar.update(step, line)
        else:
            left = format_seconds_left(step, self._total_steps - step, seconds)
            print(f"{line}  eta {left}", flush=True)
        for spike in self._spikes.look(metrics):
            self.event(f"step {step}: {spike}")
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**metrics, "tokens": self.tokens}, step=step)

    def event(self, message: str) -> None:
        """Prints one line for a person: what has happened, not a number."""
        if self._is_main:
            if self._bar is not None:
                self._bar.print(message)
            else:
                print(message, flush=True)

    def close(self) -> None:
        """Ends the progress bar and closes the files. A second call does nothing."""
        if not self._is_main or self._file.closed:
            return
        self._file.close()
        if self._bar is not None:
            self._bar.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class ProgressBar:
    """A bar with the time left at the bottom of the terminal; what is printed scrolls above it."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("eta"), TimeRemainingColumn())
        # The window over which rich estimates the speed: long, because PPO takes long steps.
        self._progress = Progress(*columns, speed_estimate_period=600)
        self._task = self._progress.add_task("", total=total_steps, completed=start_step)
        self._progress.start()

    def update(self, step: int, line: str) -> None:
        self.print(line)
        self.advance(step)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def print(self, text: str) -> None:
        # A message may hold brackets that rich would take for markup, and numbers that it would colour.
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._progress.stop()


def format_line(step: int, total_steps: int, metrics: Mapping[str, float]) -> str:
    """One line of the console, with its columns in the same places for the same metrics."""
    width = len(str(total_steps))
    shown = [f"{name} {value:<10.4g}" for name, value in list(metrics.items())[:CONSOLE_METRICS]]
    return "  ".join([f"step {step:>{width}}/{total_steps}", *shown]).rstrip()


def format_seconds_left(steps_done: int, steps_left: int, seconds: float) -> str:
    """The time that the remaining steps will take at the speed so far: 45s, 3m20s, 2h05m, or -- before any step."""
    if steps_done <= 0:
        return "--"
    left = round(seconds / steps_done * max(0, steps_left))
    minutes, hours = left // 60, left // 3600
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{left % 60:02d}s" if minutes else f"{left}s"


def write_json(path: str | Path, data: Any) -> None:
    """Writes `data` as JSON so that `path` holds either the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(finite_or_null(data), indent=2, ensure_ascii=False) + "\n").encode())


def finite_or_null(value: Any) -> Any:
    """`value` with None for every nan and infinity, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("run.tensorboard is True, but tensorboard is missing: pip install tensorboard") from error
    # What a killed run wrote after the checkpoint is not shown.
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)


def open_wandb(project: str, folder: Path, run_id: str | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("run.wandb_project is set, but wandb is missing: pip install wandb") from error
    return wandb.init(project=project, dir=str(folder), name=folder.name, id=run_id, resume="allow")


def _as_float64(value: float | Tensor) -> float | Tensor:
    return value.detach().double() if isinstance(value, Tensor) else float(value)
