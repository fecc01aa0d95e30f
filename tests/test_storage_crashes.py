"""Whenever a process dies or the power fails, the last good checkpoint is found and the next save succeeds."""

import errno
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint_folders import folder_in_memory
from training import durable
from training.durable import CannotWrite, explained_disk_errors
from training.manifest import MANIFEST, checkpoint_name, checkpoint_step
from training.storage import begin, newest_good, prune, publish, seal

Tree = dict[str, bytes | None]  # by relative path: the bytes of a file, None for a folder


# A model of a disk: what a program sees, and what a loss of power leaves of it


@dataclass
class File:
    data: bytes = b""
    kept: bytes = b""  # what fsync has brought to the disk


@dataclass
class Folder:
    names: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    waiting: list[dict[str, Any]] = field(default_factory=list)  # changes since the last fsync; None removes a name

    def change(self, change: dict[str, Any]) -> None:
        self.waiting.append(change)
        apply(self.names, change)

    def sync(self) -> None:
        self.kept, self.waiting = dict(self.names), []


def apply(names: dict[str, Any], change: dict[str, Any]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def model_of(tree: Tree) -> Folder:
    """A disk that holds `tree`, all of it synced."""
    root = Folder()
    folders = {"": root}
    for path in sorted(tree):
        data = tree[path]
        parent, _, name = path.rpartition("/")
        node = Folder() if data is None else File(data, data)
        folders[parent].names[name] = folders[parent].kept[name] = node
        if isinstance(node, Folder):
            folders[path] = node
    return root


def tree_of(folder: Folder, below: str = "") -> Tree:
    tree: Tree = {}
    for name, node in folder.names.items():
        if isinstance(node, File):
            tree[below + name] = node.data
        else:
            tree[below + name] = None
            tree |= tree_of(node, below + name + "/")
    return tree


def tree_after_power_loss(folder: Folder, chance: random.Random, survival: float, below: str = "") -> Tree:
    """Synced names and bytes are left; other new names with probability `survival`; of other bytes perhaps a part."""
    names, tree = dict(folder.kept), Tree()
    for change in folder.waiting:
        if chance.random() < survival:
            apply(names, change)
    for name, node in names.items():
        if isinstance(node, Folder):
            tree[below + name] = None
            tree |= tree_after_power_loss(node, chance, survival, below + name + "/")
        elif node.data == node.kept:
            tree[below + name] = node.data
        else:
            half = len(node.data) // 2
            damaged = [node.kept, node.data[:half], bytes(len(node.data)), node.data[:half] + bytes(half)]
            tree[below + name] = chance.choice(damaged)
    return tree


def write_tree(tree: Tree, root: Path) -> None:
    for path in sorted(tree):
        data = tree[path]
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def read_tree(root: Path) -> Tree:
    paths = (path for path in root.rglob("*"))
    return {path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes() for path in paths}


class WatchedOs:
    """Stands for `os` in `training.durable`: repeats every change in a model and calls `moment` before each.

    Args:
        root: the folder that the model is a model of.
        disk: the model.
        moment: called before each change; what it raises, the program gets.
    """

    def __init__(self, root: Path, disk: Folder, moment: Callable[[], None]) -> None:
        self._root, self.disk, self._moment = str(root), disk, moment
        self._open: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _find(self, path: Any) -> tuple[Folder, str]:
        path = os.fspath(path)
        assert path.startswith(self._root), path
        *parents, name = path[len(self._root) + 1 :].split("/")
        folder = self.disk
        for parent in parents:
            folder = folder.names[parent]
        return folder, name

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if os.fspath(path) == self._root:
            node: Any = self.disk
        else:
            parent, name = self._find(path)
            if name not in parent.names and flags & os.O_CREAT:
                self._moment()
                parent.change({name: File()})
            node = parent.names[name]
            if flags & os.O_TRUNC:
                node.data = b""
        descriptor = os.open(path, flags, mode)
        self._open[descriptor] = node
        return descriptor

    def write(self, descriptor: int, data: bytes) -> int:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._moment()
            self._open[descriptor].data += part
            os.write(descriptor, part)
        return len(data)

    def fsync(self, descriptor: int) -> None:
        self._moment()
        node = self._open[descriptor]
        if isinstance(node, Folder):
            node.sync()
        else:
            node.kept = node.data

    def mkdir(self, path: Any, mode: int) -> None:
        self._moment()
        parent, name = self._find(path)
        os.mkdir(path, mode)
        parent.change({name: Folder()})

    def rename(self, source: Any, target: Any) -> None:
        self._moment()
        parent, old = self._find(source)
        _, new = self._find(target)
        os.rename(source, target)
        parent.change({old: None, new: parent.names[old]})

    def unlink(self, path: Any) -> None:
        self._moment()
        parent, name = self._find(path)
        os.unlink(path)
        parent.change({name: None})

    def rmdir(self, path: Any) -> None:
        self._moment()
        parent, name = self._find(path)
        os.rmdir(path)
        parent.change({name: None})

    def chmod(self, path: Any, mode: int) -> None:
        self._moment()
        os.chmod(path, mode)


# Runs that save checkpoints


def contents(step: int, num_ranks: int, version: str = "") -> dict[str, bytes]:
    """The files of a checkpoint, by path."""
    shards = {f"rank-{rank}.bin": f"step {step}, rank {rank} {version}".encode() for rank in range(num_ranks)}
    return {"model/whole.bin": f"model {step} {version}".encode()} | shards


def save(root: Path, step: int, num_ranks: int, version: str = "") -> None:
    """Saves a checkpoint as the ranks of a job do, one after the other, through the functions that are watched."""
    watched = durable.os
    staging = begin(root, checkpoint_name(step))
    records = []
    for path, data in contents(step, num_ranks, version).items():
        if path == "model/whole.bin":
            watched.mkdir(staging / "model", 0o700)
        descriptor = watched.open(staging / path, os.O_WRONLY | os.O_CREAT, 0o600)
        watched.write(descriptor, data)
        watched.close(descriptor)
        records += seal(staging, [staging / path])
    publish(staging, records, {"step": step})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path: data for path, data in read_tree(folder).items() if data is not None and path != MANIFEST}


