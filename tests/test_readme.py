"""What README says is so: its tree, its commands, its examples and its glossary."""

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro
from deepspeed.launcher.runner import parse_args as parse_launcher_arguments

from scripts.chat import ChatConfig
from scripts.classic_control import ControlConfig
from scripts.run_all import load_recipe
from step1_sft.config import SftConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PpoConfig
from tests.launching import alone, run_well
from tests.tiny_models import save_tiny_model, write_tiny_data
from tests.tiny_runs import tiny_configs, write_configs
from training.config_files import load_config
from training.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = {
    "step1_sft.train": SftConfig,
    "step2_reward.train": RewardConfig,
    "step3_ppo.train": PpoConfig,
    "scripts.chat": ChatConfig,
}


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language; of no language where it is empty."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for found, block in fenced if found == language]


def named_files() -> dict[str, str]:
    """Example files: a name in backquotes, the rest of its paragraph up to a colon, then the block with its text."""
    pattern = r"`([\w.]+\.(?:yaml|json|jsonl|py))`(?:(?!\n\n)[^`])*:\n\n```\w+\n(.*?)^```$"
    return dict(re.findall(pattern, README, flags=re.MULTILINE | re.DOTALL))


def commands() -> list[list[str]]:
    """The words of every command in this README and in those of the recipes."""
    texts = [README, *(path.read_text(encoding="utf-8") for path in ROOT.glob("scripts/**/README.md"))]
    lines = "\n".join("".join(blocks("bash", text)) for text in texts).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words and not re.match(r"\w+=", words[0])]


def files_in_tree() -> Iterator[tuple[str, str]]:
    """Path and description of every line of the tree; a folder ends with a slash."""
    tree = next(block for block in blocks("") if block.startswith("training/ "))
    parents: list[str] = []
    for line in tree.splitlines():
        match = re.fullmatch(r"((?:  )*)(\S+) {2,}(\S.*)", line)
        assert match, f"not a line of the tree: {line!r}"
        depth = len(match[1]) // 2
        parents = [*parents[:depth], match[2]]
        yield "".join(parents), match[3]


@pytest.fixture
def example_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of README's example files, as the current one."""
    for name, text in named_files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def test_the_tree_names_every_file_and_no_other():
    listed = [path for path, _ in files_in_tree() if not path.startswith("tests/")]
    found = [
        str(path.relative_to(ROOT))
        for folder in ("training", "step1_sft", "step2_reward", "step3_ppo", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "__init__.py"
    ]
    folders = {f"{parent}/" for file in found for parent in Path(file).parents if str(parent) != "."}
    assert sorted(listed) == sorted({*found, *folders})


def check_command(words: list[str]) -> None:
    """Refuses a command that names no module or script of this project, or options that it does not have."""
    if words[0] == "bash":
        script = ROOT / words[1]
        assert script.is_file(), words[1]
        if script.parent.name == "launch":
            start = next(index for index, word in enumerate(words) if word.endswith(".train"))
            check_module(words[start], words[start + 1 :])
    elif words[0] == "deepspeed":
        launch = parse_launcher_arguments(words[1:])
        assert launch.module
        check_module(launch.user_script, launch.user_args)
    else:
        assert words[:2] == ["python", "-m"], f"a command of another kind: {shlex.join(words)}"
        check_module(words[2], words[3:])


def check_module(module: str, arguments: list[str]) -> None:
    assert importlib.util.find_spec(module), module
    if module in CONFIGS:
        load_config(CONFIGS[module], arguments)
    elif module == "scripts.run_all":
        load_recipe(arguments)
    elif module == "scripts.classic_control":
        tyro.cli(ControlConfig, args=arguments, use_underscores=True)
    else:
        check_argparse(module, arguments)


class Parsed(Exception):
    """The arguments were accepted."""


def check_argparse(module: str, arguments: list[str]) -> None:
    def parse(parser: argparse.ArgumentParser) -> None:
        parser.parse_known_args(arguments)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        is_package = hasattr(importlib.import_module(module), "__path__")
        importlib.import_module(f"{module}.__main__" if is_package else module).main()


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:3]))
def test_a_command_names_what_exists_and_its_options_parse(words, example_files):
    check_command(words)


