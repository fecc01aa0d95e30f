"""Checks on the folder of a model that somebody else made, before a library opens what is in it.

Weights are read from safetensors alone, which can hold no code; a pickle is never opened. The names that one file of a
folder gives of others are plain, and no link leads out of the folder. What is wrong is a ValueError that names the
file.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

MODEL_TEXTS = ("config.json", "generation_config.json")
TOKENIZER_TEXTS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
TEMPLATES_FOLDER = "additional_chat_templates"

LARGEST_NAME_BYTES, LARGEST_PATH_BYTES = 255, 2000  # what the usual file systems take, and more than anybody writes
LARGEST_FLOAT32 = 3.4028234663852886e38

# Below these, loading what others made can run their code, whatever this module forbids.
OLDEST_VERSIONS = {
    "torch": ((2, 10), "CVE-2026-24747, memory corruption by a file of weights"),
    "transformers": ((5, 3), "CVE-2026-4372, code run by a model's config.json"),
    "deepspeed": ((0, 15, 1), "CVE-2024-43497, commands run by the launcher"),
}


def check_versions() -> None:
    """Refuses libraries with a known hole that a model folder or a launch can reach."""
    for name, (oldest, hole) in OLDEST_VERSIONS.items():
        found = metadata.version(name)
        if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < oldest:
            needed = ".".join(str(part) for part in oldest)
            raise ValueError(f"{name} {found} has {hole}: install {name}>={needed}, as scripts/setup.sh does")


def check_path(path: object, given: str = "the model") -> None:
    """Refuses what can be neither a folder nor a name on the hub.

    Args:
        path: from the user, or from a file.
        given: where it stands, for the message.
    """
    if not isinstance(path, (str, Path)):
        raise ValueError(f"{given} is {shown(path)}: it needs the text of a folder or of a name on the hub")
    text = os.fspath(path)
    parts = [part.encode("utf-8", "surrogatepass") for part in text.split("/")]
    too_long = max(map(len, parts)) > LARGEST_NAME_BYTES or sum(map(len, parts)) > LARGEST_PATH_BYTES
    if not text or text[0] in "-~" or re.search(r"[\x00-\x1f\x7f]", text) or too_long:
        raise ValueError(
            f"{given} is {shown(text)}: it needs a folder or a name on the hub, without line breaks, and without a "
            "dash or ~ at its start (write ./ before it, or the whole path)"
        )
    if Path(text).is_file():
        raise ValueError(f"{given} is {shown(text)}, which is a file: give the folder that it is in")


def check_config(path: str, revision: str | None) -> None:
    """Refuses a model's `config.json` that is none, or that names files elsewhere."""
    check_folder(path, MODEL_TEXTS)
    config = read_object(path, "config.json", revision) or {}
    if config.get("transformers_weights") is not None:
        raise ValueError(f"config.json names its own file of weights (transformers_weights): rename that to {WEIGHTS}")
    for name in texts(config.get("configuration_files", []), "configuration_files of config.json"):
        check_name(name, "config.json", ending=".json")


def check_model(path: str, revision: str | None) -> None:
    """Refuses a folder or hub name whose weights are not in safetensors, or whose files name others elsewhere.

    Does nothing where there is no model: the library that loads it says so.
    """
    check_config(path, revision)
    if find(path, "config.json", revision) is None:
        return
    if find(path, ADAPTER_FILE, revision):
        raise ValueError(
            f"{ADAPTER_FILE}: these are adapters, where a whole model is needed: on top of a model give them as a "
            "folder, not by a hub name; merge adapters that stand on other adapters (lora.merge_on_save)"
        )
    for name in weight_files(path, revision):
        if Path(path).is_dir():
            check_safetensors(Path(path) / name)


def check_tokenizer(path: str, revision: str | None) -> None:
    """Refuses a tokenizer whose files cannot be read as text, or name others elsewhere."""
    check_config(path, revision)  # it says which class of tokenizer to use
    check_folder(path, TOKENIZER_TEXTS)
    config = read_object(path, "tokenizer_config.json", revision) or {}
    for name in texts(config.get("fast_tokenizer_files", []), "fast_tokenizer_files of tokenizer_config.json"):
        check_name(name, "tokenizer_config.json", ending=".json")
    if config.get("init_inputs"):
        raise ValueError("tokenizer_config.json has init_inputs, which could name any file: take them out")


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """The checked `adapter_config.json` of a folder with LoRA adapters."""
    check_folder(folder, (ADAPTER_FILE,))
    settings = read_object(folder, ADAPTER_FILE, revision=None) or {}
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type of {ADAPTER_FILE} is {shown(settings.get('peft_type'))}: only LORA is read")
    if settings.get("megatron_config"):
        raise ValueError(f"{ADAPTER_FILE} has megatron_config, by which peft would import a module: take it out")
    check_path(settings.get("base_model_name_or_path"), f"base_model_name_or_path of {ADAPTER_FILE}")
    if not isinstance(settings.get("revision"), str | None):
        raise ValueError(f"revision of {ADAPTER_FILE} is {shown(settings['revision'])}: it needs a name or null")
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}" + pickles_instead(Path(folder)))
    check_safetensors(Path(folder) / ADAPTER_WEIGHTS)
    return settings


