"""What a hostile model folder or adapter cannot do: run code, or have other files opened."""

import ast
import ctypes
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jinja2
import peft
import pytest
import torch
import transformers
import transformers.dynamic_module_utils
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.hostile_pickles import hostile_pickles, open_unsafely
from tests.launching import ROOT
from training import untrusted
from training.config import ModelConfig
from training.models import (
    SCORE_FILE,
    eos_token_ids,
    holds_adapter,
    is_reward_model,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
)

TRICKS = sorted(hostile_pickles(Path("canary")))


def load_all(folder: Path, **options: Any) -> None:
    """Everything that a stage reads of the model that it starts from."""
    config = ModelConfig(path=str(folder), **options)
    eos_token_ids(config, load_tokenizer(config))
    load_causal_lm(config, torch.float32)


def load_weights(folder: Path) -> None:
    load_causal_lm(ModelConfig(path=str(folder)), torch.float32)


def load_reward(folder: Path) -> None:
    load_scalar_model(ModelConfig(path=str(folder)), torch.float32)


@pytest.fixture
def model(tmp_path: Path, tiny_model: Callable[[str], str]) -> Path:
    """A model's folder that a test may change."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


@pytest.fixture
def reward_model(tmp_path: Path, tiny_reward_model: Callable[[str], str]) -> Path:
    return Path(shutil.copytree(tiny_reward_model("llama"), tmp_path / "reward_model"))


@pytest.fixture(scope="session")
def written_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], str]) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    shutil.copytree(tiny_model("llama"), folder, dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors"])
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path, written_adapter: Path) -> Path:
    """A folder with adapters on the tiny model, that a test may change."""
    return Path(shutil.copytree(written_adapter, tmp_path / "adapter"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def split_weights(folder: Path) -> None:
    """Moves the weights into one shard with an index, as save_pretrained does with large models."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    name_shards(folder, "model-00001-of-00001.safetensors")


def name_shards(folder: Path, name: Any) -> None:
    shard = folder / "model-00001-of-00001.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(shard), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# What is opened


