import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.config import (
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    check_batch_sizes,
    check_micro_batch_tokens,
    check_range,
)
from training.config_files import load_config, save_config


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage for these tests."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))
    engine: EngineConfig = field(default_factory=EngineConfig)
    train_batch_size: int = 8
    """Sequences of one step."""

    def __post_init__(self) -> None:
        check_range(self, "train_batch_size", low=1)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Two stages for these tests."""

    first: StageConfig
    second: StageConfig


@dataclass(frozen=True, kw_only=True)
class TypesConfig:
    """One field of every kind."""

    text: str = ""
    number: float = 0.0
    count: int = 0
    switch: bool = False
    maybe: str | None = None
    maybe_count: int | None = None
    maybe_switch: bool | None = None
    choice: Literal["a", "b"] = "a"
    stage: Literal[0, 1, 2] = 0
    pair: tuple[float, float] = (0.0, 0.0)
    names: tuple[str, ...] = ()
    counts: list[int] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    lora: LoraConfig = field(default_factory=LoraConfig)


REQUIRED = ["--model.path", "gpt2", "--data.paths", "a.jsonl", "--data.format", "text", "--run.output_dir", "out"]
Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Loads a config that must be refused; returns what was printed."""

    def load(cls: Any, argv: list[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            load_config(cls, argv)
        printed = capsys.readouterr()
        assert stop.value.code == 2
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert "Traceback" not in printed.err
        return printed.err

    return load


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_text(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_text


def test_flags_reach_nested_groups() -> None:
    config = load_config(StageConfig, [*REQUIRED, "--optim.lr", "1e-5", "--model.lora.rank", "4"])
    assert (config.optim.lr, config.model.lora.rank, config.data.paths) == (1e-5, 4, ("a.jsonl",))


def test_exponent_without_a_dot_in_yaml_is_a_number(write: Callable[..., str]) -> None:
    config = load_config(StageConfig, [*REQUIRED, "--config", write("optim: {lr: 1e-5}")])
    assert config.optim.lr == 1e-5


def test_command_line_wins_over_files_and_later_files_over_earlier_ones(write: Callable[..., str]) -> None:
    first = write("train_batch_size: 1\noptim: {lr: 1}\nrun: {seed: 1}\ndata: {columns: {prompt: p}}", "first.yaml")
    second = write("train_batch_size: 2\noptim: {lr: 2}\ndata: {columns: {response: r}}", "second.yaml")
    argv = ["--train_batch_size=3", "--config", first, f"--config={second}", *REQUIRED]
    config = load_config(StageConfig, argv, defaults={"run.seed": 9, "run.log_every": 7, "optim.lr": 9})
    assert (config.train_batch_size, config.optim.lr, config.run.seed, config.run.log_every) == (3, 2.0, 1, 7)
    assert config.data.columns == {"response": "r"}


def test_last_of_two_equal_flags_wins() -> None:
    assert load_config(TypesConfig, ["--names", "a", "b", "--names", "c", "--count=1", "--count=2"]) == TypesConfig(
        names=("c",), count=2
    )


def test_defaults_of_the_caller_take_python_values() -> None:
    values = {"names": ("a", "b"), "switch": True, "maybe": None, "columns": {"x": "y"}, "lora.rank": 3, "counts": []}
    expected = TypesConfig(names=("a", "b"), switch=True, columns={"x": "y"}, lora=LoraConfig(rank=3))
    assert load_config(TypesConfig, [], defaults=values) == expected


def test_defaults_satisfy_required_options_of_nested_groups(refusal: Refusal) -> None:
    argv = [flag.replace("--", f"--{stage}.") for stage in ("first", "second") for flag in REQUIRED]
    assert "missing: second.model.path (text);" in refusal(
        RecipeConfig, [flag for flag in argv if not flag.startswith("--second.model")][:-7] + argv[-6:]
    )
    at = argv.index("--second.model.path")
    config = load_config(RecipeConfig, argv[:at] + argv[at + 2 :], defaults={"second.model.path": "first/final"})
    assert config.second.model.path == "first/final"


def test_launchers_local_rank_is_dropped() -> None:
    expected = load_config(StageConfig, REQUIRED)
    for extra in (["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]):
        assert load_config(StageConfig, [*extra, *REQUIRED]) == expected


def test_every_type_round_trips(tmp_path: Path) -> None:
    full = TypesConfig(
        text="- a: 'b' \"c\" #d\n=e\té\x85",
        number=1e-7,
        count=-3,
        switch=True,
        maybe="null",
        maybe_count=0,
        maybe_switch=False,
        choice="b",
        stage=2,
        pair=(-1e-5, float("inf")),
        names=("-dash first", "", "true", "1e-5", "a b", "2024-01-01"),
        counts=[-1, 2],
        columns={"prompt": "no", "a=b": "", "12:30": "x"},
        lora=LoraConfig(rank=2, target_modules=("q", "v"), merge_on_save=True),
    )
    configs = [TypesConfig(), full]
    for config in configs:
        save_config(config, tmp_path / "new folder" / "config.yaml")
        assert load_config(TypesConfig, ["--config", str(tmp_path / "new folder" / "config.yaml")]) == config


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PARTS = TEXTS.filter(lambda text: not text.startswith("-"))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=TEXTS,
    number=st.floats(allow_nan=False),
    count=st.integers(),
    maybe=st.none() | TEXTS.filter(lambda text: text != "None"),
    pair=st.tuples(st.floats(allow_nan=False), st.floats(min_value=-1e300, max_value=1e300)),
    names=st.lists(PARTS, max_size=4).map(tuple),
    columns=st.dictionaries(PARTS, PARTS, max_size=3),
)
def test_any_value_round_trips(tmp_path: Path, **values: Any) -> None:
    config = TypesConfig(**values)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TypesConfig, ["--config", str(tmp_path / "config.yaml")]) == config


def test_yaml_may_use_dotted_names_and_empty_groups(write: Callable[..., str]) -> None:
    path = write("optim.lr: 3\nengine:\n  # zero_stage: 3\nmodel.lora:\n  rank: 2\n")
    config = load_config(StageConfig, [*REQUIRED, "--config", path])
    assert (config.optim.lr, config.model.lora.rank, config.engine) == (3.0, 2, EngineConfig())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.pth", "x"], "there is no option model.pth: did you mean model.path?"),
        (["--lr", "x"], "there is no option lr: did you mean optim.lr?"),
        (["--qqqqqqqqqqqq", "x"], "there is no option qqqqqqqqqqqq\n"),
        (["--model", "x"], "model is a group of options: set its parts, such as model.path"),
        (["--optim.lr", "fast"], "optim.lr is 'fast' (the command line): it needs a number"),
        (["--optim.lr", "1", "2"], "optim.lr is '1 2' (the command line): it needs one value, a number"),
        (["--optim.lr"], "optim.lr has no value (the command line): it needs a number"),
        (["--optim.betas", "1"], "optim.betas is '1' (the command line): it needs 2 values (a number, a number)"),
        (["--data.columns", "a"], "data.columns is 'a' (the command line): it needs pairs"),
        (["--train_batch_size", "1.5"], "train_batch_size is '1.5' (the command line): it needs a whole number"),
        (["--engine.zero_stage", "4"], "engine.zero_stage is '4' (the command line): it needs one of 0, 1, 2, 3"),
        (["--data.truncate_prompts"], "data.truncate_prompts has no value (the command line): it needs True or False"),
        (["--data.max_examples", "x"], "data.max_examples is 'x' (the command line): it needs a whole number or None"),
        (["--data.paths", "a", "-x"], "data.paths has the part '-x' (the command line)"),
        (["--config"], "--config has no value"),
    ],
)
def test_wrong_flags_are_refused(argv: list[str], message: str, refusal: Refusal) -> None:
    """O6"""
    assert message in refusal(StageConfig, [*REQUIRED, *argv])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  pth: x", "a.yaml:2: there is no option model.pth: did you mean model.path?"),
        ("modle:\n  path: x", "a.yaml:1: there is no option modle"),
        ("model: gpt2", "a.yaml:1: model needs `name: value` lines, not a single value"),
        ("optim:\n  lr: fast", "optim.lr is 'fast' (PATH:2): it needs a number"),
        ("optim:\n  lr: [1]", "a.yaml:2: optim.lr is a list: it needs a number"),
        ("train_batch_size: 8.0", "train_batch_size is '8.0' (PATH:1): it needs a whole number"),
        ("train_batch_size: true", "train_batch_size is 'true' (PATH:1): it needs a whole number"),
        ("train_batch_size:", "a.yaml:1: train_batch_size is empty: it needs a whole number"),
        ("model: {path: null}", "a.yaml:1: model.path is empty: it needs text"),
        ("data: {paths: a.jsonl}", "a.yaml:1: data.paths needs a list, as in [a, b]"),
        ("data: {paths: [a, [b]]}", "a.yaml:1: a part of data.paths is a list"),
        ("data: {columns: [a, b]}", "a.yaml:1: data.columns needs `name: value` lines, or {} for none"),
        ("data: {truncate_prompts: 1}", "data.truncate_prompts is '1' (PATH:1): it needs True or False"),
        ("optim: {lr: 1}\noptim.lr: 2", "a.yaml:2: optim.lr is given twice, first in PATH:1"),
        ("- a", "a.yaml:1: the file needs `name: value` lines"),
        ("a: [", "a.yaml:1: this is not YAML: "),
        ("? [a]\n: b", "a.yaml:1: the name of an option needs to be text"),
        ("model: {path: !!python/object/apply:os.getcwd []}", "a.yaml:1: model.path is a list"),
        ("model: {path: !!python/name:os.getcwd x}", "a.yaml:1: model.path has the tag tag:yaml.org,2002:python/name"),
        ("config: b.yaml", "a.yaml:1: there is no option config"),
    ],
)
def test_wrong_files_are_refused(text: str, message: str, write: Callable[..., str], refusal: Refusal) -> None:
    """O6"""
    path = write(text)
    printed = refusal(StageConfig, [*REQUIRED, "--config", path])
    assert message.replace("PATH", path) in printed
    assert path in printed


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    assert "nowhere.yaml cannot be read: No such file" in refusal(StageConfig, ["--config", "nowhere.yaml"])
    assert "cannot be read: Is a directory" in refusal(StageConfig, ["--config", str(tmp_path)])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not a text file in UTF-8" in refusal(StageConfig, ["--config", str(tmp_path / "binary.yaml")])


