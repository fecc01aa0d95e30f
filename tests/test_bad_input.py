"""Every mistake of a user ends a stage with code 2 and a sentence that says what to do, never with a traceback."""

import ast
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from step1_sft.config import SftConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PpoConfig
from tests.launching import alone, run, under_deepspeed
from tests.test_architecture import MODULES, imports_of_module
from tests.tiny_models import save_tiny_model, write_jsonl, write_tiny_data
from tests.tiny_runs import STAGES, tiny_configs
from tests.tiny_tokenizers import build_tokenizer
from training import distributed

Refuse = Callable[[str, Mapping[str, Any]], str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config_file(tmp_path: Path, model: str, data: dict[str, str]) -> Callable[[str, Mapping[str, Any]], str]:
    """The file of a stage that would run, changed in the options that are given by dotted names."""

    def write(stage: str, changes: Mapping[str, Any]) -> str:
        options = tiny_configs(tmp_path / "run", model, data)[stage]
        if stage == "step2_reward":
            options["model"]["path"] = model
        if stage == "step3_ppo":
            options |= {"actor": {"path": model}, "reward": {"function": "tests.test_bad_input:good_score"}}
        for name, value in changes.items():
            *groups, last = name.split(".")
            group = options
            for key in groups:
                group = group.setdefault(key, {})
            group[last] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(options, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def refuse(
    config_file: Callable[[str, Mapping[str, Any]], str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Refuse:
    """Runs a stage as its program does, here for speed; it must end with code 2. Returns its message."""

    def run_stage(stage: str, changes: Mapping[str, Any]) -> str:
        monkeypatch.setattr(sys, "argv", [stage, "--config", config_file(stage, changes)])
        main = importlib.import_module(f"{stage}.train").main
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            distributed.run(main)
        assert end.value.code == 2
        distributed.stop()
        message = capfd.readouterr().err
        assert len(re.findall("^error: ", message, re.MULTILINE)) == 1 and "Traceback" not in message
        return message

    return run_stage


def good_score(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    return [0.0 for _ in responses]


def short_score(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    return [0.0]


def nan_score(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    """nan on the rank that sees the first held-out prompts, and nowhere else."""
    return [math.nan if distributed.rank() == 1 else 0.0 for _ in responses]


def moving_score(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    """Somebody moves the run's folder while the held-out responses are scored."""
    folder = Path(os.environ["FOLDER_TO_MOVE"])
    if folder.exists():
        folder.rename(folder.with_name("elsewhere"))
    return [0.0 for _ in responses]


CONFIG_ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("step1_sft", {"optim.learning_rate": 1}, r"config.yaml:\d+: there is no option optim.learning_rate"),
    ("step1_sft", {"train_batch_size": "many"}, r"train_batch_size is 'many' \(.*yaml:\d+\): it needs a whole number"),
    (
        "step1_sft",
        {"train_batch_size": 7, "micro_batch_size": 4},
        r"train_batch_size is 7, not a multiple of micro_batch_size x GPUs \(4\): try 8",
    ),
    ("step1_sft", {"epochs": 0}, "epochs is 0.0: it needs a number above 0"),
    ("step1_sft", {"engine.zero_stage": 4}, "engine.zero_stage is '4' .*needs one of 0, 1, 2, 3"),
    (
        "step1_sft",
        {"engine.zero_stage": 2, "engine.offload_parameters": True},
        "offload_parameters is True, but zero_stage is 2: set zero_stage to 3",
    ),
    ("step1_sft", {"engine.deepspeed_config": "/nowhere.json"}, "deepspeed_config is /nowhere.json, not a file"),
    ("step1_sft", {"data.format": "chosen_rejected"}, "format is 'chosen_rejected', but this stage needs a demonstr"),
    ("step1_sft", {"data.eval_size": 0}, "eval_size is 0"),
    ("step2_reward", {"data.eval_size": 0}, "eval_size is 0"),
    ("step2_reward", {"model.lora": {"merge_on_save": True}}, "rank is 0, but .*merge_on_save"),
    ("step3_ppo", {"data.eval_size": 0}, "eval_size is 0"),
    ("step3_ppo", {"reward.path": "somewhere"}, "give either path.* or function"),
    ("step3_ppo", {"estimator": "grpo"}, "grpo compares responses to one prompt: set samples_per_prompt"),
    ("step3_ppo", {"max_importance_weight": 0.5}, "max_importance_weight is 0.5"),
    (
        "step3_ppo",
        {"max_importance_weight": 2, "old_logprobs": "rollout"},
        "set that to recompute, or leave the weight",
    ),
    ("step3_ppo", {"estimator": "best"}, "estimator is best: choose one of gae"),
    ("step3_ppo", {"train_batch_size": 6}, r"train_batch_size \(6\) does not divide"),
    ("step3_ppo", {"sampling.temperature": 0}, "temperature is 0: greedy responses"),
    ("step3_ppo", {"generator": "hf", "kv_cache_gib": 1}, "generator is hf: lower generation_batch_size"),
    ("step3_ppo", {"critic_warmup_iterations": 2}, "is 2 of 2 iterations, so the actor would never be trained"),
    ("step3_ppo", {"ptx.coefficient": 1.0}, "ptx.coefficient is above 0: give the demonstrations in paths"),
]


@pytest.mark.parametrize(("stage", "changes", "message"), CONFIG_ERRORS)
def test_a_wrong_option_is_refused_before_a_model_is_loaded(
    refuse: Refuse, stage: str, changes: dict[str, Any], message: str
) -> None:
    """O6: unknown, impossible, or without an effect beside the others."""
    started = time.monotonic()
    path = "actor.path" if stage == "step3_ppo" else "model.path"
    assert re.search(message, refuse(stage, {path: "/nowhere"} | changes))
    assert time.monotonic() - started < 1


def options_of(config: type, group: str = "") -> Iterator[str]:
    """The dotted names of all options of a config."""
    for name, kind in get_type_hints(config).items():
        if dataclasses.is_dataclass(kind):
            yield from options_of(kind, f"{group}{name}.")  # type: ignore[arg-type]
        else:
            yield group + name


def names_read_by(stage: str) -> set[str]:
    """Every x of an `a.x` in what a stage's program imports of this project, save where options are checked."""
    modules: set[str] = set()
    waiting = [f"{stage}.train"]
    while waiting:
        module = waiting.pop()
        if module in MODULES and module not in modules:
            modules.add(module)
            waiting += imports_of_module(module)
    defined = {module for module in modules if module.endswith(".config")}
    trees = {module: ast.parse(MODULES[module].read_text(encoding="utf-8")) for module in modules}
    read = {n.attr for m in modules - defined for n in ast.walk(trees[m]) if isinstance(n, ast.Attribute)}
    # What follows from options, as the steps of an iteration do, is a property beside them.
    properties = [n for m in defined for n in ast.walk(trees[m]) if isinstance(n, ast.FunctionDef) and n.name in read]
    return read | {n.attr for function in properties for n in ast.walk(function) if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        ("step1_sft", SftConfig),
        ("step2_reward", RewardConfig),
        ("step3_ppo", PpoConfig),
    ],
)
def test_every_option_of_a_stage_is_read_by_it(stage: str, config: type) -> None:
    """O6: an option that nothing reads does nothing."""
    read = names_read_by(stage)
    assert [option for option in options_of(config) if option.rpartition(".")[2] not in read] == []


def test_batch_sizes_count_the_ranks(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    unit = r"train_batch_size is 8, not a multiple of micro_batch_size x GPUs \(6\): try 6"
    assert re.search(unit, refuse("step1_sft", {}))
    by_tokens = refuse("step1_sft", {"micro_batch_tokens": 4096})
    assert "train_batch_size is 8, not a multiple of GPUs (3): try 9" in by_tokens


def test_a_raw_deepspeed_file_must_be_a_json_object(refuse: Refuse, tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    for text in ("{zero: 1}", "[1, 2]"):
        raw.write_text(text)
        changes = {"model.path": "/nowhere", "engine.deepspeed_config": str(raw)}
        assert re.search("deepspeed_config is .*raw.json, which is not a JSON object", refuse("step1_sft", changes))


# Data


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_file_is_named(refuse: Refuse, stage: str) -> None:
    assert "/nowhere.jsonl:1: there is no such file" in refuse(stage, {"data.paths": ["/nowhere.jsonl"]})


@pytest.mark.parametrize("stage", STAGES)
def test_a_line_that_is_not_json_is_named(refuse: Refuse, tmp_path: Path, data: dict[str, str], stage: str) -> None:
    file = {"step1_sft": "demonstrations", "step2_reward": "pairs", "step3_ppo": "prompts"}[stage]
    lines = Path(data[file]).read_text().splitlines()
    lines[2] = lines[2][:-4]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    assert f"{bad}:3: not JSON" in refuse(stage, {"data.paths": [str(bad)]})


def test_an_empty_file_and_a_missing_column_are_named(refuse: Refuse, tmp_path: Path) -> None:
    file = Path(write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "response": "b"}]))
    assert f"{file}:1: no column 'prompt'; found 'question', 'response'" in refuse(
        "step1_sft", {"data.paths": [str(file)]}
    )
    file.write_text("")
    assert f"{file}:1: the file is empty" in refuse("step1_sft", {"data.paths": [str(file)]})


def test_examples_that_are_all_unusable_are_refused_with_the_reason(refuse: Refuse, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "chosen": "same", "rejected": "same"} for number in range(20)]
    file = write_jsonl(tmp_path / "same.jsonl", rows)
    message = refuse("step2_reward", {"data.paths": [file]})
    assert "none of the 20 records is left to use: 20 x two responses are equal" in message
    message = refuse("step1_sft", {"data.eval_size": 48})
    assert "48 x held out: lower eval_size" in message
    message = refuse("step3_ppo", {"data.max_prompt_tokens": 1})
    assert "48 x the prompt has more than max_prompt_tokens" in message


# Models


@pytest.mark.parametrize(
    "path", ["/nowhere", "no-such-owner/no-such-model"], ids=["a folder", "a hub name without a network"]
)
def test_a_model_that_is_not_there_is_named(refuse: Refuse, path: str) -> None:
    assert f"{path} cannot be loaded: there is no such folder" in refuse("step1_sft", {"model.path": path})
    assert f"{path} cannot be loaded: " in refuse("step3_ppo", {"actor.path": path})


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_missing_and_left_over_weights_are_refused(refuse: Refuse, tmp_path: Path, model: str, zero_stage: int) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    moved = {name.replace("layers.1.mlp.up_proj", "layers.1.mlp.other"): value for name, value in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    message = refuse("step1_sft", {"model.path": str(folder), "engine.zero_stage": zero_stage})
    assert re.search("does not hold the weights of Llama.*missing .*up_proj.*unexpected .*other", message)


def test_broken_files_of_a_model_are_refused(refuse: Refuse, tmp_path: Path, model: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{folder} cannot be loaded: " in refuse("step1_sft", {"model.path": str(folder)})
    file.unlink()
    assert f"{folder} cannot be loaded: " in refuse("step1_sft", {"model.path": str(folder)})
    (folder / "config.json").write_text(json.dumps({"model_type": "no such architecture"}))
    assert f"{folder} cannot be loaded: " in refuse("step1_sft", {"model.path": str(folder)})


def test_a_language_model_is_no_reward_model(refuse: Refuse, model: str) -> None:
    message = refuse("step3_ppo", {"reward": {"path": model}})
    assert "holds a language model without a score head" in message and "step2_reward" in message


def test_tokenizers_that_differ_are_refused(refuse: Refuse, tmp_path: Path, model: str) -> None:
    other = build_tokenizer(eos="<eos>")
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "tokenizer")
    reward = {"path": model, "tokenizer": str(tmp_path / "tokenizer")}
    assert "set reward.retokenize True" in refuse("step3_ppo", {"reward": reward})


def test_a_chat_needs_a_chat_template(refuse: Refuse, tmp_path: Path, model: str) -> None:
    build_tokenizer(chat_template=None).save_pretrained(tmp_path / "tokenizer")
    changes = {"model.tokenizer": str(tmp_path / "tokenizer"), "data.template": "chat"}
    assert "the tokenizer has no chat template: use template plain" in refuse("step1_sft", changes)


# Score functions


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("tests.no_such_module:score", "cannot be imported"),
        ("tests.test_bad_input:no_such_function", "cannot be imported"),
        ("tests.test_bad_input:short_score", "returned 1 scores for 2 responses: return one for each"),
    ],
)
def test_a_wrong_score_function_is_refused(refuse: Refuse, function: str, message: str) -> None:
    # Two held-out prompts: that many responses are scored first.
    assert message in refuse("step3_ppo", {"reward.function": function, "data.eval_size": 2})


def test_a_run_whose_folder_is_moved_stops(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "step3_ppo"
    monkeypatch.setenv("FOLDER_TO_MOVE", str(folder))
    message = refuse("step3_ppo", {"reward.function": "tests.test_bad_input:moving_score", "data.eval_size": 2})
    assert f"error: {folder}/metrics.jsonl is gone, so the run stops: leave the folder" in message
    assert not folder.exists()  # nothing is written to a second folder of the same name


# As programs


@pytest.mark.parametrize("stage", STAGES)
def test_a_program_refuses_in_seconds(config_file: Callable[[str, Mapping[str, Any]], str], stage: str) -> None:
    path = "actor.path" if stage == "step3_ppo" else "model.path"
    config = config_file(stage, {path: "/nowhere", "run.log_every": 0})
    result = run(alone(f"{stage}.train", "--config", config), timeout_seconds=60)
    assert result.returncode == 2
    assert result.stderr == "error: run.log_every is 0: it needs at least 1\n(--help lists every option)\n"


def test_several_ranks_refuse_once(config_file: Callable[[str, Mapping[str, Any]], str]) -> None:
    config = config_file("step1_sft", {"data.paths": ["/nowhere.jsonl"]})
    result = run(under_deepspeed("step1_sft.train", "--config", config), timeout_seconds=90)
    assert result.returncode != 0
    assert result.stderr.count("there is no such file") == 1 and "Traceback" not in result.stderr, result.stderr


def test_what_one_rank_alone_meets_is_told(config_file: Callable[[str, Mapping[str, Any]], str]) -> None:
    config = config_file("step3_ppo", {"reward.function": "tests.test_bad_input:nan_score"})
    result = run(under_deepspeed("step3_ppo.train", "--config", config), timeout_seconds=90)
    assert result.returncode != 0
    assert result.stderr.count("error: tests.test_bad_input:nan_score returned nan for the prompt at ") == 1


def test_a_librarys_own_error_keeps_its_traceback() -> None:
    code = (
        "from training import distributed\n"
        "import statistics\n"
        "distributed.run(lambda: statistics.mean([]))"  # StatisticsError is a ValueError
    )
    result = run([sys.executable, "-c", code], timeout_seconds=60)
    assert result.returncode == 1 and "Traceback" in result.stderr