class Opened:
    """Paths that Python code opens while `on`. A hook cannot be taken back, so there is one for all tests."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.on = False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if self.on and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes)):
            self.paths.append(os.fsdecode(arguments[0]))


OPENED: list[Opened] = []


@contextmanager
def opens_of(folder: Path) -> Iterator[list[str]]:
    """What of a folder is opened meanwhile, by Python (audit hook) or by any library (inotify, of the files in it)."""
    if not OPENED:
        OPENED.append(Opened())
    hook = OPENED[0]
    found: list[str] = []
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert watch >= 0 and libc.inotify_add_watch(watch, os.fsencode(folder), 0x20) >= 0  # IN_OPEN
    hook.paths, hook.on = [], True
    try:
        yield found
    finally:
        hook.on = False
        found += [path for path in hook.paths if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))]
        with suppress(BlockingIOError):
            found += [f"inotify: {os.read(watch, 100_000)!r}"]
        os.close(watch)


@pytest.fixture
def secret(tmp_path: Path, tiny_model: Callable[[str], str]) -> Path:
    """A folder beside the model with files that would load, were they opened."""
    folder = tmp_path / "secret"
    folder.mkdir()
    for file in Path(tiny_model("llama")).iterdir():
        shutil.copy(file, folder / file.name)
    shutil.copy(folder / "model.safetensors", folder / "evil.safetensors")
    shutil.copy(folder / "tokenizer.json", folder / "tokenizer.4.0.0.json")
    return folder


def test_the_watch_sees_what_python_and_what_rust_opens(secret: Path) -> None:
    with opens_of(secret) as opened:
        (secret / "config.json").read_text()
    assert any(path.endswith("config.json") for path in opened)
    with opens_of(secret) as opened:
        load_file(secret / "evil.safetensors")
    assert any("inotify" in path and "evil" in path for path in opened)
    with opens_of(secret) as opened:
        assert (secret / "evil.safetensors").exists()
    assert not opened


# Pickles

IGNORED = (
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "trainer_state.json",
    "adapter_model.bin",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "tf_model.h5",
    "model.ckpt.index",
    "mp_rank_00_model_states.pt",
    "tokenizer.model",
    "vocab.txt",
    "processor_config.json",
    ".metadata",
    "dataset.pkl",
)

# File, what stands in its way, and what loads it.
REFUSED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("pytorch_model.bin", ("model.safetensors",), "model"),
    ("pytorch_model.bin.index.json", ("model.safetensors",), "model"),
    ("model.safetensors", (), "model"),
    ("model.safetensors.index.json", ("model.safetensors",), "model"),
    ("config.json", (), "model"),
    ("generation_config.json", (), "model"),
    ("tokenizer.json", (), "model"),
    ("tokenizer_config.json", (), "model"),
    ("special_tokens_map.json", (), "model"),
    ("added_tokens.json", (), "model"),
    ("vocab.json", (), "model"),
    ("model.safetensors", (), "reward_model"),
    ("config.json", (), "reward_model"),
    (SCORE_FILE, (), "reward_model"),
    ("adapter_config.json", (), "adapter"),
    ("adapter_model.safetensors", (), "adapter"),
    ("adapter_model.bin", ("adapter_model.safetensors",), "adapter"),
)
# Text may be anything, so a pickle of printable characters is one: it is read as that, if at all.
TEXTS = ("merges.txt", "chat_template.jinja")


def refusal(load: Callable[[Path], None], folder: Path) -> str:
    with pytest.raises(ValueError) as refused:
        load(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("trick", TRICKS)
def test_a_hostile_pickle_is_live(trick: str, tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    canary = tmp_path / "canary"
    (tmp_path / "file").write_bytes(hostile_pickles(canary)[trick])
    assert not canary.exists()
    with suppress(EOFError):  # some have nothing more to give
        open_unsafely(trick, tmp_path / "file")
    assert canary.exists()


@pytest.mark.parametrize("trick", TRICKS)
def test_no_file_of_a_folder_runs_a_pickle(
    trick: str, tmp_path: Path, model: Path, reward_model: Path, adapter: Path
) -> None:
    canary = tmp_path / "canary"
    content = hostile_pickles(canary)[trick]
    folders = {"model": model, "reward_model": reward_model, "adapter": adapter}
    loads = {"model": load_all, "reward_model": load_reward, "adapter": load_all}
    for name, in_the_way, kind in REFUSED:
        folder = folders[kind]
        saved = {file: (folder / file).read_bytes() for file in (name, *in_the_way) if (folder / file).exists()}
        for file in in_the_way:
            (folder / file).unlink()
        (folder / name).write_bytes(content)
        message = refusal(loads[kind], folder)
        assert str(folder) in message and name in message, message
        (folder / name).unlink()
        for file, before in saved.items():
            (folder / file).write_bytes(before)
    for name in TEXTS:
        (model / name).write_bytes(content)
        try:
            load_tokenizer(ModelConfig(path=str(model)))
        except ValueError as error:
            assert name in str(error)
        (model / name).unlink()
    for folder in (model, adapter):
        for name in IGNORED:
            (folder / name).write_bytes(content)
        load_all(folder)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_files_that_are_ignored_are_not_even_opened(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    for name in IGNORED:
        (folder / name).write_bytes(b"")
    with opens_of(folder) as opened:
        load_all(folder)
    assert opened and not [path for path in opened if Path(path).name in IGNORED]
    assert not [path for path in opened if path.startswith("inotify") and any(name in path for name in IGNORED)]


@pytest.mark.parametrize("trick", TRICKS)
def test_a_shard_is_no_pickle_whatever_its_name(trick: str, tmp_path: Path, model: Path) -> None:
    canary = tmp_path / "canary"
    content = hostile_pickles(canary)[trick]
    split_weights(model)
    load_all(model)
    for name in ("pytorch_model.bin", "weights.pt"):
        (model / name).write_bytes(content)
        name_shards(model, name)
        assert name in refusal(load_all, model)
    name_shards(model, "model-00001-of-00001.safetensors")
    (model / "model-00001-of-00001.safetensors").write_bytes(content)
    assert "model-00001-of-00001.safetensors is not a safetensors file" in refusal(load_all, model)
    (model / "model.safetensors").unlink(missing_ok=True)
    (model / "adapter_model.bin").write_bytes(content)
    edit_json(model / "config.json", transformers_weights="adapter_model.bin")
    assert "transformers_weights" in refusal(load_all, model)
    assert not canary.exists()


def test_absent_weights_say_what_is_read_instead(model: Path, adapter: Path) -> None:
    for folder, weights, pickled in (
        (model, "model.safetensors", "pytorch_model.bin"),
        (adapter, "adapter_model.safetensors", "adapter_model.bin"),
    ):
        (folder / weights).rename(folder / pickled)
        message = refusal(load_all, folder)
        assert f"{pickled} is not opened, as it could run code" in message and "save_pretrained" in message
        (folder / pickled).unlink()
        assert "save_pretrained" in refusal(load_all, folder)


def test_the_library_itself_is_told_to_read_safetensors_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two locks: this one holds also where the project's own check would miss something."""
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    monkeypatch.setattr("training.models.check_model", lambda path, revision: None)
    assert "no file named model.safetensors" in refusal(load_weights, model)


