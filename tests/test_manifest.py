"""Any change to a checkpoint is found before it is used, and a good one is never called damaged."""

import errno
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint_folders import folder_in_memory, write_checkpoint
from training import manifest
from training.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    FileRecord,
    NewerCheckpoint,
    checkpoint_name,
    checkpoint_step,
    manifest_bytes,
    verify,
)
from training.storage import begin

FILES = {"rank-0.pt": b"zero" * 4, "rank-1.pt": b"one!" * 4, "model/weights.bin": b"\x00\x01" * 9, "model/empty": b""}
FACTS = {"step": 100, "world_size": 2, "versions": {"torch": "2.11"}, "name": "é\n", "loss": 0.1}


@pytest.fixture
def root() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


@pytest.fixture
def folder(root) -> Path:
    return write_checkpoint(root, 100, FILES, FACTS)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def expect_damage(folder: Path, file: str, *said: object) -> None:
    """The checkpoint is refused by one line that names the file and says all that is in `said`."""
    with pytest.raises(DamagedCheckpoint) as caught:
        verify(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(folder), file, *said):
        assert str(part) in message


def test_a_manifest_holds_the_facts_and_every_file(folder):
    found = verify(folder)
    assert found.folder == folder
    assert found.facts == FACTS
    assert {record.path: (record.size, record.sha256) for record in found.files} == {
        path: (len(data), digest(data)) for path, data in FILES.items()
    }


def test_a_manifest_can_be_checked_by_hand(folder):
    """Its own hash is the sha256 of its text with zeros for that hash."""
    text = (folder / MANIFEST).read_text()
    content = json.loads(text)
    assert digest(text.replace(content["sha256"], "0" * 64).encode()) == content["sha256"]
    assert content["format"] == 1 and content["name"] == "step-000100"


def test_facts_with_zeros_like_an_empty_hash_come_back(root):
    facts = {"a": "0" * 64, "sha256": "0" * 64}
    assert verify(write_checkpoint(root, 1, {}, facts)).facts == facts


def test_facts_that_json_cannot_hold_are_refused(root):
    with pytest.raises(ValueError, match="JSON"):
        write_checkpoint(root, 1, {}, {"loss": float("nan")})


def test_no_clean_checkpoint_is_called_damaged(root):
    chance = random.Random(0)
    for step in range(250):
        names = [f"{'ab/'[: chance.choice([0, 3])]}file{number}" for number in range(chance.randrange(6))]
        files = {name: chance.randbytes(chance.choice([0, 1, 63, 64, 65, 5000])) for name in names}
        facts = {"step": step, "loss": chance.uniform(-1e9, 1e-9), "text": chr(chance.randrange(32, 0xD800)) * 3}
        saved = write_checkpoint(root, step, files, facts)
        for _ in range(4):
            assert verify(saved).facts == facts


# Damage


