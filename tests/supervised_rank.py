"""A run without models under supervision: `python -m tests.supervised_rank FOLDER WATCHDOG_SECONDS [WHAT RANK STEP]`.

Each rank writes its pid to FOLDER/started.RANK, and the step at which it stopped to FOLDER/saved.RANK. At STEP, RANK
does WHAT.
"""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from training import distributed
from training.supervision import EXIT_STOPPED, alive, watch


def main() -> None:
    folder, watchdog_seconds, *event = sys.argv[1:]
    distributed.start(timeout_minutes=2)
    rank = distributed.rank()
    with watch(watchdog_minutes=float(watchdog_seconds) / 60, orphan_minutes=3 / 60) as supervisor:
        for step in range(5000):
            supervisor.progress("update", step)
            distributed.sum_over_ranks(torch.ones(1))
            if step == 3:
                time.sleep(1.5)  # so that the others are told of step 3
                write(Path(folder) / f"started.{rank}", os.getpid())
            if event and (rank, step) == (int(event[1]), int(event[2])):
                EVENTS[event[0]]()
            time.sleep(0.02)
            if supervisor.should_stop():
                write(Path(folder) / f"saved.{rank}", step)
                raise SystemExit(EXIT_STOPPED)
    distributed.stop()


def as_rank(environment: Mapping[str, str], arguments: list[str], console: Path) -> None:
    """`main` in a process that was forked, with its own console."""
    os.environ.update(environment)
    sys.argv[1:] = arguments
    with console.open("w") as file:
        os.dup2(file.fileno(), 2)
    distributed.run(main)


def write(path: Path, number: int) -> None:
    unfinished = path.with_name(f"unfinished.{path.name}")
    unfinished.write_text(str(number))
    unfinished.rename(path)


def fails() -> None:
    raise RuntimeError("no such reward")


def loops() -> None:
    while True:
        pass


def takes_its_time() -> None:
    """More of it than the watchdog of `test_supervision.py` waits."""
    for _ in range(70):
        time.sleep(0.1)
        alive()


EVENTS = {
    "takes_its_time": takes_its_time,
    "fails": fails,
    "loops": loops,
    "leaves": lambda: sys.exit(0),
    "rests": lambda: time.sleep(2),
    "finds_no_boundary": lambda: time.sleep(600),
}

if __name__ == "__main__":
    distributed.run(main)