# Names

HOSTILE_NAMES = (
    "../secret/evil.safetensors",
    "./../secret/evil.safetensors",
    "sub/../../secret/evil.safetensors",
    "..//secret/evil.safetensors",
    "../model/../secret/evil.safetensors",
    "SECRET/evil.safetensors",
    "//SECRET/evil.safetensors",
    "/proc/self/cwd/evil.safetensors",
    "/dev/zero",
    "/dev/stdin.safetensors",
    "~/evil.safetensors",
    "~root/evil.safetensors",
    "$HOME/evil.safetensors",
    "file:///SECRET/evil.safetensors",
    "https://example.com/evil.safetensors",
    "C:\\evil.safetensors",
    "\\\\host\\share\\evil.safetensors",
    "..\\secret\\evil.safetensors",
    "sub\\evil.safetensors",
    "sub/evil.safetensors",
    "evil.safetensors/",
    "/",
    ".",
    "..",
    "",
    " ",
    ".evil.safetensors",
    "-evil.safetensors",
    "--help.safetensors",
    " evil.safetensors",
    "evil.safetensors ",
    "evil .safetensors",
    "evil\0.safetensors",
    "evil.safetensors\0",
    "../secret/evil.safetensors\0.safetensors",
    "evil\n.safetensors",
    "evil.safetensors\n",
    "evil\r.safetensors",
    "evil\t.safetensors",
    "evil\x1b[2J.safetensors",
    "evil\x7f.safetensors",
    "..\u2215secret\u2215evil.safetensors",
    "..\u2044secret\u2044evil.safetensors",
    "\uff0e\uff0e/secret/evil.safetensors",
    "\uff0e\uff0e\uff0fsecret\uff0fevil.safetensors",
    "evil\u202esrosnetefas.safetensors",
    "evil\u200b.safetensors",
    "\u0435vil.safetensors",
    "evil\ud800.safetensors",
    "%2e%2e%2fsecret%2fevil.safetensors",
    "..%2fsecret%2fevil.safetensors",
    "..;/secret/evil.safetensors",
    "a" * 300 + ".safetensors",
    "../" * 100 + "evil.safetensors",
    "evil.safetensors.bin",
    "evil.bin",
    "evil.safetensors.index.json",
    "evil.SAFETENSORS",
    "evil|touch canary|.safetensors",
    "$(touch canary).safetensors",
    "*.safetensors",
)


def test_there_are_sixty_hostile_names() -> None:
    assert len(set(HOSTILE_NAMES)) >= 60


def test_an_index_names_only_files_of_its_folder(model: Path, secret: Path) -> None:
    split_weights(model)
    load_all(model)
    with opens_of(secret) as opened:
        for name in (*HOSTILE_NAMES, 3, None, ["x.safetensors"], {"a": 1}, True):
            name_shards(model, name.replace("SECRET", str(secret)) if isinstance(name, str) else name)
            message = refusal(load_weights, model)
            assert "model.safetensors.index.json" in message, (name, message)
            assert message.isprintable() and len(message) < 500
    assert not opened


@pytest.mark.parametrize(
    "index",
    [[], 3, "text", {}, {"weight_map": {}}, {"weight_map": [], "metadata": {}}, {"metadata": {}, "weight_map": None}],
)
def test_an_index_that_is_none_is_refused(model: Path, index: Any) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json" in refusal(load_all, model)


def test_json_that_would_exhaust_the_reader_is_refused(model: Path) -> None:
    for content in ("[" * 100_000, '{"a":' * 100_000, f'{{"a": {"9" * 10_000}}}', "\ufeff{}", '{"a": 1'):
        (model / "config.json").write_text(content)
        assert "config.json is not JSON" in refusal(load_all, model)


