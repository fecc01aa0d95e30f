"""Models over batches: the same numbers as plain transformers and torch, however the batch is laid out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.tiny_models import CONFIGS
from tests.tiny_tokenizers import EOS, NUM_SPECIAL, PAD, VOCAB_SIZE
from training.config import ModelConfig
from training.data import Batch, collate
from training.forward import critic_values, response_logprobs, reward_scores
from training.models import load_causal_lm, load_scalar_model

ARCHITECTURES = sorted(CONFIGS)

# (tokens of the prompt, tokens of the response) of each row; the last row has no prompt at all.
SHAPES = [(3, 4), (9, 2), (1, 14), (5, 1), (0, 6)]


def rows() -> list[tuple[list[int], list[bool]]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for prompt, response in SHAPES:
        ids = torch.randint(NUM_SPECIAL, VOCAB_SIZE, (prompt + response,), generator=generator).tolist()
        result.append(([*ids[:-1], EOS], [False] * prompt + [True] * response))
    return result


def batch_of(pad_id: int = PAD, pad_to_multiple: int = 8, order: list[int] | None = None) -> Batch:
    all_rows = rows()
    return collate([all_rows[i] for i in order or range(len(all_rows))], pad_id, pad_to_multiple)


def reference_log_softmax(path: str, ids: list[int], temperature: float = 1.0) -> Tensor:
    """[time, vocab] of one row without padding, by transformers and torch alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return (model(input_ids=torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)


def only_response(values: Tensor, batch: Batch) -> Tensor:
    return torch.where(batch.response_mask, values, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_and_entropy_are_those_of_the_full_logits(
    tiny_model: Callable[[str], str], architecture: str, temperature: float
) -> None:
    """F1, F2, F3, F6, L9"""
    path = tiny_model(architecture)
    batch = batch_of()
    model = load_causal_lm(ModelConfig(path=path), torch.float32)
    logprobs, entropy = response_logprobs(model, batch, temperature, with_entropy=True)
    assert entropy is not None
    assert logprobs.shape == entropy.shape == batch.input_ids.shape
    for row, (ids, mask) in enumerate(rows()):
        expected = reference_log_softmax(path, ids, temperature)
        for t in range(1, len(ids)):
            if mask[t]:
                assert float(logprobs[row, t]) == pytest.approx(float(expected[t - 1, ids[t]]), abs=1e-5)
                by_definition = float(-(expected[t - 1].exp() * expected[t - 1]).sum())
                assert float(entropy[row, t]) == pytest.approx(by_definition, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_do_not_depend_on_padding_or_row_order(tiny_model: Callable[[str], str], architecture: str) -> None:
    """F1, F2, K3"""
    model = load_causal_lm(ModelConfig(path=tiny_model(architecture)), torch.float32)
    expected = only_response(response_logprobs(model, batch_of())[0], batch_of())
    time = expected.shape[1]
    for pad_id, multiple in ((EOS, 8), (99, 64), (PAD, 29)):
        batch = batch_of(pad_id, multiple)
        logprobs = only_response(response_logprobs(model, batch)[0], batch)
        shared = min(time, logprobs.shape[1])
        torch.testing.assert_close(logprobs[:, :shared], expected[:, :shared], rtol=0, atol=1e-5)
    order = [4, 2, 0, 3, 1]
    batch = batch_of(order=order)
    logprobs = only_response(response_logprobs(model, batch)[0], batch)
    torch.testing.assert_close(logprobs, expected[order], rtol=0, atol=1e-5)
    for row in range(len(SHAPES)):
        batch = batch_of(order=[row], pad_to_multiple=1)
        alone = only_response(response_logprobs(model, batch)[0], batch)[0]
        torch.testing.assert_close(alone, expected[row, : len(alone)], rtol=0, atol=1e-5)


class CopiesNext(nn.Module):
    """Is certain of the token that `input_ids` holds next, given all of them when it is made."""

    def __init__(self, input_ids: Tensor) -> None:
        super().__init__()
        self.input_ids = input_ids

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, use_cache: bool) -> Batch:
        certain = torch.full((*input_ids.shape, VOCAB_SIZE), -1e9)
        certain[:, :-1].scatter_(-1, self.input_ids[:, 1:, None], 0.0)
        result = type("Output", (), {})()
        result.logits = certain[:, -logits_to_keep:]
        return result


def test_a_model_that_knows_the_next_token_has_logprob_0_on_the_response() -> None:
    """F3"""
    batch = batch_of()
    model = CopiesNext(batch.input_ids)
    logprobs, _ = response_logprobs(model, batch)
    assert logprobs.count_nonzero() == 0
    wrong = Batch(torch.full_like(batch.input_ids, 7), batch.attention_mask, batch.response_mask)
    logprobs, _ = response_logprobs(model, wrong)
    assert (logprobs[:, 1:][batch.response_mask[:, 1:]] < -1e8).all()


@pytest.mark.parametrize("packing", [False, True])
def test_logprobs_are_0_outside_of_the_response(tiny_model: Callable[[str], str], packing: bool) -> None:
    model = load_causal_lm(ModelConfig(path=tiny_model("llama"), packing=packing), torch.float32)
    batch = batch_of(order=[1, 3])  # responses begin at 9 and at 5
    logprobs, entropy = response_logprobs(model, batch, with_entropy=True)
    assert entropy is not None
    assert torch.equal(logprobs < 0, batch.response_mask)
    assert torch.equal(entropy > 0, batch.response_mask)


def test_a_batch_in_which_nothing_counts_is_no_special_case(tiny_model: Callable[[str], str]) -> None:
    model = load_causal_lm(ModelConfig(path=tiny_model("llama")), torch.float32)
    logprobs, _ = response_logprobs(model, batch_of().as_filler())
    only_response(logprobs, batch_of().as_filler()).sum().backward()


def test_gradients_reach_the_weights_from_the_response_alone(tiny_model: Callable[[str], str]) -> None:
    """F4: garbage after the end changes no gradient."""
    gradients = []
    for pad_id in (PAD, 77):
        model = load_causal_lm(ModelConfig(path=tiny_model("llama")), torch.float32)
        batch = batch_of(pad_id)
        logprobs, _ = response_logprobs(model, batch)
        only_response(logprobs, batch).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_logprobs_of_a_bf16_model_are_float32_and_near(tiny_model: Callable[[str], str]) -> None:
    """F1: in bf16 the layout of a batch changes a token by rounding only."""
    model = load_causal_lm(ModelConfig(path=tiny_model("llama")), torch.bfloat16)
    batch = batch_of()
    logprobs, _ = response_logprobs(model, batch)
    assert logprobs.dtype == torch.float32
    for row in range(len(SHAPES)):
        alone = batch_of(order=[row], pad_to_multiple=1)
        own = response_logprobs(model, alone)[0][0]
        difference = (own - logprobs[row, : len(own)])[alone.response_mask[0]].abs()
        assert float(difference.max()) < 2e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_value_is_that_of_the_state_before_the_token(
    tiny_reward_model: Callable[[str], str], architecture: str
) -> None:
    path = tiny_reward_model(architecture)
    model = load_scalar_model(ModelConfig(path=path), torch.float32)
    batch = batch_of()
    with torch.no_grad():
        values = critic_values(model, batch)
    assert values.shape == batch.input_ids.shape
    assert values[:, 0].count_nonzero() == 0
    plain = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    for row, (ids, _) in enumerate(rows()):
        for t in (1, len(ids) - 1):
            with torch.no_grad():
                before = plain(input_ids=torch.tensor([ids[:t]])).logits  # has not seen token t
            assert float(values[row, t]) == pytest.approx(float(before), abs=1e-5)


def test_a_score_is_read_after_the_last_token_and_nowhere_else(tiny_reward_model: Callable[[str], str]) -> None:
    """R1"""
    path = tiny_reward_model("qwen2")
    model = load_scalar_model(ModelConfig(path=path), torch.float32)
    batch = batch_of()
    with torch.no_grad():
        scores = reward_scores(model, batch)
        every = model(batch.input_ids, batch.attention_mask.long())
    assert scores.tolist() == [
        float(every[row, prompt + response - 1]) for row, (prompt, response) in enumerate(SHAPES)
    ]
