"""What is saved: plain transformers and peft load it and compute the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.test_models import randomize_adapters
from tests.tiny_models import save_tiny_reward_model
from tests.tiny_tokenizers import NUM_SPECIAL, VOCAB_SIZE, build_tokenizer
from training.config import EngineConfig, LoraConfig, ModelConfig, OptimConfig
from training.engine import DTYPES, backward_and_step, loading_options, train_engine
from training.export import export
from training.models import SCORE_FILE, holds_adapter, load_causal_lm, load_scalar_model

pytestmark = pytest.mark.usefixtures("process_group")

FP32 = EngineConfig(zero_stage=2, precision="fp32")
TOKENIZER = build_tokenizer(eos="<eos>")
LORA = LoraConfig(rank=4, alpha=8)
IDS = torch.randint(NUM_SPECIAL, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))
ARCHITECTURES = ["llama", "qwen2", "gpt2", "gpt_neox", "opt"]  # llama, gpt2 and opt tie their embeddings


def start(model: Any, config: EngineConfig = FP32) -> Any:
    optim = OptimConfig(lr=0.01, warmup_fraction=0.0)
    return train_engine(model, config, optim, train_batch_size=2, total_steps=10)


def trained_causal_lm(source: ModelConfig, config: EngineConfig = FP32) -> Any:
    """An engine after one step, so that its weights are not those of its source."""
    model = load_causal_lm(source, DTYPES[config.precision], loading_options(config, config.zero_stage))
    if config.zero_stage < 3:
        randomize_adapters(model)
    engine = start(model, config)
    backward_and_step(engine, logits_of(engine).float().logsumexp(-1).mean())
    return engine


def trained_scalar_model(source: ModelConfig, head: str = "saved") -> Any:
    model = load_scalar_model(source, torch.float32, head=head)
    randomize_adapters(model)
    engine = start(model)
    backward_and_step(engine, scores_of(engine).square().mean() + scores_of(engine).mean())
    return engine


def logits_of(model: Any) -> Tensor:
    ids = IDS.to(next(model.parameters()).device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def scores_of(model: Any) -> Tensor:
    """Scores of rows without padding, by a `ScalarModel`."""
    ids = IDS.to(next(model.parameters()).device)
    return model(ids, torch.ones_like(ids))[:, -1]


def hf_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def hf_scores(folder: Path) -> Tensor:
    with torch.no_grad():
        return logits_of(AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32))[:, 0]


def same(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one.detach().cpu(), other.detach().cpu(), rtol=0, atol=atol)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_an_exported_model(
    tmp_path: Path, tiny_model: Callable[[str], str], architecture: str
) -> None:
    """O5"""
    source = ModelConfig(path=tiny_model(architecture))
    engine = trained_causal_lm(source)
    export(engine, tmp_path / "final", TOKENIZER, source)
    same(hf_logits(tmp_path / "final"), logits_of(engine))
    assert (hf_logits(tmp_path / "final") - hf_logits(Path(source.path))).abs().max() > 0.01
    vocabularies = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (tmp_path / "final", source.path)]
    assert vocabularies[0] == vocabularies[1]
    assert [path.name for path in (tmp_path / "final").glob("*.safetensors")] == ["model.safetensors"]
    again = load_causal_lm(ModelConfig(path=str(tmp_path / "final")), torch.float32)
    assert torch.equal(logits_of(again), hf_logits(tmp_path / "final"))


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_every_zero_stage_exports_the_weights_that_it_trains(
    tmp_path: Path, tiny_model: Callable[[str], str], zero_stage: Any
) -> None:
    """O5"""
    source = ModelConfig(path=tiny_model("llama"))
    engine = trained_causal_lm(source, EngineConfig(zero_stage=zero_stage, precision="fp32"))
    export(engine, tmp_path / "final", TOKENIZER, source)
    same(hf_logits(tmp_path / "final"), logits_of(engine))


def test_a_bf16_model_is_saved_in_bf16_to_the_bit(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    """O5"""
    source = ModelConfig(path=tiny_model("qwen2"))
    engine = trained_causal_lm(source, EngineConfig(zero_stage=2, precision="bf16"))
    export(engine, tmp_path / "final", TOKENIZER, source)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(saved.get_parameter(name), parameter.cpu()), name
        assert saved.get_parameter(name).dtype == torch.bfloat16


@pytest.mark.parametrize("head", ["saved", "normal", "zero"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_an_exported_reward_model(
    tmp_path: Path,
    tiny_model: Callable[[str], str],
    tiny_reward_model: Callable[[str], str],
    architecture: str,
    head: str,
) -> None:
    """R8"""
    folder = tiny_reward_model(architecture) if head == "saved" else tiny_model(architecture)
    engine = trained_scalar_model(ModelConfig(path=folder), head)
    export(engine, tmp_path / "final", TOKENIZER, ModelConfig(path=folder))
    scores = scores_of(engine)
    assert scores.abs().min() > 1e-3
    same(hf_scores(tmp_path / "final"), scores)
    same(scores_of(load_scalar_model(ModelConfig(path=str(tmp_path / "final")), torch.float32)), scores)


def test_the_normalisation_is_saved_and_read_back(tmp_path: Path) -> None:
    """R6, R8: transformers gives the head's output; here gain and bias are applied to it."""
    source = ModelConfig(path=save_tiny_reward_model(tmp_path / "source"))
    engine = trained_scalar_model(source)
    engine.module.gain, engine.module.bias = 0.25, -1.5
    export(engine, tmp_path / "final", TOKENIZER, source)
    assert json.loads((tmp_path / "final" / SCORE_FILE).read_text()) == {"gain": 0.25, "bias": -1.5}
    again = load_scalar_model(ModelConfig(path=str(tmp_path / "final")), torch.float32)
    same(scores_of(again), scores_of(engine))
    same(0.25 * hf_scores(tmp_path / "final") - 1.5, scores_of(again))


