"""Systems that take turns at the same work, and how their times compare."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.benchmark.turns import Worker, WorkerFailed

# Starts the worker of a side.
Start = Callable[[], Worker]


@dataclass
class Measured:
    """What one side answered."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    """Why there is nothing more, in one line."""

    @property
    def seconds(self) -> list[float]:
        return [turn["seconds"] for turn in self.turns]


def take_turns(
    starts: Mapping[str, Start], repeats: int, *, interleaved: bool, look: Callable[[dict[str, Any]], None]
) -> dict[str, Measured]:
    """All repeats of all sides, after one turn of each to warm up.

    Args:
        starts: by the name of the side.
        interleaved: every side stays in memory and they take turns; else one is done before the next one starts.
        look: is given every answer and raises WorkerFailed where it is not what was asked for.
    """
    measured = {name: Measured() for name in starts}
    workers: dict[str, Worker] = {}

    def attempt(name: str, keep: bool) -> None:
        if measured[name].failure is not None:
            return
        try:
            if name not in workers:
                workers[name] = starts[name]()
            answer = workers[name].turn()
            look(answer)
        except WorkerFailed as failure:
            measured[name].failure = str(failure)
            print(f"{name}: {failure}", file=sys.stderr)
            return
        print(f"{name}: {answer['seconds']:.2f} s{'' if keep else ' to warm up'}", file=sys.stderr)
        if keep:
            measured[name].turns.append(answer)

    def close(name: str) -> None:
        if name in workers:
            workers.pop(name).close()

    rounds = [list(starts)] if interleaved else [[name] for name in starts]
    try:
        for names in rounds:
            for repeat in range(repeats + 1):
                for name in names:
                    attempt(name, keep=repeat > 0)
            for name in names:
                close(name)
    finally:
        for name in list(workers):
            close(name)
    return measured


def figures(measured: Mapping[str, Measured], baselines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each side its turns, medians, and ratios: each baseline's seconds over its own, in each repeat."""
    found: dict[str, dict[str, Any]] = {}
    for name, one in measured.items():
        if one.failure is not None:
            found[name] = {"failure": one.failure}
            continue
        middle = statistics.median(one.seconds)
        phases = {phase: statistics.median(t["phases"][phase] for t in one.turns) for phase in one.turns[0]["phases"]}
        found[name] = {
            "seconds": one.seconds,
            "median_seconds": middle,
            "spread": (max(one.seconds) - min(one.seconds)) / middle,
            "phases": phases,
            "peak_memory_bytes": max(turn["peak_memory_bytes"] for turn in one.turns),
            "ratios": {
                baseline: [theirs / own for theirs, own in zip(measured[baseline].seconds, one.seconds, strict=True)]
                for baseline in baselines
                if baseline in measured and measured[baseline].failure is None
            },
            "phases_of_turns": [turn["phases"] for turn in one.turns],
        }
    return found


def ratio_text(ratios: Sequence[float] | None) -> str:
    """Median and range."""
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
