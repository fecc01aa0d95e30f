"""Saving, finding and removing checkpoints. What crashes do to them is in test_storage_crashes.py."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.checkpoint_folders import folder_in_memory, write_checkpoint
from training import durable, manifest
from training.manifest import MANIFEST, DamagedCheckpoint, FileRecord, NewerCheckpoint, checkpoint_name, verify
from training.storage import begin, checkpoint_names, clear_leftovers, newest_good, prune, publish, seal, set_aside


@pytest.fixture
def root() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder / "output" / "checkpoints"


def write(root: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(root, step, {"shard.pt": f"weights {step}".encode()}, {"step": step})


def damage(root: Path, step: int) -> None:
    (root / checkpoint_name(step) / "shard.pt").write_bytes(b"weights X")


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def no_message(message: str) -> None:
    raise AssertionError(message)


# Saving


def test_a_checkpoint_has_no_name_before_it_is_whole(root):
    staging = begin(root, "step-000100")
    (staging / "a.pt").write_bytes(b"a")
    assert checkpoint_names(root) == []
    records = seal(staging, [staging / "a.pt"])
    assert newest_good(root, no_message) is None
    assert not staging.exists()  # a resuming run has cleared the leftovers away
    staging = begin(root, "step-000100")
    (staging / "a.pt").write_bytes(b"a")
    assert publish(staging, records, {}) == root / "step-000100"
    assert names(root) == ["step-000100"]


def test_begin_removes_what_dead_attempts_left_and_nothing_else(root):
    write(root, 1)
    for name in (".saving-step-000002", ".saving-step-000005", ".removing-step-000000"):
        (root / name / "below").mkdir(parents=True)
        (root / name / "below" / "file").touch()
    others = ["damaged-step-000003", ".saving-notes", ".saving-step-2", "step-000002-backup", "notes.txt"]
    for name in others:
        (root / name).mkdir()
    begin(root, "step-000002")
    assert names(root) == sorted([".saving-step-000002", "step-000001", *others])
    assert not os.listdir(root / ".saving-step-000002")


def test_a_leftover_that_is_a_link_is_removed_and_not_what_it_points_to(tmp_path, root):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    root.mkdir(parents=True)
    (root / ".saving-step-000001").symlink_to(tmp_path / "precious")
    clear_leftovers(root)
    assert names(root) == [] and (tmp_path / "precious" / "file").exists()


def test_the_records_of_several_ranks_make_one_checkpoint(root):
    staging = begin(root, "step-000001")
    records: list[FileRecord] = []
    for rank in range(3):
        (staging / "shards").mkdir(exist_ok=True)
        (staging / "shards" / f"rank-{rank}.pt").write_bytes(bytes([rank]) * rank)
        records += seal(staging, [staging / "shards" / f"rank-{rank}.pt"])
    folder = publish(staging, reversed(records), {"world_size": 3})
    found = verify(folder)
    assert [(record.path, record.size) for record in found.files] == [(f"shards/rank-{n}.pt", n) for n in range(3)]
    assert found.facts == {"world_size": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda staging: (staging / "a.pt").unlink(), r"a\.pt is missing: expected a file of 1 bytes"),
        (lambda staging: (staging / "a.pt").write_bytes(b"aa"), r"a\.pt has the wrong size: expected 1 bytes, found 2"),
        (lambda staging: (staging / "b.pt").touch(), r"holds 'b\.pt': expected only the 1 files recorded"),
        (lambda staging: (staging / "b.pt").symlink_to("a.pt"), r"holds 'b\.pt': .* found a link"),
    ],
)
def test_a_folder_that_differs_from_the_records_is_not_published(root, change, message):
    staging = begin(root, "step-000001")
    (staging / "a.pt").write_bytes(b"a")
    records = seal(staging, [staging / "a.pt"])
    change(staging)
    with pytest.raises(DamagedCheckpoint, match=message):
        publish(staging, records, {})
    assert names(root) == [".saving-step-000001"]


def test_two_ranks_that_wrote_the_same_file_are_not_published(root):
    staging = begin(root, "step-000001")
    (staging / "a.pt").write_bytes(b"a")
    records = [record for _ in range(2) for record in seal(staging, [staging / "a.pt"])]
    with pytest.raises(DamagedCheckpoint, match=r"a\.pt is recorded twice"):
        publish(staging, records, {})


@pytest.mark.parametrize("name", [MANIFEST, ".hidden", "-f", "a b"])
def test_a_file_whose_name_could_not_be_verified_is_not_sealed(root, name):
    staging = begin(root, "step-000001")
    (staging / name).touch()
    with pytest.raises(DamagedCheckpoint, match="names the file"):
        seal(staging, [staging / name])


def test_a_file_outside_is_not_sealed(tmp_path, root):
    staging = begin(root, "step-000001")
    (tmp_path / "secret").touch()
    (staging / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(DamagedCheckpoint, match="link is no plain file"):
        seal(staging, [staging / "link"])
    with pytest.raises(ValueError, match="not in the subpath"):
        seal(staging, [tmp_path / "secret"])


@pytest.mark.parametrize("umask", [0, 0o077])
def test_a_checkpoint_is_private_whatever_the_umask(root, umask):
    before = os.umask(umask)
    try:
        write_checkpoint(root, 1, {"model/deep/a.pt": b"a", "b.pt": b"b"}, {})
    finally:
        os.umask(before)
    paths = [root.parent, *root.parent.rglob("*")]
    assert len(paths) == 8
    for path in paths:
        mode = path.stat().st_mode & 0o777
        assert mode == 0o700 if path.is_dir() else mode & 0o022 == 0


def test_an_output_folder_may_be_a_link(tmp_path):
    (tmp_path / "big_disk").mkdir()
    (tmp_path / "output").symlink_to(tmp_path / "big_disk")
    write(tmp_path / "output" / "checkpoints", 1)
    found = newest_good(tmp_path / "output" / "checkpoints", no_message)
    assert found is not None and found.facts == {"step": 1}


# The same step again


def test_a_checkpoint_saved_again_replaces_the_good_one(root):
    write(root, 1)
    write_checkpoint(root, 1, {"other.pt": b""}, {"step": "again"})
    assert names(root) == ["step-000001"]
    assert verify(root / "step-000001").facts == {"step": "again"}


def test_a_damaged_checkpoint_in_the_way_is_set_aside(root):
    write(root, 1)
    damage(root, 1)
    write(root, 1)
    assert names(root) == ["damaged-step-000001", "step-000001"]
    assert (root / "damaged-step-000001" / "shard.pt").read_bytes() == b"weights X"
    verify(root / "step-000001")


def test_a_replaced_checkpoint_comes_back_if_the_new_one_is_damaged(root):
    write(root, 1)
    shutil.copytree(root / "step-000001", root / ".replaced-step-000001")
    damage(root, 1)
    found = newest_good(root, no_message)
    assert found is not None and found.facts == {"step": 1}
    assert names(root) == ["damaged-step-000001", "step-000001"]


def test_a_replaced_checkpoint_is_removed_if_the_new_one_is_good(root):
    write(root, 1)
    shutil.copytree(root / "step-000001", root / ".replaced-step-000001")
    assert newest_good(root, no_message) is not None
    assert names(root) == ["step-000001"]


# The newest good one


def test_there_is_no_newest_checkpoint_before_the_first(root):
    assert newest_good(root, no_message) is None
    root.mkdir(parents=True)
    assert newest_good(root, no_message) is None


def test_the_newest_is_by_number_and_not_by_letters(root):
    write(root, 999_999, 1_000_000, 5)
    found = newest_good(root, no_message)
    assert found is not None and found.folder == root / "step-1000000"


def test_damaged_checkpoints_are_kept_aside_and_named_with_the_one_used_instead(root):
    write(root, 1, 2, 3)
    damage(root, 2)
    (root / "step-000003" / MANIFEST).unlink()
    messages: list[str] = []
    found = newest_good(root, messages.append)
    assert found is not None and found.folder.name == "step-000001"
    assert names(root) == ["damaged-step-000002", "damaged-step-000003", "step-000001"]
    assert (root / "damaged-step-000002" / "shard.pt").read_bytes() == b"weights X"
    assert len(messages) == 2 and not any("\n" in message for message in messages)
    for part in ("step-000003/MANIFEST.json is missing", "now called damaged-step-000003", "using step-000001 instead"):
        assert part in messages[0]
    for part in ("step-000002/shard.pt has changed", "now called damaged-step-000002", "using step-000001 instead"):
        assert part in messages[1]


def test_it_is_said_when_no_good_checkpoint_is_left(root):
    write(root, 1)
    damage(root, 1)
    messages: list[str] = []
    assert newest_good(root, messages.append) is None
    assert len(messages) == 1 and "no good one is left" in messages[0]


def test_damaged_checkpoints_of_one_step_are_numbered(root):
    for _ in range(3):
        write(root, 1)
        damage(root, 1)
        newest_good(root, lambda message: None)
    assert names(root) == ["damaged-step-000001", "damaged-step-000001-2", "damaged-step-000001-3"]


def test_a_checkpoint_of_a_newer_version_stops_the_run_and_is_not_touched(root, monkeypatch):
    write(root, 1)
    monkeypatch.setattr(manifest, "FORMAT", 2)
    write(root, 2)
    monkeypatch.undo()
    with pytest.raises(NewerCheckpoint, match="step-000002"):
        newest_good(root, no_message)
    assert names(root) == ["step-000001", "step-000002"]


def test_a_checkpoint_can_be_set_aside_for_another_reason(root):
    write(root, 1, 2)
    assert set_aside(root / "step-000002", "abandoned") == root / "abandoned-step-000002"
    assert checkpoint_names(root) == ["step-000001"]


# Removing


@pytest.mark.parametrize(
    ("keep_last", "keep", "left"),
    [
        (1, set(), [5]),
        (2, set(), [4, 5]),
        (2, {"step-000001", "step-000005", "step-000077"}, [1, 4, 5]),
        (9, set(), [1, 2, 3, 4, 5]),
    ],
)
def test_prune_keeps_the_newest_and_the_named(root, keep_last, keep, left):
    write(root, 1, 2, 3, 4, 5)
    removed = prune(root, keep_last, keep)
    assert names(root) == [checkpoint_name(step) for step in left]
    assert removed == [checkpoint_name(step) for step in range(1, 6) if step not in left]


def test_prune_removes_nothing_while_the_newest_is_damaged(root):
    write(root, 1, 2)
    damage(root, 2)
    with pytest.raises(DamagedCheckpoint, match=r"shard\.pt has changed"):
        prune(root, 1)
    assert names(root) == ["step-000001", "step-000002"]


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint(root, monkeypatch):
    write(root, 1, 2)

    def unlink(path: Path) -> None:
        os.unlink(path)
        raise KeyboardInterrupt

    watched = SimpleNamespace(**(vars(os) | {"unlink": unlink}))
    monkeypatch.setattr(durable, "os", watched)
    with pytest.raises(KeyboardInterrupt):
        prune(root, 1)
    assert names(root) == [".removing-step-000001", "step-000002"]


def test_prune_never_leaves_nothing(root):
    write(root, 1)
    with pytest.raises(ValueError, match="keep_last is 0: at least 1"):
        prune(root, 0)
    assert prune(root, 1) == []


def test_prune_leaves_alone_what_is_no_checkpoint(root):
    write(root, 1, 2)
    (root / "damaged-step-000001").mkdir()
    (root / "notes.txt").touch()
    prune(root, 1)
    assert names(root) == ["damaged-step-000001", "notes.txt", "step-000002"]


def test_prune_goes_on_where_a_dead_process_left_a_half_removed_one_of_the_same_name(root):
    write(root, 1, 2)
    (root / ".removing-step-000001").mkdir()
    (root / ".removing-step-000001" / "half").touch()
    prune(root, 1)
    assert names(root) == ["step-000002"]


def test_storage_imports_nothing_heavy():
    program = "import sys, training.storage; print({'torch', 'numpy', 'deepspeed'} & set(sys.modules))"
    folder = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
