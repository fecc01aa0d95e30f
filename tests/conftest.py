"""Settings of every test: few threads, no downloads, and the CPU as DeepSpeed's device where there is no GPU."""

import os
from collections.abc import Callable, Iterator

# Before torch is imported, which reads them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


# They take a minute or more, so they come first: one that comes last would keep one of two processes waiting.
LONG_FILES = ("test_torture.py", "test_pipeline.py", "test_engine_state.py", "test_learning.py", "test_supervision.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A process group of this process alone, for the tests of one file."""
    from training import distributed

    distributed.start(timeout_minutes=1)
    yield
    distributed.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny causal LM of an architecture, written once. Not to be changed."""
    from tests.tiny_models import save_tiny_model

    folders: dict[str, str] = {}

    def folder(architecture: str = "llama") -> str:
        if architecture not in folders:
            folders[architecture] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
        return folders[architecture]

    return folder


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny reward model of an architecture, written once. Not to be changed."""
    from tests.tiny_models import save_tiny_reward_model

    folders: dict[str, str] = {}

    def folder(architecture: str = "llama") -> str:
        if architecture not in folders:
            folders[architecture] = save_tiny_reward_model(tmp_path_factory.mktemp(architecture), architecture)
        return folders[architecture]

    return folder
