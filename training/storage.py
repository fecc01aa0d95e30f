"""Checkpoints on disk: a crash at any moment leaves the last good one, and none is used before it is verified.

    OUTPUT/checkpoints/step-000100/    any files in any sub-folders, and MANIFEST.json with their sizes and hashes

A checkpoint exists if and only if a folder has such a name and agrees with its manifest; nothing else says which is the
newest. Folders of other names are never read as checkpoints:

    .saving-step-000100                being written, or left by a crash
    .replaced-step-000100              a good one, while another of the same step takes its name
    .removing-step-000100              being removed
    damaged-step-000100                disagreed with its manifest; kept for a person to look at

A save is `begin` on the main rank, the writing of files and `seal` on every rank, `publish` and `prune` on the main
rank, with a barrier after `begin` and the gathering of records before `publish`. All ranks must see the same disk.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from training.durable import make_folder, make_private, remove_tree, rename, sync, write_durably
from training.manifest import (
    MANIFEST,
    NAME,
    DamagedCheckpoint,
    FileRecord,
    Manifest,
    check_path,
    checkpoint_step,
    compare,
    file_sizes,
    manifest_bytes,
    sha256,
    verify,
)

SAVING, REPLACED, REMOVING = ".saving-", ".replaced-", ".removing-"
LEFTOVER = re.compile(rf"(?:{'|'.join(map(re.escape, (SAVING, REPLACED, REMOVING)))})({NAME.pattern})")


def checkpoint_names(root: Path) -> list[str]:
    """Names of the folders that should be checkpoints, from the oldest step to the newest."""
    if not root.is_dir():
        return []
    return sorted((name for name in os.listdir(root) if _is_name(name)), key=checkpoint_step)


def begin(root: Path, name: str) -> Path:
    """Makes the folder that the files of checkpoint `name` are written into. On the main rank, before a barrier."""
    checkpoint_step(name)
    make_folder(root)
    # Also if it existed: the process that made it may have died before it could wait for the disk.
    sync(root.parent)
    clear_leftovers(root)
    staging = root / (SAVING + name)
    make_folder(staging)
    return staging


def seal(staging: Path, files: Iterable[Path]) -> list[FileRecord]:
    """Brings to the disk the files below `staging` that this rank wrote, and returns their sizes and hashes."""
    records = []
    for file in files:
        path = file.relative_to(staging).as_posix()
        check_path(path, staging)
        if file.is_symlink() or not file.is_file():
            raise DamagedCheckpoint(f"{file} is no plain file: expected one that this rank has written")
        make_private(file, 0o022)
        sync(file)
        records.append(FileRecord(path, file.stat().st_size, sha256(file)))
    return records


def publish(staging: Path, records: Iterable[FileRecord], facts: Mapping[str, Any]) -> Path:
    """Makes a checkpoint of a staging folder, under its final name; on the main rank.

    A checkpoint of that name is replaced, at no moment without a good one to go back to; a damaged one is set aside.

    Args:
        staging: what `begin` made.
        records: what `seal` returned, of all ranks.
        facts: what is to be remembered about the checkpoint, as JSON can hold it.

    Raises: DamagedCheckpoint if the folder holds other files than the records say.
    """
    name = staging.name.removeprefix(SAVING)
    checkpoint_step(name)
    files = tuple(sorted(records, key=lambda record: record.path))
    compare(staging, files, file_sizes(staging))
    for below in sorted({parent for record in files for parent in PurePosixPath(record.path).parents}):
        make_private(staging / below, 0o077)
        sync(staging / below)
    write_durably(staging / MANIFEST, manifest_bytes(name, facts, files))
    folder, replaced = staging.with_name(name), staging.with_name(REPLACED + name)
    if _is_good(folder):
        rename(folder, replaced)
    elif os.path.lexists(folder):
        set_aside(folder)
    rename(staging, folder)
    if replaced.exists():
        remove_tree(replaced)
    return folder


def newest_good(root: Path, say: Callable[[str], None]) -> Manifest | None:
    """The newest checkpoint that verifies, or None; on the main rank, before anything else touches the folder.

    Damaged ones that are newer get another name and are kept.

    Args:
        root: the folder of all checkpoints.
        say: called with a sentence for every damaged checkpoint: what is wrong, and which one is used instead.
    """
    clear_leftovers(root)
    found, problems = None, []
    for name in reversed(checkpoint_names(root)):
        try:
            found = verify(root / name)
            break
        except DamagedCheckpoint as error:
            problems.append(f"{error}; it is now called {set_aside(root / name).name}")
    for problem in problems:
        say(f"{problem}; using {found.folder.name if found else 'no checkpoint, for no good one is left,'} instead")
    return found


def set_aside(folder: Path, word: str = "damaged") -> Path:
    """Renames a checkpoint to WORD-step-000100, or to WORD-step-000100-2 and so on, and returns the new path."""
    target, count = folder.with_name(f"{word}-{folder.name}"), 1
    while os.path.lexists(target):
        count += 1
        target = folder.with_name(f"{word}-{folder.name}-{count}")
    rename(folder, target)
    return target


def prune(root: Path, keep_last: int, keep: Collection[str] = ()) -> list[str]:
    """Removes all checkpoints but the newest `keep_last` and those named in `keep`, and returns their names.

    The newest is verified first. On the main rank.

    Raises: DamagedCheckpoint if the newest is no good: then nothing is removed.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}: at least 1 checkpoint must be kept")
    names = checkpoint_names(root)
    doomed = [name for name in names[:-keep_last] if name not in keep]
    if doomed:
        verify(root / names[-1])
    for name in doomed:
        # Under this name a half removed one is nothing but rubbish, and cannot be taken for a damaged one.
        removing = root / (REMOVING + name)
        if os.path.lexists(removing):
            remove_tree(removing)
        rename(root / name, removing)
        remove_tree(removing)
    return doomed


def clear_leftovers(root: Path) -> None:
    """Removes what dead attempts left, and finishes or undoes a replacement that was cut short. On the main rank."""
    if not root.is_dir():
        return
    # A dead process may have given a checkpoint its name without waiting for the disk; nothing builds on such a name.
    sync(root)
    for path in sorted(root.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if not match:
            continue
        folder = root / match[1]
        if path.name.startswith(REPLACED) and not _is_good(folder):
            if os.path.lexists(folder):
                set_aside(folder)
            rename(path, folder)
        else:
            remove_tree(path)


def _is_name(name: str) -> bool:
    try:
        checkpoint_step(name)
    except ValueError:
        return False
    return True


def _is_good(folder: Path) -> bool:
    try:
        verify(folder)
    except DamagedCheckpoint:
        return False
    return True
