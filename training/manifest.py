"""What makes a folder a good checkpoint: its name, and a manifest with the size and hash of every file."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "MANIFEST.json"

NAME = re.compile(r"step-([0-9]{6,15})")
# No leading dot or dash, so neither "..", a hidden file nor an option; no slash, so no absolute path.
PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,199}")
HASH = re.compile(r"[0-9a-f]{64}")
# Stands in the manifest in the place of its own hash, while that is computed.
NO_HASH = "0" * 64
# A link in the place of a file is not followed.
READ = os.O_RDONLY | os.O_NOFOLLOW


class DamagedCheckpoint(ValueError):
    """A folder that is no good checkpoint; the message names the file, what was expected and what was found."""


class NewerCheckpoint(ValueError):
    """A checkpoint that a later version of this program wrote: it is not damaged, but cannot be read."""


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint: its path below the folder with forward slashes, size in bytes, hexadecimal sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a verified checkpoint consists of.

    Args:
        folder: where it is.
        facts: what the run wanted to remember about it.
        files: all its files but the manifest.
    """

    folder: Path
    facts: dict[str, Any]
    files: tuple[FileRecord, ...]


def checkpoint_name(step: int) -> str:
    """Name of the folder of a checkpoint after `step` steps: step-000100."""
    name = f"step-{step:06d}"
    checkpoint_step(name)
    return name


def checkpoint_step(name: str) -> int:
    """The number of steps in the name of a checkpoint. Raises ValueError for any other name."""
    match = NAME.fullmatch(name)
    if not match or name != f"step-{int(match[1]):06d}":
        raise ValueError(f"{name[:100]!r} is no name of a checkpoint: it must look like step-000100")
    return int(match[1])


def verify(folder: Path) -> Manifest:
    """Reads all of a checkpoint and returns its manifest. Nothing outside the folder is opened.

    Raises: DamagedCheckpoint, NewerCheckpoint, or ValueError for a folder that is not named as a checkpoint.
    """
    checkpoint_step(folder.name)
    if folder.is_symlink() or not folder.is_dir():
        raise DamagedCheckpoint(f"{folder} is not a folder: expected one with {MANIFEST}")
    file = folder
    try:
        sizes = file_sizes(folder)
        file = folder / MANIFEST
        if MANIFEST not in sizes:
            raise DamagedCheckpoint(f"{file} is missing: the checkpoint was not finished, or lost it later")
        manifest = read_manifest(file)
        compare(folder, manifest.files, sizes)
        for record in manifest.files:
            file = folder / record.path
            found = sha256(file)
            if found != record.sha256:
                raise DamagedCheckpoint(f"{file} has changed: expected sha256 {record.sha256}, found {found}")
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise DamagedCheckpoint(f"{file} cannot be read from the disk: {error}") from error
    return manifest


def check_path(path: object, where: Path) -> None:
    """Refuses the path of a file that could lead out of a checkpoint, or that is the manifest's own."""
    if not isinstance(path, str) or path == MANIFEST or not all(map(PATH_PART.fullmatch, path.split("/"))):
        raise DamagedCheckpoint(
            f"{where} names the file {repr(path)[:100]}: expected a relative path of letters, digits and _ . = + - "
            f"whose parts do not begin with a dot or a dash, other than {MANIFEST}"
        )


def file_sizes(folder: Path) -> dict[str, int]:
    """Sizes of all files below a folder, by relative path. Refuses links, pipes and devices, and follows none."""
    sizes, pending = {}, [""]
    while pending:
        below = pending.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                path = below + entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path + "/")
                elif entry.is_file(follow_symlinks=False):
                    sizes[path] = entry.stat(follow_symlinks=False).st_size
                else:
                    raise DamagedCheckpoint(
                        f"{folder}/ holds {path!r}: expected files and folders, found a link or device"
                    )
    return sizes


def compare(folder: Path, records: Iterable[FileRecord], sizes: Mapping[str, int]) -> None:
    """Refuses a folder whose files, but for the manifest, differ in names or sizes from the records."""
    recorded: dict[str, int] = {}
    for record in records:
        if record.path in recorded:
            raise DamagedCheckpoint(f"{folder / record.path} is recorded twice: expected one record of each file")
        recorded[record.path] = record.size
    for path, size in recorded.items():
        if path not in sizes:
            raise DamagedCheckpoint(f"{folder / path} is missing: expected a file of {size} bytes")
        if sizes[path] != size:
            raise DamagedCheckpoint(f"{folder / path} has the wrong size: expected {size} bytes, found {sizes[path]}")
    for path in sizes:
        if path not in recorded and path != MANIFEST:
            raise DamagedCheckpoint(f"{folder}/ holds {path!r}: expected only the {len(recorded)} files recorded")


def manifest_bytes(name: str, facts: Mapping[str, Any], files: Iterable[FileRecord]) -> bytes:
    content = {
        "format": FORMAT,
        "name": name,
        "facts": dict(facts),
        "files": [asdict(record) for record in files],
        "sha256": NO_HASH,
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    return replace_last(text.encode(), NO_HASH, hashlib.sha256(text.encode()).hexdigest())


def replace_last(data: bytes, old: str, new: str) -> bytes:
    """`data` with the last `old` in it replaced: a manifest's own hash comes last."""
    return new.encode().join(data.rsplit(old.encode(), 1))


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest whose own hash must be right: the sha256 of its bytes with zeros in the hash's place."""
    data = read(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is not JSON: {error}") from error
    expected = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(expected, str) or not HASH.fullmatch(expected):
        raise DamagedCheckpoint(f"{path} has no hash of itself: expected an object with sha256")
    found = hashlib.sha256(replace_last(data, expected, NO_HASH)).hexdigest()
    if found != expected:
        raise DamagedCheckpoint(f"{path} was edited: expected sha256 {expected}, found {found}")
    if content.get("format") != FORMAT:
        raise NewerCheckpoint(
            f"{path} has format {content.get('format')}, and this version reads {FORMAT}: "
            "use the version of the program that wrote it"
        )
    name, facts, entries = (content.get(key) for key in ("name", "facts", "files"))
    if name != path.parent.name:
        raise DamagedCheckpoint(f"{path} belongs to another checkpoint: expected {path.parent.name}, found {name!r}")
    if not isinstance(facts, dict) or not isinstance(entries, list):
        raise DamagedCheckpoint(f"{path} is incomplete: expected facts and files")
    try:
        files = tuple(FileRecord(**entry) for entry in entries)
    except TypeError as error:
        raise DamagedCheckpoint(f"{path} has a wrong file record: {error}") from error
    for record in files:
        check_path(record.path, path)
    return Manifest(path.parent, facts, files)


def read(path: Path) -> bytes:
    with os.fdopen(os.open(path, READ), "rb") as file:
        return file.read()


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces."""
    with os.fdopen(os.open(path, READ), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