def test_every_flipped_bit_is_found(folder):
    flips = 0
    for path in [*FILES, MANIFEST]:
        data = (folder / path).read_bytes()
        for bit in range(8 * len(data)):
            flipped = data[bit // 8] ^ 1 << bit % 8
            changed = data[: bit // 8] + bytes([flipped]) + data[bit // 8 + 1 :]
            (folder / path).write_bytes(changed)
            hashes = () if path == MANIFEST else (digest(data), digest(changed))
            expect_damage(folder, path, *hashes)
            flips += 1
        (folder / path).write_bytes(data)
    verify(folder)
    assert flips >= 2000


def test_every_shortened_lengthened_or_zeroed_file_is_found(folder):
    for path in [*FILES, MANIFEST]:
        data = (folder / path).read_bytes()
        for changed in [data[:length] for length in range(len(data))] + [data + b"\0", data + b"\n", data * 2]:
            if changed != data:
                (folder / path).write_bytes(changed)
                sizes = () if path == MANIFEST else (f"expected {len(data)} bytes", f"found {len(changed)}")
                expect_damage(folder, path, *sizes)
        for start in range(0, len(data), 8):
            zeroed = data[:start] + bytes(len(data[start : start + 8])) + data[start + 8 :]
            if zeroed != data:
                (folder / path).write_bytes(zeroed)
                expect_damage(folder, path)
        (folder / path).write_bytes(data)
    verify(folder)


def test_every_swap_of_two_files_is_found(folder):
    names = sorted(FILES)
    for first in names:
        for second in names:
            if first < second:
                (folder / first).write_bytes(FILES[second])
                (folder / second).write_bytes(FILES[first])
                with pytest.raises(DamagedCheckpoint, match=f"{first}|{second}"):
                    verify(folder)
                (folder / first).write_bytes(FILES[first])
                (folder / second).write_bytes(FILES[second])
    verify(folder)


def test_a_file_or_manifest_of_another_checkpoint_is_found(root, folder):
    older = {path: data[::-1] for path, data in FILES.items()}
    other = write_checkpoint(root, 90, older, FACTS)
    for path in FILES:
        if FILES[path] != older[path]:
            shutil.copy(other / path, folder / path)
            expect_damage(folder, path, digest(FILES[path]), digest(older[path]))
            (folder / path).write_bytes(FILES[path])
    shutil.copy(other / MANIFEST, folder / MANIFEST)
    expect_damage(folder, MANIFEST, "expected step-000100", "found 'step-000090'")
    shutil.rmtree(folder)
    other.rename(folder)
    expect_damage(folder, MANIFEST, "expected step-000100", "found 'step-000090'")


@pytest.mark.parametrize("path", [*FILES, MANIFEST])
def test_a_missing_file_is_found(folder, path):
    (folder / path).unlink()
    expect_damage(folder, path, "is missing")


@pytest.mark.parametrize("path", ["extra.pt", "model/extra", "new/extra", ".hidden", "model/MANIFEST.json", "a\nb"])
def test_an_extra_file_is_found(folder, path):
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).touch()
    expect_damage(folder, repr(path), "expected only the 4 files recorded")


def test_links_pipes_and_folders_in_the_place_of_files_are_found(root, folder):
    def put_link(path: Path) -> None:
        path.rename(root / "target")
        path.symlink_to(root / "target")

    def put_pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def put_folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    for path in [*FILES, MANIFEST]:
        for put in (put_link, put_pipe, put_folder):
            copy = root / put.__name__ / folder.name
            shutil.copytree(folder, copy)
            put(copy / path)
            expect_damage(copy, path)
            shutil.rmtree(copy)
    (folder / "model").rename(root / "model")
    (folder / "model").symlink_to(root / "model")
    expect_damage(folder, "model", "found a link")


def test_a_link_put_in_the_place_of_a_file_after_the_folder_was_read_is_not_followed(root, folder):
    (root / "link").symlink_to(folder / MANIFEST)
    for read in (manifest.read, manifest.sha256):
        with pytest.raises(OSError, match="symbolic link"):
            read(root / "link")


def test_a_checkpoint_that_is_itself_a_link_or_a_file_is_refused(root, folder):
    (root / "elsewhere").mkdir()
    link = root / "elsewhere" / "step-000100"
    link.symlink_to(folder)
    expect_damage(link, "is not a folder")
    link.unlink()
    link.touch()
    expect_damage(link, "is not a folder")


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe", b"{", b"null", b"[]", b"1" * 5000, b"[" * 100_000, b"{}", b'{"sha256": 1}', b'{"sha256": ""}'],
)
def test_a_manifest_of_garbage_is_refused(folder, text):
    (folder / MANIFEST).write_bytes(text)
    expect_damage(folder, MANIFEST)


@pytest.mark.parametrize(
    "change",
    [
        {"facts": None},
        {"files": {}},
        {"files": [1]},
        {"files": [{}]},
        {"files": [{"path": "rank-0.pt", "size": "16", "sha256": 1}]},
        {"files": [{"path": ["a"], "size": 1, "sha256": ""}]},
        {"files": [{"path": "a", "size": 1, "sha256": "", "more": 1}]},
    ],
)
def test_a_manifest_with_a_right_hash_and_wrong_content_is_refused(folder, change):
    content = json.loads((folder / MANIFEST).read_text()) | change | {"sha256": "0" * 64}
    data = json.dumps(content).encode()
    (folder / MANIFEST).write_bytes(data.replace(b"0" * 64, digest(data).encode()))
    with pytest.raises(DamagedCheckpoint):
        verify(folder)


def test_a_file_recorded_twice_is_refused(folder):
    record = FileRecord("rank-0.pt", 16, digest(FILES["rank-0.pt"]))
    (folder / MANIFEST).write_bytes(manifest_bytes(folder.name, FACTS, [record, record]))
    expect_damage(folder, "rank-0.pt", "recorded twice")


def test_a_newer_format_is_refused_in_one_line_and_is_no_damage(folder, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    (folder / MANIFEST).write_bytes(manifest_bytes(folder.name, FACTS, []))
    monkeypatch.undo()
    with pytest.raises(NewerCheckpoint, match=r"MANIFEST\.json has format 2, and this version reads 1: use") as caught:
        verify(folder)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("number", "error"), [(errno.EIO, DamagedCheckpoint), (errno.EACCES, PermissionError)])
def test_a_broken_disk_is_damage_and_a_forbidden_file_is_not(folder, monkeypatch, number, error):
    def cannot_read(path: Path) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(manifest, "sha256", cannot_read)
    with pytest.raises(error, match=os.strerror(number)):
        verify(folder)


# Names


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """The paths of all files and folders that the process opens; an audit hook, which nothing can take out again."""

    def note(event: str, arguments: tuple) -> None:
        if event in ("open", "os.listdir", "os.scandir") and not isinstance(arguments[0], int):
            paths.append(os.fsdecode(arguments[0]).rstrip("/"))

    paths: list[str] = []
    sys.addaudithook(note)
    return paths


HOSTILE: list[Any] = [
    *("", ".", "..", "/", "//", "a//b", "a/", "/a", "./a", "a/.", "a/..", "a/../b", "../secret", "../../secret"),
    *("../step-000099/secret", "model/../../secret", "/etc/passwd", "//etc/passwd", "/dev/zero", "/proc/self/mem"),
    *("~", "~/secret", "~root/secret", "$HOME/secret", "${HOME}", "`id`", "a;b", "a|b", "a b", "a*", "a?", "[a]"),
    *("C:\\secret", "C:/secret", "..\\secret", "\\\\host\\share", "a\\b", "file:///etc/passwd", "a:b", "a\0b", "\0"),
    *("a\nb", "a\n", "\n", "a\rb", "a\tb", "\x1b[2J", "a\x7f", "-rf", "--help", "a/-rf", ".hidden", "a/.hidden"),
    *(
        "a\u2215b",
        "\u2044etc",
        "\uff0e\uff0e/secret",
        "\u202etxt",
        "é",
        "\ud800",
        "a" * 300,
        "a/" * 300,
        "MANIFEST.json",
    ),
    *(None, 7, ["a"], {"a": 1}),
]


def test_a_hostile_name_of_a_file_is_refused_and_nothing_outside_is_opened(tmp_path, opened):
    """The file outside has the size and the hash that the manifest says, so nothing but the name is wrong."""
    (tmp_path / "secret").write_bytes(b"secret")
    folder = tmp_path / "step-000100"
    (folder / "model").mkdir(parents=True)
    assert len(HOSTILE) >= 60
    for name in HOSTILE:
        record = FileRecord(name, 6, digest(b"secret"))
        (folder / MANIFEST).write_bytes(manifest_bytes(folder.name, {}, [record]))
        opened.clear()
        with pytest.raises(DamagedCheckpoint, match="names the file"):
            verify(folder)
        assert set(opened) == {str(folder), str(folder / "model"), str(folder / MANIFEST)}


def test_a_hostile_name_of_a_checkpoint_is_refused_before_anything_is_opened(tmp_path, opened):
    for name in HOSTILE:
        for hostile in (name, f"step-000100{name}", f"{name}step-000100"):
            if not isinstance(name, str) or hostile == "step-000100":
                continue
            opened.clear()
            with pytest.raises(ValueError, match="is no name of a checkpoint"):
                checkpoint_step(hostile)
            with pytest.raises(ValueError, match="is no name of a checkpoint"):
                begin(tmp_path, hostile)
            assert not opened
    assert not os.listdir(tmp_path)


def test_verification_opens_every_file_and_only_what_is_in_the_folder(folder, opened):
    opened.clear()
    verify(folder)
    assert set(opened) == {str(folder / path) for path in ("", "model", *FILES, MANIFEST)}


@pytest.mark.parametrize("step", [0, 1, 100, 999_999, 1_000_000, 10**14])
def test_a_step_survives_its_name(step):
    assert checkpoint_step(checkpoint_name(step)) == step


def test_names_sort_and_look_as_documented():
    assert [checkpoint_name(step) for step in (7, 100, 1234567)] == ["step-000007", "step-000100", "step-1234567"]


@pytest.mark.parametrize(
    "name",
    [
        "step-100",
        "step-0000100",
        "step-00010",
        "Step-000100",
        "step-\u0660\u0660\u0660\u0661\u0660\u0660",
        "step--00100",
        "step-1e5000",
        "step-" + "9" * 5000,
    ],
)
def test_another_spelling_of_a_name_is_refused(name):
    with pytest.raises(ValueError, match="is no name of a checkpoint: it must look like step-000100"):
        checkpoint_step(name)


@pytest.mark.parametrize("step", [-1, 10**16])
def test_a_step_that_no_name_can_hold_is_refused(step):
    with pytest.raises(ValueError, match="is no name"):
        checkpoint_name(step)
