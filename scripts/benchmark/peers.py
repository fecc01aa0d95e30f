"""The interpreter that has TRL, and the batches with which TRL is fastest."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from scripts.benchmark.turns import ROOT, Worker, WorkerFailed

OWN_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
# Where that environment is missing, TRL may be installed beside this project.
PEERS_PYTHON = str(OWN_PYTHON) if OWN_PYTHON.exists() else sys.executable
PACKAGES = ("trl", "torch", "transformers", "accelerate")
OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "can't allocate memory", "code -9")


def has_trl(python: str) -> bool:
    """Whether an interpreter exists and finds TRL."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    try:
        return subprocess.run([python, "-c", look], capture_output=True).returncode == 0
    except OSError:
        return False


def peer_versions(python: str) -> dict[str, str]:
    """Versions of what TRL runs on."""
    look = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"
    return json.loads(subprocess.run([python, "-c", look], capture_output=True, text=True, check=True).stdout)


def tune(
    start: Callable[[Mapping[str, int]], Worker], rows: int, prompts: int, look: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The largest batch that fits into memory, and the micro-batch with which it is fastest.

    Args:
        start: starts a worker with `micro_batch_size`, `chunk_size` and `parts`.
        rows: responses of an iteration.
        prompts: as many parts as there are prompts at most.
        look: is given every answer.

    Returns: "chosen", and "tried": seconds of each choice, or why it failed.

    Raises: WorkerFailed, if a worker dies of anything else than a lack of memory, or of that with the smallest batch.
    """
    tried: list[dict[str, Any]] = []
    parts = 1
    while parts <= prompts and prompts % parts == 0:
        best: dict[str, int] | None = None
        fastest = float("inf")
        for micro in halves(rows // parts):
            choice = {"micro_batch_size": micro, "chunk_size": rows // parts, "parts": parts}
            try:
                seconds = second_turn(start(choice), look)
            except WorkerFailed as failure:
                if not any(words in str(failure) for words in OUT_OF_MEMORY):
                    raise
                tried.append({**choice, "failure": str(failure)})
                continue
            tried.append({**choice, "seconds": seconds})
            print(f"trl-tuned: micro-batches of {micro} in {parts} parts took {seconds:.2f} s", file=sys.stderr)
            if seconds > fastest:
                break
            best, fastest = choice, seconds
        if best is not None:
            return {"chosen": best, "tried": tried}
        parts *= 2
    raise WorkerFailed("memory holds no batch at all")


def halves(number: int) -> Iterator[int]:
    """The number, its half and so on, as long as they are whole."""
    yield number
    while number % 2 == 0:
        number //= 2
        yield number


def second_turn(worker: Worker, look: Callable[[dict[str, Any]], None]) -> float:
    """Seconds of a turn after one to warm up."""
    try:
        worker.turn()
        answer = worker.turn()
        look(answer)
        return answer["seconds"]
    finally:
        worker.close()
