"""Checkpoints of a few bytes, for the tests of how they are stored."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.manifest import checkpoint_name
from training.storage import begin, publish, seal


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """An empty folder, in memory where there is such: waiting for a disk thousands of times takes minutes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def write_checkpoint(root: Path, step: int, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> Path:
    """Saves a checkpoint of these files, by path, and returns its folder."""
    staging = begin(root, checkpoint_name(step))
    for path, data in files.items():
        (staging / path).parent.mkdir(parents=True, exist_ok=True)
        (staging / path).write_bytes(data)
    return publish(staging, seal(staging, [staging / path for path in files]), facts)