def test_no_config_of_a_folder_names_files_elsewhere(model: Path, secret: Path) -> None:
    """Each of these is a name that transformers would join to the folder, or open as it stands."""
    outside = str(secret / "tokenizer.json")
    tokenizer_files = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "gguf_file", "chat_template_file")
    with opens_of(secret) as opened:
        changes: dict[str, Any]
        for changes in (
            {"transformers_weights": "../secret/evil.safetensors"},
            {"transformers_weights": str(secret / "evil.safetensors")},
            {"configuration_files": ["../secret/config.4.0.0.json"]},
            {"configuration_files": "config.json"},
        ):
            before = (model / "config.json").read_text()
            edit_json(model / "config.json", **changes)
            assert "config.json" in refusal(load_all, model)
            (model / "config.json").write_text(before)
        before = (model / "tokenizer_config.json").read_text()
        for changes in (
            {"fast_tokenizer_files": ["../secret/tokenizer.4.0.0.json"]},
            {"fast_tokenizer_files": [f"{secret}/tokenizer.4.0.0.json"]},
            {"fast_tokenizer_files": {"a": 1}},
            {"init_inputs": [outside]},
        ):
            edit_json(model / "tokenizer_config.json", **changes)
            assert "tokenizer_config.json" in refusal(load_all, model)
            (model / "tokenizer_config.json").write_text(before)
        # Old tokenizers carry such names from their author's machine, so these are not refused: nothing follows them.
        edit_json(model / "tokenizer_config.json", **dict.fromkeys(tokenizer_files, outside))
        load_all(model)
    assert not opened


def test_links_lead_nowhere_else(model: Path, secret: Path) -> None:
    names = [file.name for file in model.iterdir()]
    with opens_of(secret) as opened:
        for name in (
            *names,
            "generation_config.json",
            "chat_template.jinja",
            "checkpoint-1",
            "additional_chat_templates",
        ):
            link, kept = model / name, model.parent / "kept"
            if link.exists():
                link.rename(kept)
            link.symlink_to(secret / name if (secret / name).exists() else secret)
            assert f"'{name}' is a link that leads out of the folder" in refusal(load_all, model)
            link.unlink()
            if kept.exists():
                kept.rename(link)
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "more.jinja").symlink_to(secret / "config.json")
        assert "'more.jinja' is a link" in refusal(load_all, model)
    assert not opened


