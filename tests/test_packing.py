"""Packed forwards: the numbers and gradients of the padded ones, at the cost of the real tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.test_forward import batch_of
from tests.tiny_models import CONFIGS
from training.attention import SHORT_TOKENS, ByLength, length_classes
from training.config import LoraConfig, ModelConfig
from training.data import Batch
from training.forward import critic_values, response_logprobs, reward_scores
from training.models import load_causal_lm, load_scalar_model
from training.packing import ARCHITECTURES, PackedBatch, packs

TinyModel = Callable[[str], str]
KNOWN = sorted({*CONFIGS, "phi3"})


def test_every_known_architecture_is_compared_here() -> None:
    assert set(KNOWN) == ARCHITECTURES


def loaded(path: str, packing: bool, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = load_causal_lm(ModelConfig(path=path, packing=packing, **options), torch.float32)
    assert packs(model) == packing
    return model


def numbers_and_gradients(model: nn.Module, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    logprobs, entropy = response_logprobs(model, batch, 0.7, with_entropy=True)
    assert entropy is not None
    weights = torch.linspace(-1, 1, logprobs.numel()).view(logprobs.shape)
    (weights * logprobs + 0.3 * entropy).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [logprobs.detach(), entropy.detach()], gradients


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # 1e-7: the bias of a key has the gradient 0 but for rounding, since it is the same for all that is attended to.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.parametrize("architecture", KNOWN)
def test_packed_logprobs_entropy_and_gradients_are_the_padded_ones(tiny_model: TinyModel, architecture: str) -> None:
    """F1"""
    compare_packed_with_padded(tiny_model(architecture), batch_of())


def compare_packed_with_padded(path: str, batch: Batch) -> None:
    """Log-probabilities, entropies, and gradients of both."""
    (expected, gradients), (found, own) = (
        numbers_and_gradients(loaded(path, packing), batch) for packing in (False, True)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same_gradients(own, gradients)


@pytest.mark.parametrize("architecture", KNOWN)
def test_rows_laid_out_by_their_length_give_the_padded_numbers(
    tiny_model: TinyModel, tiny_reward_model: TinyModel, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1"""
    monkeypatch.setattr("training.attention.SHORT_TOKENS", 10)
    batch = batch_of(order=[1, 4, 0, 3, 2])
    assert isinstance(PackedBatch(batch.input_ids, batch.attention_mask).sequences, ByLength)
    compare_packed_with_padded(tiny_model(architecture), batch)
    if architecture in CONFIGS:
        compare_values_and_scores(tiny_reward_model(architecture), [batch])


def test_classes_of_lengths_end_at_the_length_where_the_kernel_changes() -> None:
    lengths = torch.tensor([1, 96, 97, 192, 193, SHORT_TOKENS, SHORT_TOKENS + 1, 768, 769, 2**20])
    assert length_classes(lengths).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 14]


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)], ids=["whole", "adapters"])
def test_a_checkpointed_layer_finds_its_batch_again(tiny_model: TinyModel, lora: LoraConfig) -> None:
    """Also after another batch has been through the model."""
    gradients = []
    for packing, checkpointing in ((False, False), (True, True)):
        model = loaded(tiny_model("llama"), packing, gradient_checkpointing=checkpointing, lora=lora).train()
        first, _ = response_logprobs(model, batch_of(order=[1, 0]))
        second, _ = response_logprobs(model, batch_of(order=[2, 3, 4]))
        (first.sum() + 2 * second.sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same_gradients(*gradients[::-1])


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_packed_values_and_scores_are_the_padded_ones(tiny_reward_model: TinyModel, architecture: str) -> None:
    compare_values_and_scores(tiny_reward_model(architecture), [batch_of()])


def compare_values_and_scores(path: str, batches: Sequence[Batch]) -> None:
    """Values of all real positions, scores, and gradients of both, packed and padded."""
    found, gradients = [], []
    for packing in (False, True):
        model = load_scalar_model(ModelConfig(path=path, packing=packing), torch.float32)
        numbers = []
        for batch in batches:
            values = torch.where(batch.attention_mask, critic_values(model, batch), 0.0)
            weights = torch.linspace(-1, 1, values.numel()).view(values.shape)
            scores = reward_scores(model, batch)
            ((weights * values).sum() + scores.square().sum()).backward()
            numbers += [values.detach(), scores.detach()]
        found.append(numbers)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert_same_gradients(*gradients[::-1])


def tokens_of_linear_layers(model: nn.Module, batch: Batch) -> dict[str, int]:
    """How many tokens each linear layer multiplies in a forward for the log-probabilities; by its name."""
    seen: dict[str, int] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(
                lambda _, inputs, __, name=name: seen.update({name: inputs[0].shape[:-1].numel()})
            )
    response_logprobs(model, batch)
    return seen


def test_padding_is_not_computed_and_the_head_reads_the_response_alone(tiny_model: TinyModel) -> None:
    model: Any = loaded(tiny_model("llama"), packing=True)
    batch = batch_of()
    seen = tokens_of_linear_layers(model, batch)
    assert seen.pop("lm_head") == batch.response_mask[:, 1:].sum()
    assert set(seen.values()) == {batch.num_tokens}
    assert batch.num_tokens < batch.input_ids.numel()


@pytest.mark.parametrize("architecture", ["gptj", "bloom", "falcon"])
def test_other_architectures_stay_padded(tiny_model: TinyModel, architecture: str) -> None:
    kernel: Any = "sdpa" if architecture == "falcon" else "eager"
    model = load_causal_lm(ModelConfig(path=tiny_model(architecture), attention=kernel), torch.float32)
    assert not packs(model)
    assert response_logprobs(model, batch_of())[0].count_nonzero() > 0


def test_another_attention_kernel_stays_padded(tiny_model: TinyModel) -> None:
    assert not packs(load_causal_lm(ModelConfig(path=tiny_model("llama"), attention="eager"), torch.float32))


def test_what_is_saved_knows_nothing_of_packing(tiny_model: TinyModel, tmp_path: Path) -> None:
    model: Any = loaded(tiny_model("llama"), packing=True)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
