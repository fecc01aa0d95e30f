"""The shell scripts: what they say, and that the set-up is done once. No package is installed here."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted(ROOT.glob("scripts/**/*.sh")), ROOT / ".ci" / "run"]

# Stands in for Python: notes its arguments, answers the questions of the set-up, and "makes" environments with itself.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>"{log}"
case "$*" in
    *"print("*version_info*) echo "{version}" ;;
    *"import ensurepip"*) exit {venv_code} ;;
    "-m venv"*) mkdir -p "${{!#}}/bin" && cp "$0" "${{!#}}/bin/python" ;;
    *"-m pip install"*) echo "{pip_says}"; exit {pip_code} ;;
esac
"""


def bash(script: Path | str, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


class Setup:
    """A copy of the set-up in a folder of its own, with a Python that installs nothing."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project"  # the space is on purpose
        self.log = folder / "python.log"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("scripts/setup.sh", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)

    def run(self, version="3.11", venv_code=0, pip_code=0, pip_says="") -> subprocess.CompletedProcess:
        python = self.log.with_name("python")
        python.write_text(
            FAKE_PYTHON.format(log=self.log, version=version, venv_code=venv_code, pip_code=pip_code, pip_says=pip_says)
        )
        python.chmod(0o755)
        return bash(self.root / "scripts" / "setup.sh", cwd=self.log.parent, PYTHON=str(python))

    def installations(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "pip install" in line]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_parses(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_stops_at_the_first_error(script):
    sourced = "Sourced by" in script.read_text()
    assert sourced or "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("name", ["one_gpu", "one_node", "many_nodes"])
def test_launchers_explain_themselves(name, tmp_path):
    script = ROOT / "scripts" / "launch" / f"{name}.sh"
    result = bash(script, cwd=tmp_path)
    assert result.returncode == 2
    assert f"bash scripts/launch/{name}.sh" in result.stderr
    assert bash(script, "--help").returncode == 2


def test_many_nodes_needs_a_hostfile():
    result = bash("scripts/launch/many_nodes.sh", "nowhere", "step1_sft.train")
    assert result.returncode == 2
    assert "there is no hostfile nowhere" in result.stderr


def test_one_node_starts_the_launcher(tmp_path):
    """A stand-in for Python shows the command: what a launcher script starts, and from where."""
    for name in ("scripts/environment.sh", "scripts/launch/one_gpu.sh", "scripts/launch/one_node.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\n[[ "$1" == -c ]] && echo 12345 || echo "$@ in $PWD with $PYTHONPATH"\n')
    python.chmod(0o755)
    (tmp_path / "elsewhere").mkdir()
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    result = bash(
        tmp_path / "scripts" / "launch" / "one_gpu.sh",
        "step1_sft.train",
        "--config",
        "a b.yaml",
        cwd=tmp_path / "elsewhere",
        **variables,
    )
    assert result.stdout == (
        "-m deepspeed.launcher.runner -q --num_gpus 1 --no_local_rank --master_port 12345 --module step1_sft.train "
        f"--config a b.yaml in {tmp_path}/elsewhere with {tmp_path}\n"
    )


def test_continuous_integration_runs_test_sh():
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    commands = (ROOT / "scripts" / "test.sh").read_text()
    for tool in ("ruff check", "ruff format", "mypy", "setup.sh"):
        assert tool in commands
    assert re.search(r'-m pytest [^\n]*"\$@"$', commands, re.MULTILINE)


def test_quickstart_explains_itself_and_refuses_a_seed_that_is_no_number():
    assert "bash scripts/quickstart.sh --seed 2" in bash("scripts/quickstart.sh", "--help").stdout
    result = bash("scripts/quickstart.sh", "--seed", "one")
    assert result.returncode == 2
    assert "--seed is one, not a whole number" in result.stderr


def test_setup_installs_once(setup):
    first = setup.run()
    assert first.returncode == 0, first.stderr
    assert "done in" in first.stdout
    torch, rest = setup.installations()
    assert re.search(r"-c .*constraints.txt torch==[\d.]+ setuptools wheel$", torch)
    assert "--no-deps" in rest and rest.endswith("constraints.txt")
    second = setup.run()
    assert (second.returncode, second.stdout) == (0, "")
    assert len(setup.installations()) == 2


def test_setup_installs_again_when_a_pin_changes_or_the_folder_moves(setup):
    setup.run()
    with open(setup.root / "constraints.txt", "a") as file:
        file.write("another==1.0\n")
    assert "done in" in setup.run().stdout
    setup.root = setup.root.rename(setup.root.with_name("moved"))
    assert "done in" in setup.run().stdout
    assert setup.run().stdout == ""


def test_setup_that_failed_says_why_and_is_not_taken_for_done(setup):
    failed = setup.run(pip_code=1, pip_says="error: command 'gcc' failed: No such file or directory")
    assert failed.returncode == 1
    assert "a C compiler is missing" in failed.stderr and "setup.log" in failed.stderr
    # The stand-in was copied into the environment with its answers.
    shutil.rmtree(setup.root / ".venv")
    assert "compiler" not in setup.run(pip_code=1, pip_says="no route to host").stderr
    shutil.rmtree(setup.root / ".venv")
    assert setup.run().returncode == 0


@pytest.mark.parametrize(
    ("answers", "message"),
    [({"version": "3.9"}, "is Python 3.9"), ({"venv_code": 1}, "apt-get install python3.11-venv")],
)
def test_setup_says_what_is_wrong_with_a_python(setup, answers, message):
    result = setup.run(**answers)
    assert result.returncode == 1
    assert "Python 3.11 or 3.12 is needed" in result.stderr and message in result.stderr
    assert not (setup.root / ".venv").exists()


def test_every_dependency_is_pinned_to_a_version_that_it_allows():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    installed = [extra for extra in optional if extra != "wandb"]
    for text in project["dependencies"] + [text for extra in installed for text in optional[extra]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