def test_only_a_snapshot_has_blobs_beside_it(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "owner" / "checkpoints" / "model"
    shutil.copytree(model, folder)
    shutil.move(model, tmp_path / "owner" / "blobs")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../blobs/config.json")
    assert "'config.json' is a link" in refusal(load_all, folder)


def test_a_link_of_an_index_or_adapter_is_refused(model: Path, adapter: Path, secret: Path) -> None:
    split_weights(model)
    shard = model / "model-00001-of-00001.safetensors"
    shard.unlink()
    shard.symlink_to("../secret/evil.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").symlink_to(secret / "evil.safetensors")
    with opens_of(secret) as opened:
        assert "is a link that leads out" in refusal(load_all, model)
        assert "is a link that leads out" in refusal(load_all, adapter)
    assert not opened


def test_links_inside_a_folder_and_to_a_folder_are_followed(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "model.safetensors").symlink_to("weights.safetensors")
    (model.parent / "linked").symlink_to(model)
    load_all(model.parent / "linked")


def test_a_pipe_is_refused_and_not_waited_for(model: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    assert "'config.json' is neither a file nor a folder" in refusal(load_all, model)


def hub_cache(tmp_path: Path, source: Path) -> Path:
    """A snapshot as the hub's cache keeps it: links to blobs beside it. Returns the snapshot's folder."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    for number, file in enumerate(source.iterdir()):
        shutil.copy(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


@pytest.fixture
def snapshot(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model in the hub's cache, as owner/name."""
    split_weights(model)
    snapshot = hub_cache(tmp_path, model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_the_hubs_cache_goes_on_working(snapshot: Path) -> None:
    load_all(snapshot)
    load_all("owner/name")  # type: ignore[arg-type]


def test_a_hub_model_is_held_to_the_same(snapshot: Path, secret: Path) -> None:
    index = snapshot / "model.safetensors.index.json"
    written = index.read_text()
    with opens_of(secret) as opened:
        for name in ("../" * 5 + "secret/evil.safetensors", str(secret / "evil.safetensors"), "weights.bin"):
            index.unlink()
            index.write_text(written.replace("model-00001-of-00001.safetensors", name))
            for path in ("owner/name", snapshot):
                assert "model.safetensors.index.json names the file" in refusal(load_all, path)  # type: ignore[arg-type]
        index.unlink()
        (snapshot / "pytorch_model.bin").write_bytes(b"")
        for path in ("owner/name", snapshot):
            assert "weights are read from safetensors alone" in refusal(load_all, path)  # type: ignore[arg-type]
        (snapshot / "adapter_config.json").write_text("{}")
        assert "these are adapters" in refusal(load_all, "owner/name")  # type: ignore[arg-type]
    assert not opened


def test_a_cache_with_links_elsewhere_is_refused(snapshot: Path, secret: Path) -> None:
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(secret / "config.json")
    with opens_of(secret) as opened:
        assert "'config.json' is a link" in refusal(load_all, snapshot)
    assert not opened
    (snapshot / "config.json").unlink()
    blobs = snapshot.parent.parent / "blobs"
    shutil.rmtree(blobs)
    blobs.symlink_to(secret)
    with opens_of(secret) as opened:
        assert "is a link" in refusal(load_all, snapshot)
    assert not opened


BAD_PATHS = ("a\0b", "a\nb", "", "-model", "~/model", "a" * 300, "x/" * 3000, "tab\there", "\x1b[2J")


@pytest.mark.parametrize("path", BAD_PATHS[:2] + BAD_PATHS[3:])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    config = ModelConfig(path=path)
    for load in (load_tokenizer, is_reward_model):
        with pytest.raises(ValueError, match="it needs a folder or a name on the hub"):
            load(config)
    with pytest.raises(ValueError, match="it needs a folder or a name on the hub"):
        holds_adapter(path)


def test_a_file_is_no_folder(model: Path) -> None:
    assert "which is a file: give the folder" in refusal(load_all, model / "model.safetensors")


@pytest.mark.parametrize("base", [*BAD_PATHS, None, 3, True, ["a"], {"a": "b"}])
def test_an_adapter_names_its_base_in_plain_text(adapter: Path, base: Any) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    message = refusal(load_all, adapter)
    assert "base_model_name_or_path of adapter_config.json" in message and message.isprintable()


@pytest.mark.parametrize("revision", [3, ["main"], {"a": "b"}])
def test_an_adapter_names_the_revision_of_its_base_in_plain_text(adapter: Path, revision: Any) -> None:
    edit_json(adapter / "adapter_config.json", revision=revision)
    assert "revision of adapter_config.json is" in refusal(load_all, adapter)


@pytest.mark.parametrize("base", ["../../etc", "C:\\model", "..\\model", "a\u2215b", "http://host/model", "a b", "//"])
def test_a_base_that_is_nowhere_is_named(adapter: Path, base: str) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    assert f"{base} cannot be loaded" in refusal(load_all, adapter)


def test_the_base_of_an_adapter_may_lie_elsewhere_and_is_checked_there(
    adapter: Path, model: Path, secret: Path, tmp_path: Path
) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(model))
    load_all(adapter)
    split_weights(model)
    name_shards(model, "../secret/evil.safetensors")
    with opens_of(secret) as opened:
        assert "names the file '../secret/evil.safetensors'" in refusal(load_all, adapter)
        other = shutil.copytree(adapter, tmp_path / "other")
        edit_json(other / "adapter_config.json", base_model_name_or_path=str(adapter))
        assert "these are adapters, where a whole model is needed" in refusal(load_all, other)
    assert not opened


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": None},
        {"megatron_config": {"a": 1}, "megatron_core": "megatron.core.evil"},
    ],
)
def test_adapters_that_load_more_than_weights_are_refused(adapter: Path, changes: dict[str, Any]) -> None:
    edit_json(adapter / "adapter_config.json", **changes)
    assert "adapter_config.json" in refusal(load_all, adapter)


# Code that comes with a model


