"""Files that survive a crash and a loss of power, and a lock on the folder they are in.

Every change to the disk is one call of `os` in this module, so that tests can stop a program between any two of them.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# torch and safetensors raise errors of their own for a full disk; the reason is in the text, or only the place is.
NO_ROOM_TEXTS = (*(os.strerror(number) for number in NO_ROOM), "inline_container", "iostream error")


class CannotWrite(OSError):
    """The disk is full, over its quota or read-only, or the folder is gone; the message says what to do."""


def sync(path: Path) -> None:
    """Waits until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this for a folder: they keep no names back.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder that only its owner may enter, and its missing parents; one that exists is left as it is."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    sync(path.parent)


def rename(source: Path, target: Path) -> None:
    """Gives a file or a folder another name in the same folder, for good once this returns."""
    assert source.parent == target.parent, f"{source} and {target} are in different folders"
    os.rename(source, target)
    sync(target.parent)


def remove_tree(path: Path) -> None:
    """Removes a file, a link (not what it points to) or a folder with all that it holds."""
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    for entry in list(os.scandir(path)):
        remove_tree(path / entry.name)
    os.rmdir(path)


def make_private(path: Path, forbidden: int) -> None:
    """Takes the permission bits `forbidden` away from a file or a folder."""
    mode = path.stat().st_mode & 0o777
    if mode & forbidden:
        os.chmod(path, mode & ~forbidden)


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file so that `path` holds the old bytes or all the new ones, which are on the disk once this returns."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        rename(beside, path)
    except OSError:
        with suppress(OSError):
            os.unlink(beside)
        raise


def synced_length(path: Path) -> int:
    """Length in bytes of a file that grows by lines, once all of it is on the disk; 0 if there is none."""
    if not path.exists():
        return 0
    sync(path)
    return path.stat().st_size


def cut_lines(path: Path, num_bytes: int) -> None:
    """Cuts a file of lines back to the length that `synced_length` gave, for a run that goes on from there.

    Raises: ValueError if the file is shorter than that, or if the cut would fall inside a line.
    """
    length = path.stat().st_size if path.exists() else 0
    if length < num_bytes:
        raise ValueError(f"{path} has {length} bytes, but had {num_bytes} at the checkpoint: put the whole file back")
    if length == 0:
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        if num_bytes and os.pread(descriptor, 1, num_bytes - 1) != b"\n":
            raise ValueError(f"no line of {path} ends at byte {num_bytes}: it is not the file of the checkpoint")
        if length > num_bytes:
            os.ftruncate(descriptor, num_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(written: Path, folder: Path) -> None:
    """Gives a folder that is fully written its name; an older one of that name goes when the new one is in place."""
    for file in sorted(written.rglob("*")):
        sync(file)
    sync(written)
    old = folder.with_name(f".old-{folder.name}")
    if os.path.lexists(old):
        remove_tree(old)
    if os.path.lexists(folder):
        rename(folder, old)
    rename(written, folder)
    if os.path.lexists(old):
        remove_tree(old)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the disk of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def require_space(folder: Path, bytes_needed: int) -> None:
    """Refuses with `CannotWrite` if the disk of `folder` has less than `bytes_needed` free."""
    free = free_bytes(folder)
    if free < bytes_needed:
        raise CannotWrite(
            f"{folder} needs {bytes_needed} bytes and its disk has {free} free: "
            "make room, choose another output_dir or keep fewer checkpoints"
        )


@contextmanager
def explained_disk_errors(folder: Path, bytes_needed: int) -> Iterator[None]:
    """Turns an error of a full, read-only or over-quota disk while writing to `folder` into `CannotWrite`.

    Args:
        folder: where the body of the `with` writes.
        bytes_needed: how much it writes.
    """
    try:
        yield
    except Exception as error:
        by_number = isinstance(error, OSError) and error.errno in NO_ROOM
        if not by_number and not any(text in str(error) for text in NO_ROOM_TEXTS):
            raise
        raise CannotWrite(
            f"cannot write to {folder} ({error}): {bytes_needed} bytes needed, {free_bytes(folder)} free. "
            "The last good checkpoint is untouched: make room and give the same command again"
        ) from error


class OutputLock:
    """Keeps a second run out of an output folder while the `with` lasts. The system lets go when the process dies.

    Args:
        output_dir: the folder to lock, made if missing. The lock is its file .lock, which stays.
    """

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> "OutputLock":
        make_folder(self._path.parent)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another run"
            os.close(descriptor)
            raise ValueError(
                f"{self._path.parent} is in use by {holder}: wait until it ends, or choose another output_dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode())
        self._descriptor = descriptor
        # A forked child (a data worker) has a copy, which would keep the lock when this process is killed.
        os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
