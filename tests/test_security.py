"""What the project's code does not contain, what its configs cannot do, and what its runs do not give away."""

import ast
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from step1_sft.config import SftConfig
from tests.launching import ROOT, environment
from tests.test_architecture import PACKAGES, python_files
from tests.tiny_models import write_tiny_data
from tests.tiny_runs import tiny_configs, write_configs
from training.config_files import hide_passwords, load_config

# Configs

YAML_TAGS = (
    "!!python/object/apply:os.system ['touch CANARY']",
    "!!python/object/new:os.system ['touch CANARY']",
    "!!python/object:os.system {}",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!!python/bytes aGk=",
    "!!binary aGk=",
    "!own 3",
)


@pytest.mark.parametrize("tag", YAML_TAGS)
@pytest.mark.parametrize("place", ["model: {path: VALUE}", "model: VALUE", "VALUE", "run: {output_dir: [VALUE]}"])
def test_a_tag_of_a_config_creates_nothing(
    tag: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary, file = tmp_path / "canary", tmp_path / "config.yaml"
    file.write_text(place.replace("VALUE", tag.replace("CANARY", str(canary))))
    with pytest.raises(SystemExit) as end:
        load_config(SftConfig, ["--config", str(file)])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith(f"error: {file}:1: ") and message.count("\n") == 2
    assert not canary.exists()


# The project's own code

FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "tempfile.mktemp",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "pandas.read_pickle",
    "torch.hub.load",
}
PICKLING = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
UNSAFE_YAML = ("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader", "yaml.CFullLoader")
SERVERS = (
    "http.server",
    "socketserver",
    "xmlrpc.server",
    "wsgiref",
    "flask",
    "fastapi",
    "uvicorn",
    "aiohttp",
    "gradio",
)


def unsafe_code(source: str) -> list[str]:
    """Lines and names of what may run what it reads, or listens to a network."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    imported: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
            imported += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            imported += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id)
        return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"

    found = [(line, name) for line, name in imported if name.startswith(tuple(f"{server}." for server in SERVERS))]
    found += [(line, name) for line, name in imported if name in SERVERS]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and dotted(node) in UNSAFE_YAML:
            found.append((node.lineno, dotted(node)))
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        module, _, method = name.rpartition(".")
        if (
            name in FORBIDDEN_CALLS
            or (module.partition(".")[0] in PICKLING and method in ("load", "loads", "Unpickler", "open"))
            or (name == "torch.load" and given.get("weights_only") is not True)
            or given.get("shell") is True
            or given.get("trust_remote_code") is True
            or given.get("allow_pickle") is True
            or (method in ("extractall", "extract") and "filter" not in given)
            or method in ("listen", "start_server", "serve_forever")
        ):
            found.append((node.lineno, name))
    return [f"{line}: {name}" for line, name in sorted(set(found))]


@pytest.mark.parametrize("path", python_files(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_projects_code_runs_nothing_that_it_reads_and_serves_nothing(path: Path) -> None:
    """Without a single exception; what runs a user's own code does so by import, and is named in the config."""
    assert unsafe_code(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "from torch import load\nload('a')",
        "import torch as t\nt.load('a', weights_only=flag)",
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads as read\nread(b)",
        "from dill import load\nload(f)",
        "import joblib\njoblib.load('a')",
        "import marshal\nmarshal.loads(b)",
        "import shelve\nshelve.open('a')",
        "import pickle\npickle.Unpickler(f).load()",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "import yaml\nyaml.load(t, Loader=yaml.SafeLoader)",
        "import yaml\nyaml.full_load(t)",
        "from yaml import unsafe_load\nunsafe_load(t)",
        "import yaml\nyaml.compose(t, Loader=yaml.UnsafeLoader)",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('a')",
        "from os import system as run\nrun('a')",
        "import subprocess\nsubprocess.run('a', shell=True)",
        "AutoModel.from_pretrained('a', trust_remote_code=True)",
        "import tarfile\ntarfile.open('a').extractall('b')",
        "import tempfile\ntempfile.mktemp()",
        "from http.server import HTTPServer",
        "import socketserver",
        "import socket\nsocket.socket().listen()",
    ],
)
def test_the_rules_catch_what_they_forbid(source: str) -> None:
    assert unsafe_code(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('a', weights_only=True)",
        "import yaml\nyaml.safe_load(t)",
        "model.eval()",
        "import pickle\npickle.dumps(1)",
        "import tarfile\ntarfile.open('a').extractall('b', filter='data')",
        "json.load(f)",
    ],
)
def test_the_rules_pass_what_is_safe(source: str) -> None:
    assert unsafe_code(source) == []


