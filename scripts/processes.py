"""Runs a stage under DeepSpeed's launcher as one group of processes that can be stopped whole."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from training.distributed import free_port

ROOT = Path(__file__).resolve().parent.parent
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_SECONDS = 60.0


def stage_command(module: str, config_path: Path, num_processes: int) -> list[str]:
    """The `deepspeed` program, started with this Python so that it need not be on PATH."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--no_local_rank"]
    if not chosen_gpus():
        command += ["--num_gpus", str(num_processes)]
    return [*command, "--master_port", str(free_port()), "--module", module, "--config", str(config_path)]


def stage_environment(num_processes: int, num_gpus_here: int) -> dict[str, str]:
    """This process's variables and the defaults that a stage runs best with; what the user has set stays."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    # torch repeats the same warning in every process.
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if num_gpus_here == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    elif chosen_gpus():
        # With --num_gpus the launcher would pass over CUDA_VISIBLE_DEVICES; without it, it takes all that are visible.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen_gpus()[:num_processes])
    return environment


def chosen_gpus() -> list[str]:
    """The GPUs that the user chose with CUDA_VISIBLE_DEVICES; empty if none were chosen, and where there is no GPU."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",") if visible and torch.cuda.is_available() else []


class Stopped(Exception):
    """The run was asked to stop by the signal `number`, and its processes are gone."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def run_group(command: Sequence[str], environment: Mapping[str, str], stop_seconds: float = STOP_SECONDS) -> int:
    """Runs `command` on this console and returns its exit code, once every process that it started is gone.

    The launcher dies of a signal without telling its ranks. So they all get a session of their own, whose every process
    receives the signals that this process receives, as SIGTERM; a second signal, or `stop_seconds`, kills them.

    Raises: Stopped, if a signal came.
    """
    received: list[int] = []
    group = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if group:
            signal_group(group, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        # The console is inherited, so that progress bars know it. Standard input is not: nobody may wait for it.
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        group = process.pid
        if received:
            signal_group(group, signal.SIGTERM)
        code = process.wait()
        end_group(group, stop_seconds)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise Stopped(received[0])
    return code if code >= 0 else 128 - code


def end_group(group: int, stop_seconds: float) -> None:
    """Stops what the group's first process left behind, and waits until all is gone."""
    deadline = time.monotonic() + stop_seconds
    signal_group(group, signal.SIGTERM)
    while signal_group(group, 0):
        if time.monotonic() > deadline:
            signal_group(group, signal.SIGKILL)
            return
        with contextlib.suppress(ChildProcessError):  # as process 1 of a container, this one inherits the orphans
            os.waitpid(-group, os.WNOHANG)
        time.sleep(0.05)


def signal_group(group: int, number: int) -> bool:
    """Sends a signal to every process of a group; 0 only asks. False if there is none left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
