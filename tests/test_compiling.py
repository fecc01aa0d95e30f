"""Compiled layers learn what layers as they were written do."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler

from scripts.torture.runs import Run
from tests.in_process import start
from tests.tiny_models import save_tiny_model, write_tiny_data
from tests.tiny_runs import tiny_configs
from training import compiling
from training.config import EngineConfig, ModelConfig
from training.data import Batch
from training.engine import generation_mode
from training.forward import response_logprobs
from training.generation.interface import Endings, SamplingConfig
from training.generation.native import NativeGenerator
from training.models import load_causal_lm

pytestmark = pytest.mark.usefixtures("process_group")
# What one layer comes to, of which the attention runs as it is.
GRAPHS = 5


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled code of other tests, and a backend that needs no C++ compiler: all of it but the last stage."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")
    yield
    torch.compiler.reset()


@pytest.fixture
def model(tiny_model: Callable[[str], str]) -> Any:
    return load_causal_lm(ModelConfig(path=tiny_model("llama")), torch.float32).train()


def batch(*lengths: int) -> Batch:
    ids = torch.arange(len(lengths) * max(lengths)).remainder(50).reshape(len(lengths), -1) + 3
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Batch(ids, mask, mask & (torch.arange(max(lengths)) >= 2))


def gradients(model: Any, rows: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    response_logprobs(model, rows)[0].square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_ppo_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every number that is logged. What is traced is then run as it is, for this takes a tenth of the time."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    options = tiny_configs(tmp_path / "plain", save_tiny_model(tmp_path / "model"), write_tiny_data(tmp_path))
    plain = {stage: Run(stage, tmp_path / "plain", own | {"max_steps": 1}) for stage, own in options.items()}
    plain["step3_ppo"] = Run("step3_ppo", tmp_path / "plain", options["step3_ppo"])
    for run in plain.values():
        assert start(run)
    assert not counters["stats"]
    engine = options["step3_ppo"]["engine"] | {"compile_layers": True}
    compiled = Run("step3_ppo", tmp_path / "compiled", options["step3_ppo"] | {"engine": engine})
    assert start(compiled)
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled.numbers() == pytest.approx(plain["step3_ppo"].numbers(), rel=1e-4, abs=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_code_is_compiled_once_for_all_layers_and_batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the gradients of the layers as they were written."""
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    sizes = [(5, 9, 3), (12, 4), (7,), (6, 6, 6, 6), (30, 2)]
    expected = [gradients(model, batch(*lengths)) for lengths in sizes]
    compiling.compile_layers(model, splits_weights=False)
    for lengths, own in zip(sizes, expected, strict=True):
        for name, gradient in gradients(model, batch(*lengths)).items():
            torch.testing.assert_close(gradient, own[name], rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == GRAPHS


def test_a_budget_keeps_less_and_gives_the_same_gradients(model: Any) -> None:
    def kept_and_gradients(share: float) -> tuple[int, dict[str, Tensor]]:
        torch.compiler.reset()
        copied = copy.deepcopy(model)
        compiling.compile_layers(copied, splits_weights=False, activation_budget=share)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = gradients(copied, batch(20, 14, 9))
        return sum(kept.values()), found

    whole, expected = kept_and_gradients(1.0)
    less, found = kept_and_gradients(0.0)
    assert less < whole
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_rollouts_run_uncompiled_and_leave_the_compiled_layers_as_they_are(model: Any) -> None:
    compiling.compile_layers(model, splits_weights=False)
    own = [layer.forward for layer in model.model.layers]
    engine: Any = SimpleNamespace(module=model, optimizer=None)
    generator = NativeGenerator(lambda: generation_mode(engine), Endings.of([]), batch_size=2)
    generator.generate([[5, 6, 7], [8, 9]], SamplingConfig(max_new_tokens=4), [1, 2])
    assert generator.takes_the_hook and not counters["stats"]
    assert [layer.forward for layer in model.model.layers] == own


def test_a_missing_compiler_is_told_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr(compiling, "get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=r"compile_layers is True, but there is no C\+\+ compiler: install g\+\+"):
        compiling.compile_layers(model, splits_weights=False)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no decoder layers of transformers' kind: leave it out"):
        compiling.compile_layers(torch.nn.Linear(2, 2), splits_weights=False)


def test_a_budget_without_compiled_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation_budget is 0\.5, but compile_layers is False"):
        EngineConfig(activation_budget=0.5)