# Secrets

SECRETS = {
    name: f"canary{number}5ecret"
    for number, name in enumerate(
        (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "WANDB_API_KEY",
            "OPENAI_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
        )
    )
}
TWO_RUNS = """
import sys
from step1_sft import train
from training import distributed

sys.argv = ["step1_sft.train", "--config", sys.argv[1]]
train.main()

def crash(*arguments):
    raise RuntimeError("a crash in the middle of a step")

train.sft_loss = crash
sys.argv += ["--run.output_dir", sys.argv[2].removesuffix(".yaml") + "_crash"]
distributed.run(train.main)
"""


def test_no_byte_of_a_run_or_of_a_crash_holds_a_secret(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "tmp").mkdir()
    config = tiny_configs(tmp_path / "run", tiny_model("llama"), write_tiny_data(tmp_path / "data"))["step1_sft"]
    _, file = write_configs({"step1_sft": config | {"max_steps": 2}})
    result = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, file],
        cwd=ROOT,
        env={**environment(), **SECRETS, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        timeout=120,
        umask=0o022,
    )
    assert result.returncode == 1 and b"a crash in the middle of a step" in result.stderr, result.stderr
    assert b"saved" in result.stdout and (tmp_path / "run" / "step1_sft" / "final" / "model.safetensors").exists()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = {str(path): path.read_bytes() for path in files} | {"stdout": result.stdout, "stderr": result.stderr}
    leaks = [
        (where, name) for where, text in written.items() for name, value in SECRETS.items() if value.encode() in text
    ]
    assert not leaks
    assert not [path for path in files if path.stat().st_mode & stat.S_IWOTH]
    assert not list((tmp_path / "tmp").iterdir())


ADDRESS = "https://somebody:canary5ecret@example.com/a.jsonl"


@pytest.mark.parametrize("name", ["model.path", "data.paths", "run.wandb_project", "run.output_dir", "data.columns"])
@pytest.mark.parametrize("given", ["on the command line", "in a file"])
def test_an_address_with_a_password_is_refused_without_showing_it(
    name: str, given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else config.yaml and environment.json would hold it."""
    value = {"data.columns": ["prompt", ADDRESS]}.get(name, [ADDRESS])
    arguments = [f"--{name}", *value]
    if given == "in a file":
        group, _, last = name.partition(".")
        option: Any = {"data.columns": {"prompt": ADDRESS}, "data.paths": [ADDRESS]}.get(name, ADDRESS)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({group: {last: option}}))
        arguments = ["--config", str(tmp_path / "config.yaml")]
    with pytest.raises(SystemExit) as end:
        load_config(SftConfig, arguments)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "canary5ecret" not in message and "somebody" not in message
    assert f"{name} is" in message and "https://***@example.com/a.jsonl" in message


@pytest.mark.parametrize("arguments", [[ADDRESS], [f"--{ADDRESS}", "a"], ["--run.seed", ADDRESS]])
def test_no_other_message_shows_the_password(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(SftConfig, arguments)
    assert "canary5ecret" not in capsys.readouterr().err


def test_only_what_stands_before_a_host_is_hidden() -> None:
    for text in ("owner/name@main", "runs/a@b", "https://example.com/a@b", "a://b c@d", "mail@example.com"):
        assert hide_passwords(text) == text
    assert hide_passwords("x s3://key:a:b@c@bucket/a, http://token@h") == "x s3://***@bucket/a, http://***@h"


# Packages


def test_without_a_network_the_audit_says_so_and_has_a_code_of_its_own(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / "audit.sh")],
        env={**os.environ, "https_proxy": nowhere, "HTTPS_PROXY": nowhere, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 3 and "cannot be reached" in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())