@pytest.mark.parametrize(
    "command",
    [
        "bash scripts/nowhere.sh",
        "bash scripts/launch/one_gpu.sh step1_sft.train --config sft.yaml --no.such.option 1",
        "python -m step1_sft.nowhere",
        "python -m scripts.run_all --config my_run.yaml --step1_sft.optim.rate 1",
        "deepspeed --num_gpus 8 --module step3_ppo.train --config nowhere.yaml",
        "pip install something",
    ],
)
def test_a_command_that_is_wrong_is_found(command, example_files):
    with pytest.raises((AssertionError, SystemExit, ValueError, ModuleNotFoundError)):
        check_command(shlex.split(command))


def test_columns_read_as_the_text_says(example_files):
    (flags,) = re.findall(r"`(--data\.columns [^`]+)`", README)
    (mapping,) = re.findall(r"`columns: ({[^`]+})`", README)
    (example_files / "columns.yaml").write_text(f"data: {{columns: {mapping}}}\n")
    rest = ["--config", "sft.yaml"]
    expected = {"prompt": "question", "response": "answer"}
    assert load_config(SftConfig, [*rest, *shlex.split(flags)]).data.columns == expected
    assert load_config(SftConfig, [*rest, "columns.yaml"]).data.columns == expected


def test_the_table_of_formats_has_an_example_of_each():
    rows = re.findall(r"^\| `(\w+)` \| (steps? [^|]+) \| `({.*})` \|$", README, flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == list(FORMATS)
    steps = {"demonstration": {"step 1", "steps 1 and 3"}, "preference": {"step 2"}, "prompt": {"step 3"}}
    for name, step, line in rows:
        assert step in steps[FORMATS[name].kind], name
        record = json.loads(line)
        FORMATS[name].parse(record, "README.md")
        for column in FORMATS[name].columns:
            with pytest.raises(ValueError, match=f"no column '{column}'"):
                FORMATS[name].parse({key: value for key, value in record.items() if key != column}, "README.md")


def test_the_score_function_scores(example_files, monkeypatch):
    monkeypatch.syspath_prepend(str(example_files))
    (name,) = {word for words in commands() for word in words if word.startswith("my_scores:")}
    module, function = name.split(":")
    record = json.loads((example_files / "questions.jsonl").read_text())
    responses = ["17 + 25 = 42", "It is 41.", "I do not know."]
    score = getattr(importlib.import_module(module), function)
    assert score([record["prompt"]] * 3, responses, [record] * 3) == [1.0, 0.0, 0.0]
    sys.modules.pop(module)


def test_the_glossary_has_every_metric_that_a_run_logs_and_no_other(tmp_path):
    """Runs the three stages on a tiny model with everything on that adds a metric."""
    data = write_tiny_data(tmp_path)
    configs = tiny_configs(tmp_path / "run", save_tiny_model(tmp_path / "model"), data)
    for stage in ("step1_sft", "step2_reward"):
        configs[stage]["max_steps"] = 2
    configs["step1_sft"]["run"]["eval_every"] = 1
    configs["step3_ppo"] |= {
        "iterations": 1,
        "entropy_coefficient": 0.01,
        "kl": {"loss_coefficient": 0.01},
        "ptx": {"coefficient": 0.1, "paths": [data["demonstrations"]]},
    }
    run_well(alone("tests.run_stages", *write_configs(configs)))
    lines = [line for path in (tmp_path / "run").glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
    logged = {name for line in lines for name in json.loads(line)} - {"step", "seconds", "tokens"}
    explained = set(re.findall(r"`((?:train|eval|rollout|ppo|[a-z_]+)/\w+)`(?=[^|]* \|)", glossary_names()))
    phases = ("generate", "score", "train", "optimizer", "sync", "evaluate", "other")
    of_phases = {f"{name.removesuffix('PHASE')}{phase}" for name in explained if "PHASE" in name for phase in phases}
    explained = {name for name in explained if "PHASE" not in name}
    assert not explained & of_phases
    assert logged <= explained | of_phases
    # Figures of all phases, and of devices that are not here.
    assert {name for name in explained - logged if not name.startswith("mfu/")} == set()
    assert {name.partition("/")[0] for name in of_phases} - {"mfu"} <= {name.partition("/")[0] for name in logged}


def glossary_names() -> str:
    """The first cell of every row of the glossary."""
    section = README.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    return "\n".join(f"{row.split('|')[1]} |" for row in section.splitlines() if row.startswith("| `"))
