"""What every benchmark says beside its own figures, and where they go."""

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from scripts.benchmark.ceilings import device_name
from scripts.summary import describe_device, git_commit, installed_version
from training.config_files import as_plain

ROOT = Path(__file__).resolve().parents[2]


def circumstances(module: str, config: Any, device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """The command that `module` was started by, with what and on what it ran."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "device": {"name": device_name(device), "threads": torch.get_num_threads(), **describe_device()},
        "versions": {name: installed_version(name) for name in packages},
        "commit": git_commit(),
        "config": as_plain(config),
    }


def run_and_keep(run: Callable[[Any], dict[str, Any]], config: Any) -> None:
    """Runs a benchmark and writes what it returns as JSON to `config.output`, if that is a file.

    What the user can mend, such as a model that does not exist, ends the process with one line and code 2.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        result = run(config)
    except (OSError, ValueError) as error:  # OSError is how transformers says that there is no such model
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if config.output is not None:
        path = Path(config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Where things lie on this machine concerns nobody else.
        text = json.dumps(result, indent=2).replace(f"{ROOT}/", "").replace(str(Path.home()), "~")
        path.write_text(text + "\n")


def spread_of(lengths: Sequence[int]) -> str:
    """The range and the mean of lengths, for a heading."""
    return f"{min(lengths)}-{max(lengths)} (mean {statistics.mean(lengths):.0f})"