@pytest.fixture
def bait(model: Path, tmp_path: Path) -> Path:
    """A canary, which the Python files of `model` make when they are imported."""
    canary = tmp_path / "canary"
    for name in ("evil.py", "custom_generate/generate.py", "__init__.py", "modeling_llama.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(f"open({str(canary)!r}, 'w').close()\n")
    return canary


AUTO_MAP = {
    name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
}


def test_code_of_a_model_is_not_run(model: Path, bait: Path) -> None:
    own = (model / "config.json").read_text()
    edit_json(model / "config.json", auto_map=AUTO_MAP, model_type="an architecture of its own")
    assert "trust_remote_code" in refusal(load_all, model)
    (model / "config.json").write_text(own)
    edit_json(model / "config.json", auto_map=AUTO_MAP, custom_pipelines={"a": {"impl": "evil.A"}})
    load_all(model)  # transformers knows the architecture, so its own code is used
    for changes in (
        {"_attn_implementation_internal": "owner/kernel", "_experts_implementation_internal": "owner/kernel"},
        {"_attn_implementation": "owner/kernel", "use_kernels": True, "kernel_config": {"a": "owner/kernel"}},
    ):
        (model / "config.json").write_text(own)
        edit_json(model / "config.json", **changes)
        load_all(model)
    edit_json(model / "generation_config.json", custom_generate="owner/code", trust_remote_code=True)
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]})
    try:
        load_all(model)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    assert not bait.exists()


def test_code_of_a_model_runs_where_it_is_trusted(
    model: Path, bait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test above would show nothing."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    edit_json(model / "config.json", auto_map=AUTO_MAP, model_type="an architecture of its own")
    with pytest.raises(AttributeError, match="AutoConfig"):  # evil.py has no such class
        load_all(model, trust_remote_code=True)
    assert bait.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
        "{{ messages.__class__.__init__.__globals__ }}",
    ],
)
def test_a_chat_template_runs_no_code(model: Path, tmp_path: Path, template: str) -> None:
    canary = tmp_path / "canary"
    (model / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))
    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    with pytest.raises((jinja2.exceptions.SecurityError, jinja2.exceptions.UndefinedError)):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    assert not canary.exists()


# Numbers


@pytest.mark.parametrize(
    "text",
    [
        '{"gain": NaN, "bias": 0}',
        '{"gain": 1, "bias": -Infinity}',
        '{"gain": 1e999, "bias": 0}',
        f'{{"gain": 1{"0" * 400}, "bias": 0}}',
        f'{{"gain": 1, "bias": 1{"0" * 5000}}}',
        '{"gain": 1e39, "bias": 0}',
        '{"gain": true, "bias": 0}',
        '{"gain": "1", "bias": 0}',
        '{"gain": null, "bias": 0}',
        '{"gain": [1], "bias": 0}',
        '{"gain": 1}',
        "[1, 0]",
        "1",
        "",
    ],
)
def test_a_normalisation_that_is_no_pair_of_numbers_is_refused(reward_model: Path, text: str) -> None:
    (reward_model / SCORE_FILE).write_text(text)
    message = refusal(load_reward, reward_model)
    assert SCORE_FILE in message and len(message) < 500


def test_large_and_whole_numbers_are_a_normalisation(reward_model: Path) -> None:
    (reward_model / SCORE_FILE).write_text('{"gain": 3, "bias": -3.4e38}')
    model = load_scalar_model(ModelConfig(path=str(reward_model)), torch.float32)
    assert (model.gain, model.bias) == (3.0, -3.4e38) and math.isfinite(torch.tensor(model.bias).item())


# Versions


@pytest.mark.parametrize(
    ("package", "version", "hole"),
    [
        ("torch", "2.9.1+cu126", "CVE-2026-24747"),
        ("torch", "1.13.0", "CVE-2026-24747"),
        ("transformers", "4.57.1", "CVE-2026-4372"),
        ("transformers", "5.2.9", "CVE-2026-4372"),
        ("deepspeed", "0.15.0", "CVE-2024-43497"),
        ("deepspeed", "0.9.5", "CVE-2024-43497"),
    ],
)
def test_libraries_with_a_known_hole_are_refused(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, hole: str
) -> None:
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == package else installed(name))
    with pytest.raises(ValueError, match=rf"{package} {version.replace('+', '.')} has {hole}.*install {package}>="):
        untrusted.check_versions()


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1", "2.13.0+cpu", "3.0", "10.0.1"])
def test_newer_libraries_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "torch" else "99.1")
    untrusted.check_versions()


@pytest.mark.parametrize("program", ["training/distributed.py", "scripts/chat.py"])
def test_every_program_asks_for_the_versions(program: str) -> None:
    called = {
        node.func.id
        for node in ast.walk(ast.parse((ROOT / program).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "check_versions" in called