def test_a_language_model_has_no_normalisation_file(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    source = ModelConfig(path=tiny_model("llama"))
    export(trained_causal_lm(source), tmp_path / "final", TOKENIZER, source)
    assert not (tmp_path / "final" / SCORE_FILE).exists()


def test_an_older_folder_is_replaced_whole(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    """It is written beside the old one and renamed."""
    source = ModelConfig(path=tiny_model("llama"))
    final = tmp_path / "final"
    for folder in (final, tmp_path / "final.partial"):  # an old result, and what a killed run has left
        folder.mkdir()
        (folder / "model-00001-of-00002.safetensors").write_text("old")
    engine = trained_causal_lm(source)
    export(engine, final, TOKENIZER, source)
    assert not (final / "model-00001-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    same(hf_logits(final), logits_of(engine))


def test_other_values_can_take_the_place_of_weights(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    """L11: the moving average is saved in place of the weights that it averages."""
    source = ModelConfig(path=tiny_model("llama"))
    engine = trained_causal_lm(source)
    original = dict(AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).named_parameters())
    export(engine, tmp_path / "final", TOKENIZER, source, original)
    assert torch.equal(hf_logits(tmp_path / "final"), hf_logits(Path(source.path)))


# Adapters


def adapters(engine: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in engine.module.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_loads_exported_adapters(tmp_path: Path, tiny_model: Callable[[str], str], architecture: str) -> None:
    """O5"""
    source = ModelConfig(path=tiny_model(architecture), lora=LORA)
    engine = trained_causal_lm(source)
    export(engine, tmp_path / "final", TOKENIZER, source)
    assert holds_adapter(tmp_path / "final")
    assert not (tmp_path / "final" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.no_grad():
        same(logits_of(PeftModel.from_pretrained(base, tmp_path / "final")), logits_of(engine))
    merged = load_causal_lm(ModelConfig(path=str(tmp_path / "final")), torch.float32)
    same(logits_of(merged), logits_of(engine), atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_merged_on_save_equal_the_unmerged(
    tmp_path: Path, tiny_model: Callable[[str], str], architecture: str
) -> None:
    """O5"""
    lora = LoraConfig(rank=4, alpha=8, merge_on_save=True)
    source = ModelConfig(path=tiny_model(architecture), lora=lora)
    engine = trained_causal_lm(source)
    export(engine, tmp_path / "final", TOKENIZER, source)
    assert not holds_adapter(tmp_path / "final")
    same(hf_logits(tmp_path / "final"), logits_of(engine), atol=1e-4)
    assert (hf_logits(tmp_path / "final") - hf_logits(Path(source.path))).abs().max() > 0.01


def test_zero_3_exports_whole_adapters(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    """O5"""
    source = ModelConfig(path=tiny_model("llama"), lora=LORA)
    engine = trained_causal_lm(source, EngineConfig(zero_stage=3, precision="fp32"))
    export(engine, tmp_path / "final", TOKENIZER, source)
    same(logits_of(load_causal_lm(ModelConfig(path=str(tmp_path / "final")), torch.float32)), logits_of(engine), 1e-4)


def test_adapters_trained_on_adapters_are_exported_as_a_whole_model(
    tmp_path: Path, tiny_model: Callable[[str], str]
) -> None:
    """O5: adapters name the model that they stand on, and the merged one has no name."""
    first = ModelConfig(path=tiny_model("qwen2"), lora=LORA)
    export(trained_causal_lm(first), tmp_path / "first", TOKENIZER, first)
    second = ModelConfig(path=str(tmp_path / "first"), lora=LORA)
    engine = trained_causal_lm(second)
    export(engine, tmp_path / "second", TOKENIZER, second)
    assert not holds_adapter(tmp_path / "second")
    same(hf_logits(tmp_path / "second"), logits_of(engine), atol=1e-4)


def test_a_whole_model_trained_on_adapters_is_exported_whole(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    first = ModelConfig(path=tiny_model("qwen2"), lora=LORA)
    export(trained_causal_lm(first), tmp_path / "first", TOKENIZER, first)
    second = ModelConfig(path=str(tmp_path / "first"))
    engine = trained_causal_lm(second)
    export(engine, tmp_path / "second", TOKENIZER, second)
    same(hf_logits(tmp_path / "second"), logits_of(engine))


@pytest.mark.parametrize("merge_on_save", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_reward_model_with_adapters_keeps_its_trained_head(
    tmp_path: Path, tiny_model: Callable[[str], str], architecture: str, merge_on_save: bool
) -> None:
    """R8"""
    lora = LoraConfig(rank=4, alpha=8, merge_on_save=merge_on_save)
    source = ModelConfig(path=tiny_model(architecture), lora=lora)
    engine = trained_scalar_model(source, head="normal")
    engine.module.gain, engine.module.bias = 2.0, 0.5
    export(engine, tmp_path / "final", TOKENIZER, source)
    assert holds_adapter(tmp_path / "final") is not merge_on_save
    again = load_scalar_model(ModelConfig(path=str(tmp_path / "final")), torch.float32)
    same(scores_of(again), scores_of(engine), atol=1e-4)
    if merge_on_save:
        same(2.0 * hf_scores(tmp_path / "final") + 0.5, scores_of(engine), atol=1e-4)


def test_a_critic_with_adapters_starts_from_a_reward_model_of_adapters(
    tmp_path: Path, tiny_model: Callable[[str], str]
) -> None:
    """R8"""
    first = ModelConfig(path=tiny_model("llama"), lora=LORA)
    reward_model = trained_scalar_model(first, head="normal")
    export(reward_model, tmp_path / "first", TOKENIZER, first)
    second = ModelConfig(path=str(tmp_path / "first"), lora=LORA)
    critic = load_scalar_model(second, torch.float32)
    same(scores_of(critic), scores_of(reward_model), atol=1e-4)
    engine = trained_scalar_model(second)
    export(engine, tmp_path / "second", TOKENIZER, second)
    again = load_scalar_model(ModelConfig(path=str(tmp_path / "second")), torch.float32)
    same(scores_of(again), scores_of(engine), atol=1e-4)


def test_exporting_changes_nothing_in_the_engine(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    source = ModelConfig(path=tiny_model("llama"), lora=LoraConfig(rank=4, merge_on_save=True))
    engine = trained_causal_lm(source)
    before, logits = adapters(engine), logits_of(engine)
    export(engine, tmp_path / "final", TOKENIZER, source)
    assert all(torch.equal(weight, before[name]) for name, weight in adapters(engine).items())
    assert torch.equal(logits_of(engine), logits)
