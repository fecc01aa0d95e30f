"""Start programs of this project as a user does: under DeepSpeed's launcher, under torchrun, or alone."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.distributed import LAUNCHER_VARIABLES, free_port

ROOT = Path(__file__).resolve().parent.parent
OUTCOMES = "OUTCOMES_OF_CHECKS"  # the variable that names the file where checks tell how they went


def under_deepspeed(module: str, *arguments: str, processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--no_local_rank"]
    ranks = ["--num_gpus", str(processes), "--master_port", str(free_port())]
    return [*launcher, *ranks, "--module", module, *arguments]


def under_torchrun(module: str, *arguments: str, processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, "--module", module, *arguments]


def alone(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def run(command: Sequence[str], timeout_seconds: float) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; with all that it started it is killed when the time is over."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"{' '.join(command)} ran past {timeout_seconds} s\n{stdout}\n{stderr}") from None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def run_well(command: Sequence[str], timeout_seconds: float = 180) -> str:
    """Runs a command that must succeed; returns what it printed."""
    result = run(command, timeout_seconds)
    assert result.returncode == 0, f"{' '.join(command)} ended with {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def failures_of(command: Sequence[str], timeout_seconds: float) -> dict[str, str]:
    """What went wrong in each check of a program that tells it, by name: nothing where the check held."""
    with tempfile.NamedTemporaryFile() as file:
        run_well(["env", f"{OUTCOMES}={file.name}", *command], timeout_seconds)
        return dict(json.loads(line) for line in file)


def tell(check: str, failure: str) -> None:
    """For `failures_of`, or printed without it: a line, whole also where several processes tell at once."""
    with open(os.environ.get(OUTCOMES, "/dev/stdout"), "ab", buffering=0) as file:
        file.write(json.dumps([check, failure]).encode() + b"\n")


def environment() -> Mapping[str, str]:
    """This process's variables without a launcher's, on the CPU with one thread for each process."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
