"""Programs that set up once and do one timed piece of work whenever they are asked, so that several can take turns.

A driver writes JSON lines to a worker's standard input: first the job, then one line for each turn. The worker answers
each turn with one JSON line in a pipe of its own: libraries print to standard output as early as they are imported.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scripts.benchmark.ceilings import PeakMemory, memory_bytes, synchronize

ROOT = Path(__file__).resolve().parent.parent.parent


class WorkerFailed(Exception):
    """A worker ended before it had answered."""


class Worker:
    """The driver's end."""

    def __init__(self, python: str, module: str, job: Mapping[str, Any], log: Path) -> None:
        """
        Args:
            python: the interpreter that has what the worker needs.
            module: what it runs.
            job: what the worker gets to know, as JSON.
            log: file for what it prints.
        """
        self.log = log
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        answers, end = os.pipe()
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [python, "-m", module, str(end)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                pass_fds=[end],
                text=True,
                env=environment,
            )
        os.close(end)  # the worker alone has it, and its death ends the pipe
        self._answers = os.fdopen(answers)
        self._send(job)

    def turn(self) -> dict[str, Any]:
        """Asks for one turn. Raises WorkerFailed with the last line that the worker printed, if it has ended."""
        self._send({"turn": True})
        answer = self._answers.readline()
        if not answer:
            raise WorkerFailed(self._last_words())
        return json.loads(answer)

    def close(self) -> None:
        """Lets the worker end, and waits for that."""
        for stream in (self._process.stdin, self._answers):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                pass  # it ended before it read all
        self._process.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its answer will be missing

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        # An error's message may span lines; the one that names it begins at the margin, as in "RuntimeError: ...".
        named = [line for line in lines if not line[0].isspace() and "Error" in line.partition(":")[0]]
        return (named or lines or [f"it ended with code {code}"])[-1]


class Turns:
    """The worker's end: the job, and one clock for each turn. A turn is a sequence of named phases."""

    def __init__(self) -> None:
        self._answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
        self.job: dict[str, Any] = json.loads(sys.stdin.readline())
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def begin(self, phase: str) -> bool:
        """Waits to be asked, then starts the clock in `phase`; False if nobody will ask again."""
        if not sys.stdin.readline():
            return False
        # On a CPU the memory's watch counts from where it starts.
        self._memory_before = memory_bytes("VmRSS") if self.device.type == "cpu" else 0
        self._memory = PeakMemory(self.device)
        self._memory.__enter__()
        self._phase, self._phases = phase, {phase: 0.0}
        self._since = time.perf_counter()
        return True

    def phase(self, name: str) -> None:
        """Ends the phase that runs and begins another one."""
        synchronize(self.device)
        now = time.perf_counter()
        self._phases[self._phase] += now - self._since
        self._phases.setdefault(name, 0.0)
        self._phase, self._since = name, now

    def end(self, within: Mapping[str, float] | None = None, **figures: Any) -> None:
        """Stops the clock and answers with the seconds of all phases, the memory and `figures`.

        Args:
            within: seconds of phases that were timed elsewhere, inside the one that runs.
        """
        self.phase(self._phase)
        self._memory.__exit__(None, None, None)
        inner = dict(within or {})
        answer = {
            "seconds": sum(self._phases.values()),
            "phases": self._phases | {self._phase: self._phases[self._phase] - sum(inner.values())} | inner,
            "peak_memory_bytes": self._memory_before + self._memory.bytes,
            **figures,
        }
        release_memory(self.device)
        print(json.dumps(answer), file=self._answers)


def release_memory(device: torch.device) -> None:
    """Gives back what a turn has left free, for the turns of the others."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)
