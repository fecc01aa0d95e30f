"""A run around its training: who else is at it, whether it has finished, how it starts and ends."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from training import distributed
from training.checkpoint import refuse_changes
from training.config_files import as_plain, save_config
from training.durable import OutputLock
from training.metrics import write_json
from training.supervision import Supervisor, watch

RESULTS_FILE = "results.json"


@contextmanager
def running(config: Any) -> Iterator[Supervisor]:
    """The process group of a run, which holds its output folder and is supervised until the block ends.

    Raises:
        ValueError: another run holds the folder.
    """
    output = Path(config.run.output_dir)
    with OutputLock(output) if distributed.is_main() else nullcontext():
        distributed.start(config.run.timeout_minutes)
        with watch(watchdog_minutes=config.run.timeout_minutes) as supervisor:
            distributed.seed_everything(config.run.seed, rank=0)  # ranks must draw the same new weights
            if distributed.is_main():
                save_config(config, output / "config.yaml")
            yield supervisor
        distributed.stop()


def has_finished(config: Any) -> bool:
    """Whether a run with these options has finished in the output folder, which is then said.

    Raises:
        ValueError: it has, but with other options.
    """
    file = Path(config.run.output_dir) / RESULTS_FILE
    if config.run.resume == "never" or not file.exists():
        return False
    saved = json.loads(file.read_text(encoding="utf-8")).get("config")
    refuse_changes(saved, as_plain(config), file, allowed=False)
    distributed.announce(f"this run has finished: {file} holds its results; set run.resume never to train anew")
    return True


def write_results(config: Any, results: dict[str, Any]) -> None:
    """Writes what a run has come to, on the main rank: from then on it has finished."""
    if distributed.is_main():
        write_json(Path(config.run.output_dir) / RESULTS_FILE, results | {"config": as_plain(config)})