def test_file_with_byte_order_mark_and_crlf_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbftrain_batch_size: 5\r\nrun:\r\n  seed: 7\r\n")
    config = load_config(StageConfig, [*REQUIRED, "--config", str(tmp_path / "a.yaml")])
    assert (config.train_batch_size, config.run.seed) == (5, 7)


def test_missing_options_are_named(refusal: Refusal) -> None:
    printed = refusal(RecipeConfig, ["--first.model.path", "gpt2"])
    assert "missing: first.data.paths" in printed
    assert "second.model.path (text)" in printed
    assert "first.model.path" not in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.lora.dropout", "1"], "model.lora.dropout is 1.0: it needs a number from 0 to below 1"),
        (["--model.lora.merge_on_save", "True"], "model.lora.rank is 0, but target_modules or merge_on_save is given"),
        (["--model.path", ""], "model.path is empty"),
        (["--data.paths"], "data.paths is empty"),
        (["--data.max_examples", "0"], "data.max_examples is 0: it needs at least 1"),
        (["--optim.lr", "nan"], "optim.lr is nan: it needs a number above 0"),
        (["--optim.betas", "0.9", "1"], "optim.betas is (0.9, 1.0): it needs two numbers from 0 to below 1"),
        (["--optim.warmup_fraction", "2"], "optim.warmup_fraction is 2.0: it needs a number from 0 to 1"),
        (["--engine.offload_parameters", "True"], "engine.offload_parameters is True, but zero_stage is 2: set"),
        (["--engine.deepspeed_config", "/none.json"], "engine.deepspeed_config is /none.json, not a file"),
        (["--run.timeout_minutes", "0"], "run.timeout_minutes is 0.0: it needs a number above 0"),
        (["--train_batch_size", "0"], "error: train_batch_size is 0: it needs at least 1"),
    ],
)
def test_impossible_values_are_refused_by_their_dotted_names(argv: list[str], message: str, refusal: Refusal) -> None:
    """O6: also values that would have no effect."""
    printed = refusal(StageConfig, [*REQUIRED, *argv])
    assert message in printed
    assert len(printed.splitlines()) == 2