def never(message: str) -> None:
    raise AssertionError(f"a crash was taken for damage: {message}")


@pytest.fixture
def ram() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


@dataclass
class Explorer:
    """Runs a program from a state of the disk, and again from every state that is reported while it runs, and so on.

    Args:
        folder: an empty folder to work in.
        program: called with the folder of checkpoints and the number of the last save that is known to be done; yields
            the number of every save that it has done. It must itself check what it finds.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    program: Callable[[Path, int], Iterator[int]]
    seen: set[Any] = field(default_factory=set)
    queue: list[tuple[Folder, int]] = field(default_factory=list)
    crashes: int = 0
    runs: int = 0

    def add(self, tree: Tree, done: int) -> None:
        """Counts a crash, and keeps the state it left for a run if there was none like it."""
        self.crashes += 1
        state = frozenset(tree.items()), done
        if state not in self.seen:
            self.seen.add(state)
            self.queue.append((model_of(tree), done))

    def run(self, disk: Folder, done: int, moment: Callable[[Folder, int], None]) -> None:
        """Runs the program once and calls `moment` with the disk before every change and at the end."""
        self.runs += 1
        write_tree(tree_of(disk), self.folder)
        watched = WatchedOs(self.folder, disk, lambda: moment(disk, done))
        with self.patch.context() as patch:
            patch.setattr(durable, "os", watched)
            for number in self.program(self.folder / "checkpoints", done):
                done = number
        moment(disk, done)
        assert read_tree(self.folder) == tree_of(disk), "the model of the disk is wrong"
        for path in self.folder.iterdir():
            shutil.rmtree(path)

    def kills(self, start: Tree) -> None:
        """From `start`, every state that any number of kills can lead to."""
        self.add(start, 0)
        while self.queue:
            self.run(*self.queue.pop(), lambda disk, done: self.add(tree_of(disk), done))

    def kills_and_power_losses(self, start: Tree, seed: int) -> None:
        """From `start`, what any number of kills and losses of power, in any order, can lead to.

        A killed process leaves its changes waiting for the disk, and a later loss of power may still undo them. Which
        of them it undoes is drawn by chance, but for all and none.
        """
        chance = random.Random(seed)

        def moment(disk: Folder, done: int) -> None:
            for survival in (0.0, chance.choice((0.5, 1.0))):
                self.add(tree_after_power_loss(disk, chance, survival), done)
            killed = pickle.dumps((disk, done))
            if killed not in self.seen:
                self.seen.add(killed)
                self.queue.append(pickle.loads(killed))

        self.add(start, 0)
        while self.queue:
            self.run(*self.queue.pop(), moment)


def training_run(num_ranks: int, keep_last: int, num_saves: int) -> Callable[[Path, int], Iterator[int]]:
    """A program that resumes from the newest checkpoint and saves the next one, until there are `num_saves`."""

    def program(root: Path, done: int) -> Iterator[int]:
        found = newest_good(root, never)
        step = checkpoint_step(found.folder.name) if found else 0
        assert step >= done, f"checkpoint {done} was saved, but the newest is {step}"
        if found:
            assert found.facts == {"step": step}
            assert files_of(found.folder) == contents(step, num_ranks)
        if step < num_saves:
            step += 1
            save(root, step, num_ranks)
            yield step
        if step:
            prune(root, keep_last)
            kept = range(max(1, step - keep_last + 1), step + 1)
            assert sorted(os.listdir(root)) == [checkpoint_name(number) for number in kept]
            assert files_of(root / checkpoint_name(step)) == contents(step, num_ranks)

    return program


@pytest.mark.parametrize(("num_ranks", "keep_last"), [(1, 1), (1, 2), (2, 1), (3, 2), (4, 1)])
def test_any_number_of_kills_leaves_the_last_checkpoint_or_the_new_one(ram, monkeypatch, num_ranks, keep_last):
    explorer = Explorer(ram, monkeypatch, training_run(num_ranks, keep_last, num_saves=3))
    explorer.kills({})
    assert explorer.crashes >= 4000


@pytest.mark.parametrize(("num_ranks", "num_saves"), [(1, 2), (2, 1)])
def test_any_number_of_power_losses_leaves_the_last_checkpoint_or_the_new_one(ram, monkeypatch, num_ranks, num_saves):
    explorer = Explorer(ram, monkeypatch, training_run(num_ranks, 1, num_saves))
    explorer.kills_and_power_losses({}, seed=0)
    assert explorer.crashes >= 20_000


# Checkpoints of one step, one after the other


def tree_with(folder: Path, *saves: tuple[int, str]) -> Tree:
    """What a disk holds after these saves (step, version)."""
    for step, version in saves:
        save(folder / "checkpoints", step, 1, version)
    tree = read_tree(folder)
    shutil.rmtree(folder / "checkpoints")
    return tree


def replacement(root: Path, done: int) -> Iterator[int]:
    """Saves step 1 again, with other contents."""
    found = newest_good(root, never)
    assert found is not None
    files = files_of(found.folder)
    if done or files != contents(1, 1, "old"):
        assert files == contents(1, 1, "new")
    else:
        save(root, 1, 1, "new")
        assert os.listdir(root) == ["step-000001"]
        yield 1


@pytest.mark.parametrize("power_fails", [False, True])
def test_a_checkpoint_saved_again_is_at_every_moment_the_old_or_the_new_one(ram, monkeypatch, power_fails):
    explorer = Explorer(ram, monkeypatch, replacement)
    old = tree_with(ram, (1, "old"))
    if power_fails:
        explorer.kills_and_power_losses(old, seed=0)
    else:
        explorer.kills(old)
    assert explorer.crashes >= 100


@pytest.mark.parametrize("resumes", [True, False])
def test_a_damaged_checkpoint_in_the_way_is_kept_and_never_the_only_one(ram, monkeypatch, resumes):
    start = tree_with(ram, (1, ""), (2, ""))
    shard = b"bytes that somebody will want to look at"
    start["checkpoints/step-000002/rank-0.bin"] = shard

    def program(root: Path, done: int) -> Iterator[int]:
        if resumes:
            found = newest_good(root, say=lambda message: None)
            assert found is not None
            step = checkpoint_step(found.folder.name)
            assert step in (1, 2) and step > done
            assert files_of(found.folder) == contents(step, 1)
        save(root, 2, 1)
        assert shard in read_tree(root).values()
        assert files_of(root / "step-000002") == contents(2, 1)
        yield 1

    explorer = Explorer(ram, monkeypatch, program)
    explorer.kills(start)
    assert explorer.crashes >= 100


# Runs of many saves


class Killed(BaseException):
    """Ends a program where it stands: nothing but `finally` sees it, and nothing there changes the disk."""


@dataclass
class Failures:
    """What happens instead of the changes of the disk that come after the next `changes_left`."""

    failure: BaseException
    changes_left: int = 0
    stays: bool = True

    def __call__(self) -> None:
        self.changes_left -= 1
        if self.changes_left == -1 or (self.changes_left < -1 and self.stays):
            raise self.failure


FAR = 1_000_000


@pytest.mark.parametrize("seed", range(4))
def test_retention_keeps_the_last_and_the_best_whatever_is_killed(ram, monkeypatch, seed):
    """1,250 runs of saves, each with a metric and perhaps a kill at a moment drawn by chance."""
    chance, root, fail = random.Random(seed), ram / "checkpoints", Failures(Killed())
    for _ in range(1250):
        monkeypatch.setattr(durable, "os", WatchedOs(ram, Folder(), fail))
        keep_last, newest = chance.randint(1, 3), 0
        metrics: dict[int, float] = {}
        for _ in range(chance.randint(1, 4)):
            step, metric, fail.changes_left = newest + 1, chance.random(), chance.choice([chance.randrange(50), FAR])
            try:
                save(root, step, 1)
                metrics[step] = metric
                prune(root, keep_last, {checkpoint_name(max(metrics, key=metrics.__getitem__))})
                assert len(os.listdir(root)) <= keep_last + 1
            except Killed:
                pass
            fail.changes_left = FAR
            found = newest_good(root, never)
            newest = checkpoint_step(found.folder.name) if found else 0
            assert newest in ({step} if step in metrics else {step - 1, step})
            if newest == 0:
                continue
            metrics.setdefault(newest, metric)
            assert len(os.listdir(root)) <= keep_last + 2
            for good in (newest, max(metrics, key=metrics.__getitem__)):
                assert files_of(root / checkpoint_name(good)) == contents(good, 1)
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fails_at_any_change_is_named_and_leaves_the_last_checkpoint(ram, monkeypatch, number, stays):
    root, fail = ram / "checkpoints", Failures(OSError(number, os.strerror(number)), stays=stays)
    failures = 0
    for changes_before in range(1000):
        monkeypatch.setattr(durable, "os", WatchedOs(ram, Folder(), fail))
        fail.changes_left = FAR
        save(root, 1, 1)
        fail.changes_left = changes_before
        try:
            with explained_disk_errors(root, 12345):
                save(root, 2, 1)
            break
        except CannotWrite as error:
            failures += 1
            for part in (str(root), os.strerror(number), "12345 bytes needed", " free", "good checkpoint is untouched"):
                assert part in str(error)
        fail.changes_left = FAR
        found = newest_good(root, never)
        assert found is not None
        step = checkpoint_step(found.folder.name)
        assert files_of(found.folder) == contents(step, 1)
        save(root, 3, 1)
        assert sorted(os.listdir(root)) == [checkpoint_name(saved) for saved in sorted({1, step, 3})]
        shutil.rmtree(root)
    assert failures >= 20
