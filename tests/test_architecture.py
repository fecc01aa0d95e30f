"""The layers of the project as code: who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("step1_sft", "step2_reward", "step3_ppo")
PACKAGES = ("training", *STAGES, "scripts")

# Modules of `training`, from the bottom up. A module imports from lower layers, and from its own where it must.
LAYERS = (
    {"masking"},
    {
        "config",
        "config_files",
        "cpu_memory",
        "distributed",
        "formats",
        "records",
        "logprobs",
        "advantages",
        "losses",
        "packing",
        "attention",
        "compiling",
        "rewards",
        "costs",
        "durable",
        "manifest",
        "signals",
        "spikes",
        "storage",
        "supervision",
        "untrusted",
    },
    {"accounting", "tokenization", "examples", "data", "head", "models", "optim", "metrics", "forward"},
    {"engine", "engine_state", "loop", "checkpoint", "export", "run", "generation"},
)
# These are used where nothing but torch is installed.
MATH = ("masking", "logprobs", "advantages", "losses", "rewards")


def python_files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files(*PACKAGES)}


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Dotted names of all modules that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in MODULES else base


def imports_of_module(module: str) -> set[str]:
    path = MODULES[module]
    return set(imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"))


def layer_of(module: str) -> int:
    """Height of training.X or training.X.Y; an error for a module that stands in no layer."""
    name = module.split(".")[1]
    for height, names in enumerate(LAYERS):
        if name in names:
            return height
    raise LookupError(f"{module} is in no layer: put {name!r} into LAYERS of {Path(__file__).name}")


def violations(module: str, imported: set[str]) -> list[str]:
    """What a module imports and may not."""
    package = module.partition(".")[0]
    # What each package may import of this project, beside the standard library and installed packages.
    allowed = {"training": {"training"}, "scripts": {*PACKAGES, "tests"}}.get(package, {"training", package})
    wrong = [name for name in imported if name.partition(".")[0] in {*PACKAGES, "tests"} - allowed]
    if package == "training" and module != "training":
        inside = [name for name in imported if name.startswith("training.")]
        wrong += [name for name in inside if layer_of(name) > layer_of(module)]
    return sorted(wrong)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("training.")])
def test_every_module_of_the_library_is_in_a_layer(module: str) -> None:
    layer_of(module)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_layer_may(module: str) -> None:
    assert not violations(module, imports_of_module(module))


def test_there_are_no_import_cycles() -> None:
    # A package's own submodules are not counted as imports of the package, whose __init__ is empty.
    graph = {module: (imports_of_module(module) & set(MODULES)) - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", [path for path in python_files(*PACKAGES, "tests") if path.name == "__init__.py"])
def test_init_files_are_empty(path: Path) -> None:
    assert not path.read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("name", MATH)
def test_math_imports_only_torch_the_standard_library_and_math(name: str) -> None:
    own = {f"training.{other}" for other in MATH}
    foreign = {
        imported
        for imported in imports_of_module(f"training.{name}")
        if imported not in own and imported.partition(".")[0] not in {"torch", *sys.stdlib_module_names}
    }
    assert not foreign


def test_math_imports_where_only_torch_is_installed() -> None:
    """Whatever is not torch, numpy or the standard library cannot be found once torch itself is loaded."""
    program = f"""
import sys
import numpy, torch

class OnlyTorch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {{"torch", "numpy", "training", *sys.stdlib_module_names}}:
            raise ModuleNotFoundError(f"{{name}} is not installed here")

sys.meta_path.insert(0, OnlyTorch)
for installed in ("deepspeed", "transformers"):
    try:
        __import__(installed)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{installed}} was not blocked")
import training.losses, training.advantages
import {", ".join(f"training.{name}" for name in MATH)}
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("training.masking", "from training.losses import sft_loss", ["training.losses"]),
        ("training.losses", "from training import advantages", []),
        ("training.losses", "def f():\n    import step1_sft.train", ["step1_sft.train"]),
        ("training.losses", "from training.masking import masked_sum", []),
        ("training.losses", "import tests.test_losses", ["tests.test_losses"]),
        ("step1_sft.train", "import step2_reward.config, training.losses, torch", ["step2_reward.config"]),
        ("step1_sft.train", "from scripts import anything", ["scripts"]),
        ("step1_sft.train", "from .config import SftConfig", []),
        ("scripts.run", "import step1_sft.train, training.losses", []),
    ],
)
def test_the_rules_catch_what_they_forbid(module: str, source: str, wrong: list[str]) -> None:
    assert violations(module, set(imports_of(source, module))) == wrong


def test_the_rules_catch_a_module_in_no_layer() -> None:
    with pytest.raises(LookupError, match="in no layer"):
        layer_of("training.helpers")