def test_checks_of_a_group_in_a_group_name_the_whole_path(refusal: Refusal) -> None:
    argv = [flag.replace("--", f"--{stage}.") for stage in ("first", "second") for flag in REQUIRED]
    assert "error: second.train_batch_size is 0" in refusal(RecipeConfig, [*argv, "--second.train_batch_size=0"])
    assert "error: first.model.lora.rank is -1" in refusal(RecipeConfig, [*argv, "--first.model.lora.rank=-1"])


def test_a_narrow_terminal_does_not_break_messages(monkeypatch: pytest.MonkeyPatch, refusal: Refusal) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/" + "long/" * 50 + "x.json"
    assert f"{path}, not a file" in refusal(StageConfig, [*REQUIRED, "--engine.deepspeed_config", path])


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_messages_are_the_same_in_every_encoding(encoding: str) -> None:
    code = (
        "import sys\nfrom training.config import RunConfig\nfrom training.config_files import load_config\n"
        "load_config(RunConfig, ['--output_dir', 'o', *sys.argv[1:]])"
    )
    for argv, message in {
        "--log_every=0": "error: log_every is 0: it needs at least 1",
        "--log_every=x": "error: log_every is 'x' (the command line): it needs a whole number",
    }.items():
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        run = subprocess.run([sys.executable, "-c", code, argv], capture_output=True, text=True, env=environment)
        assert (run.returncode, run.stdout) == (2, "")
        assert run.stderr == f"{message}\n(--help lists every option)\n"


