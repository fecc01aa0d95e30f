"""Processes of a run that start in a moment: forked from this one, which has imported all that they need."""

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training import distributed

READY = ("torch._dynamo", "step1_sft.train", "step2_reward.train", "step3_ppo.train")
POLL_SECONDS = 0.001


@dataclass
class Ranks:
    """A run under way: one process for each rank, all in a process group of their own."""

    pids: list[int]
    log: Path
    codes: dict[int, int]
    """Exit code of each process that has ended, negative for a signal; by pid."""

    @property
    def group(self) -> int:
        return self.pids[0]

    def running(self) -> list[int]:
        """Processes that have not ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.codes]

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def kill(self) -> None:
        """End all of them at once, as a machine that fails does."""
        if self.running():
            os.killpg(self.group, signal.SIGKILL)
        self.wait(60)


def load_stages() -> None:
    """Imports what the ranks need, so that starting them takes no time."""
    for module in READY:
        importlib.import_module(module)


def start(
    stage: str, config: Path, log: Path, ranks: int = 2, in_rank: Callable[[int], None] = lambda rank: None
) -> Ranks:
    """Start a stage.

    Args:
        stage: step1_sft, step2_reward or step3_ppo.
        config: its YAML file.
        log: gets what the ranks print; what it held is lost.
        ranks: how many.
        in_rank: called in each process before it begins.
    """
    port = distributed.free_port()
    log.write_bytes(b"")
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            _become_rank(rank, ranks, port, log)
            _run(stage, config, rank, in_rank)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return Ranks(pids, log, {})


def _become_rank(rank: int, ranks: int, port: int, log: Path) -> None:
    values = (str(rank), str(rank), str(ranks), "127.0.0.1", str(port))
    os.environ.update(zip(distributed.LAUNCHER_VARIABLES, values, strict=True))
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)


def _run(stage: str, config: Path, rank: int, in_rank: Callable[[int], None]) -> None:
    code = 1
    try:
        in_rank(rank)
        sys.argv = [stage, "--config", str(config)]
        distributed.run(importlib.import_module(f"{stage}.train").main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
