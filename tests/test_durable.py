"""Durable writing, files cut back, disks without room, and the lock on an output folder."""

import errno
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from training import durable
from training.durable import (
    CannotWrite,
    OutputLock,
    cut_lines,
    explained_disk_errors,
    free_bytes,
    make_folder,
    remove_tree,
    require_space,
    sync,
    synced_length,
    write_durably,
)

ROOT = Path(__file__).resolve().parent.parent


class FakeOs:
    """`os` with some functions replaced."""

    def __init__(self, **replaced: Any) -> None:
        self.__dict__ |= replaced

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


# Writing


def test_write_durably_replaces_a_file_and_leaves_nothing_beside(tmp_path):
    for data in (b"first", b"", os.urandom(100_000)):
        write_durably(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]


def test_write_durably_goes_on_after_a_partial_write(tmp_path, monkeypatch):
    data = os.urandom(10_000)
    monkeypatch.setattr(durable, "os", FakeOs(write=lambda descriptor, part: os.write(descriptor, part[:999])))
    write_durably(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_write_durably_overwrites_what_a_dead_process_left_beside(tmp_path):
    (tmp_path / ".file.tmp").write_bytes(b"longer than what comes now")
    write_durably(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_write_durably_does_not_write_through_a_link_beside(tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / ".file.tmp").symlink_to("other")
    with pytest.raises(OSError, match="symbolic link"):
        write_durably(tmp_path / "file", b"new")
    assert (tmp_path / "other").read_bytes() == b"other"


@pytest.mark.parametrize(("number", "works"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_only_a_folder_on_a_disk_that_cannot_sync_folders_may_stay_unsynced(tmp_path, monkeypatch, number, works):
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").touch()
    monkeypatch.setattr(durable, "os", FakeOs(fsync=fsync))
    with pytest.raises(OSError):
        sync(tmp_path / "file")
    if works:
        sync(tmp_path)
    else:
        with pytest.raises(OSError):
            sync(tmp_path)


def test_every_new_folder_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    calls = []

    def mkdir(path: Path, mode: int) -> None:
        calls.append(path)
        os.mkdir(path, mode)

    def fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(durable, "os", FakeOs(mkdir=mkdir, fsync=fsync))
    make_folder(tmp_path / "a" / "b")
    assert calls == [tmp_path / "a", tmp_path, tmp_path / "a" / "b", tmp_path / "a"]


@pytest.mark.parametrize("umask", [0, 0o077])
def test_folders_are_private_and_files_are_written_by_their_owner_alone(tmp_path, umask):
    before = os.umask(umask)
    try:
        make_folder(tmp_path / "a" / "b")
        write_durably(tmp_path / "a" / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "file").stat().st_mode & 0o777 == 0o644 & ~umask


def test_remove_tree_removes_links_and_not_what_they_point_to(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "rubbish" / "below").mkdir(parents=True)
    (tmp_path / "rubbish" / "below" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    remove_tree(tmp_path / "rubbish")
    remove_tree(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "precious"]


# Files of lines


def test_lines_written_after_a_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert synced_length(path) == 0
    chance = random.Random(0)
    lines = [b'{"text": "%s"}\n' % (b"\xc3\xa9" * chance.randrange(9)) for _ in range(20)]
    for kept in range(len(lines) + 1):
        path.write_bytes(b"".join(lines[:kept]))
        length = synced_length(path)
        path.write_bytes(b"".join(lines) + b'{"half a l')
        cut_lines(path, length)
        assert path.read_bytes() == b"".join(lines[:kept])


def test_a_file_that_is_not_the_one_of_the_checkpoint_is_not_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"12\n45\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 6 bytes, but had 7 at the checkpoint"):
        cut_lines(path, 7)
    with pytest.raises(ValueError, match=r"no line of .*metrics\.jsonl ends at byte 4"):
        cut_lines(path, 4)
    assert path.read_bytes() == b"12\n45\n"
    with pytest.raises(ValueError, match="has 0 bytes, but had 3"):
        cut_lines(tmp_path / "missing.jsonl", 3)
    cut_lines(tmp_path / "missing.jsonl", 0)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_cut_is_on_the_disk_before_the_run_goes_on(tmp_path, monkeypatch):
    calls = []

    def noted(name: str) -> Any:
        def call(*arguments: Any) -> None:
            calls.append(name)
            getattr(os, name)(*arguments)

        return call

    (tmp_path / "file").write_bytes(b"1\n2\n")
    monkeypatch.setattr(durable, "os", FakeOs(ftruncate=noted("ftruncate"), fsync=noted("fsync")))
    cut_lines(tmp_path / "file", 2)
    assert calls == ["ftruncate", "fsync"]


# Room on the disk


def test_a_disk_without_room_is_refused_with_what_is_needed_and_free(tmp_path, monkeypatch):
    disk = SimpleNamespace(f_bavail=3, f_frsize=1000)
    monkeypatch.setattr(durable, "os", FakeOs(statvfs=lambda path: disk))
    require_space(tmp_path, 3000)
    with pytest.raises(CannotWrite, match=r"not/there needs 3001 bytes and its disk has 3000 free"):
        require_space(tmp_path / "not" / "there", 3001)


def test_free_bytes_is_what_a_user_may_write(tmp_path):
    said = subprocess.run(["df", "--output=avail", "-B1", tmp_path], capture_output=True, text=True, check=True)
    assert abs(free_bytes(tmp_path / "not" / "there") - int(said.stdout.split()[-1])) < 1 << 30


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(400_000)),
        lambda path: torch.save(torch.zeros(100_000), path),
        lambda path: torch.save(torch.zeros(100_000), path, _use_new_zipfile_serialization=False),
        lambda path: safetensors.torch.save_file({"weight": torch.zeros(100_000)}, path),
    ],
    ids=["python", "torch", "torch's older format", "safetensors"],
)
def test_every_library_that_cannot_write_on_is_explained(tmp_path, write):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(CannotWrite) as caught, explained_disk_errors(tmp_path, 400_000):
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write to {tmp_path} (" in str(caught.value)
    assert "400000 bytes needed" in str(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("shape"), KeyError("x")])
def test_an_error_that_is_not_about_room_is_passed_on(tmp_path, error):
    with pytest.raises(type(error)) as caught, explained_disk_errors(tmp_path, 1):
        raise error
    assert caught.value is error


# The lock

HOLDER = """
import os, sys, time
from pathlib import Path
from training.durable import OutputLock
with OutputLock(Path(sys.argv[1])):
    worker = os.fork() if sys.argv[2] == "forks" else None
    if not worker:
        print(os.getpid(), flush=True)  # the worker itself, once it has let go
    time.sleep(60)
"""


def start_holder(folder: Path, word: str) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-c", HOLDER, str(folder), word]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    return holder, holder.stdout.readline().strip()


@pytest.mark.parametrize("turn", range(3))
def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path, turn):
    output = tmp_path / "runs" / "mine"
    holder, _ = start_holder(output, "alone")
    try:
        with pytest.raises(ValueError, match=rf"mine is in use by pid {holder.pid} on host {socket.gethostname()}:"):
            OutputLock(output).__enter__()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with OutputLock(output):
        pass


def test_a_data_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path):
    holder, worker = start_holder(tmp_path, "forks")
    try:
        with pytest.raises(ValueError, match="is in use"):
            OutputLock(tmp_path).__enter__()
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        os.kill(int(worker), 0)  # the worker lives
        with OutputLock(tmp_path):
            pass
    finally:
        os.kill(int(worker), signal.SIGKILL)


def test_the_lock_is_refused_twice_in_one_process_and_free_after_its_end(tmp_path):
    for _ in range(2):
        with OutputLock(tmp_path), pytest.raises(ValueError, match=f"in use by pid {os.getpid()} "):
            OutputLock(tmp_path).__enter__()
    assert os.listdir(tmp_path) == [".lock"]
    assert (tmp_path / ".lock").stat().st_mode & 0o022 == 0