def test_only_one_process_of_a_machine_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        load_config(StageConfig, ["--nonsense", "1"])
    assert capsys.readouterr().err == ""


def test_help_shows_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(StageConfig, ["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    for part in ("--model.lora.rank INT", "Sequences of one step.", "Highest learning rate.", "--config FILE"):
        assert part in printed


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        load_config(TypesConfig, []).count = 3  # type: ignore[misc]


@pytest.mark.parametrize(("total", "micro", "ranks", "nearest"), [(30, 4, 2, 32), (33, 4, 2, 32), (2, 4, 2, 8)])
def test_batch_sizes_that_do_not_divide_are_refused(total: int, micro: int, ranks: int, nearest: int) -> None:
    message = (
        rf"train_batch_size is {total}, not a multiple of micro_batch_size x GPUs \({micro * ranks}\): try {nearest}"
    )
    with pytest.raises(ValueError, match=message):
        check_batch_sizes(total, micro, ranks)
    check_batch_sizes(nearest, micro, ranks)


def test_a_budget_of_tokens_divides_by_gpus_alone_and_holds_the_longest_example() -> None:
    check_batch_sizes(6, 4, 2, micro_batch_tokens=100)
    with pytest.raises(ValueError, match=r"train_batch_size is 7, not a multiple of GPUs \(2\): try 8"):
        check_batch_sizes(7, 4, 2, micro_batch_tokens=100)
    check_micro_batch_tokens(None, 10**9)
    check_micro_batch_tokens(1024, 1024)
    with pytest.raises(ValueError, match=r"is 1023, less than the longest example may have \(1024\)"):
        check_micro_batch_tokens(1023, 1024)


def test_importing_the_options_is_quick_and_loads_no_torch() -> None:
    heavy = ("torch", "deepspeed", "transformers")
    code = f"import sys, training.config_files; print([m for m in {heavy} if m in sys.modules])"
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert time.monotonic() - start < 5


def test_fp16_needs_a_zero_stage_that_scales_the_loss() -> None:
    EngineConfig(precision="fp16", zero_stage=1)
    with pytest.raises(ValueError, match=r"precision is fp16, but zero_stage is 0.*set zero_stage to 1, 2 or 3"):
        EngineConfig(precision="fp16", zero_stage=0)