def read_number(values: dict[str, Any], name: str, file: str) -> float:
    """A finite number that float32 can hold, out of a JSON file."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST_FLOAT32:
        raise ValueError(f"{name} of {file} is {shown(value)}: it needs a finite number")
    return float(value)


def read_object(path: str | Path, name: str, revision: str | None) -> dict[str, Any] | None:
    """The JSON object in a file of a model, None where there is no such file."""
    file = find(path, name, revision)
    if file is None:
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object: it needs {{...}}")
    return value


def find(path: str | Path, name: str, revision: str | None) -> Path | None:
    """A file of a folder, or of a hub name, from which it is fetched where the cache lacks it; None if it is absent."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(str(path), name, revision=revision))
    except EntryNotFoundError:  # also where there is no network
        return None


def weight_files(path: str, revision: str | None) -> list[str]:
    """Names of the safetensors files that a model is in, as its index gives them where there is one."""
    if find(path, WEIGHTS, revision):
        return [WEIGHTS]
    index = read_object(path, WEIGHTS_INDEX, revision)
    if index is None:
        raise ValueError(f"there is neither {WEIGHTS} nor {WEIGHTS_INDEX}" + pickles_instead(Path(path)))
    named = index.get("weight_map")
    if not isinstance(named, dict) or not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{WEIGHTS_INDEX} is not an index of weights: it needs weight_map and metadata")
    names = sorted(set(texts(list(named.values()), f"weight_map of {WEIGHTS_INDEX}")))
    for name in names:
        check_name(name, WEIGHTS_INDEX, ending=".safetensors")
    return names


def pickles_instead(folder: Path) -> str:
    """The end of a sentence on absent weights: what is there in their place, and what to do."""
    names = [
        name
        for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
        if (folder / name).exists()
    ]
    there = f", and {' and '.join(names)} is not opened, as it could run code" if names else ""
    return f"{there}: weights are read from safetensors alone; save_pretrained of transformers writes them"


def check_safetensors(file: Path) -> None:
    """Reads the header of a file, which says where each tensor lies: a pickle or a part of a file has none."""
    try:
        with safe_open(file, "pt"):
            return
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file.name} is not a safetensors file ({' '.join(str(error).split())})") from error


def check_folder(path: str | Path, text_files: tuple[str, ...]) -> None:
    """Refuses a folder with links that lead out of it, and text files that are none. Passes what is on the hub."""
    check_path(path)
    if not Path(path).is_dir():
        return
    check_links(Path(path))
    for name in text_files:
        if name.endswith(".json"):
            read_object(path, name, revision=None)
        elif (Path(path) / name).is_file():
            try:
                (Path(path) / name).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} is not a text file in UTF-8") from error


def check_links(folder: Path) -> None:
    """Refuses links out of a folder, and what is neither a file nor a folder: to open a pipe would wait for ever.

    The hub's cache keeps a snapshot's files in a folder beside it, models--owner--name/blobs, to which its links lead.
    """
    root = Path(os.path.realpath(folder))
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for entry in itertools.chain(sorted(root.iterdir()), (root / TEMPLATES_FOLDER).glob("*")):
        if not any(Path(os.path.realpath(entry)).is_relative_to(home) for home in homes):
            raise ValueError(f"{shown(entry.name)} is a link that leads out of the folder: put the file itself there")
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise ValueError(f"{shown(entry.name)} is neither a file nor a folder: delete it")


def check_name(name: str, file: str, ending: str) -> None:
    """Refuses the name of a file, out of another file, that is more than a name in the same folder."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,199}", name) or not name.endswith(ending):
        raise ValueError(f"{file} names the file {shown(name)}: it needs a plain name that ends in {ending}")


def texts(values: Any, what: str) -> Iterator[str]:
    """The texts of a list out of a file."""
    if not isinstance(values, list):
        raise ValueError(f"{what} is {shown(values)}: it needs a list")
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{what} holds {shown(value)}: it needs texts")
        yield value


def shown(value: Any) -> str:
    """A value out of a file for a message: short, on one line, without what would steer a terminal."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
