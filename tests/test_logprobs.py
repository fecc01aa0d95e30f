import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from training import logprobs
from training.logprobs import last_token_scores, token_entropy, token_logprobs, token_values


def brute_force_logprobs(logits: Tensor, input_ids: Tensor, temperature: float) -> Tensor:
    """Entry t = log(exp(z_token) / sum exp(z)) of position t - 1, in float64, one number at a time."""
    batch, time = input_ids.shape
    offset = time - logits.shape[1]
    result = torch.zeros(batch, time, dtype=torch.float64)
    for row in range(batch):
        for t in range(offset + 1, time):
            tempered = logits[row, t - 1 - offset].double() / temperature
            tempered = tempered - tempered.max()
            result[row, t] = tempered[input_ids[row, t]] - tempered.exp().sum().log()
    return result


def brute_force_gradient(logits: Tensor, input_ids: Tensor, temperature: float, upstream: Tensor) -> Tensor:
    """Of sum(upstream * logprobs): upstream * (onehot - softmax) / temperature, in float64."""
    batch, kept, vocab = logits.shape
    offset = input_ids.shape[1] - kept
    result = torch.zeros(batch, kept, vocab, dtype=torch.float64)
    for row in range(batch):
        for position in range(kept - 1):
            t = position + 1 + offset
            exponentials = (logits[row, position].double() / temperature).exp()
            result[row, position] = -exponentials / exponentials.sum()
            result[row, position, input_ids[row, t]] += 1
            result[row, position] *= upstream[row, t].double() / temperature
    return result


def random_case(kept: int = 5, time: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, kept, 11, generator=generator)).to(dtype)
    return logits, torch.randint(0, 11, (3, time), generator=generator)


@pytest.fixture(params=[1, 25, 2**20], ids=["one_row_a_chunk", "two_rows_a_chunk", "one_chunk"])
def chunk_floats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(logprobs, "CHUNK_FLOATS_CPU", request.param)
    return request.param


def test_a_model_that_knows_the_next_token_has_logprob_0_there_and_nowhere_else() -> None:
    """F3: the model is certain of tokens 1 to 3; the padding after them is not what it expects."""
    expected_text = torch.tensor([[4, 2, 3, 1, 0, 2]])
    input_ids = torch.tensor([[4, 2, 3, 1, 5, 5]])
    logits = torch.zeros(1, 6, 6)
    for position in range(5):
        logits[0, position, expected_text[0, position + 1]] = 1e4
    assert token_logprobs(logits, input_ids).tolist() == [[0, 0, 0, 0, -1e4, -1e4]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_definition(chunk_floats: int, temperature: float) -> None:
    logits, input_ids = random_case()
    found = token_logprobs(logits, input_ids, temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), brute_force_logprobs(logits, input_ids, temperature), rtol=0, atol=2e-6)


def test_logprobs_are_those_of_the_distribution_sampled_at_the_same_temperature() -> None:
    """F6: T = 0.7."""
    logits, input_ids = random_case()
    sampler = (logits.double() / 0.7).softmax(-1)
    found = token_logprobs(logits, input_ids, temperature=0.7)
    for t in range(1, 5):
        chosen = sampler[:, t - 1].gather(-1, input_ids[:, t, None])[:, 0].log()
        torch.testing.assert_close(found[:, t].double(), chosen, rtol=0, atol=2e-6)


def test_logits_of_the_last_positions_give_the_last_logprobs(chunk_floats: int) -> None:
    logits, input_ids = random_case(kept=7, time=7)
    whole = token_logprobs(logits, input_ids)
    for kept in range(1, 8):
        found = token_logprobs(logits[:, 7 - kept :], input_ids)
        first = 7 - kept + 1
        assert torch.equal(found[:, first:], whole[:, first:])
        assert not found[:, :first].any()


def test_sequences_of_one_token_have_logprob_0() -> None:
    assert token_logprobs(torch.randn(2, 1, 4), torch.zeros(2, 1, dtype=torch.long)).tolist() == [[0], [0]]


def test_sixteen_bit_logits_give_the_float32_logprobs_of_those_logits() -> None:
    logits, input_ids = random_case(dtype=torch.bfloat16)
    found = token_logprobs(logits, input_ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), brute_force_logprobs(logits, input_ids, 1.0), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-5, 5e-7), (torch.bfloat16, 2**-8, 5e-7)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kept", [3, 5])
def test_gradient_equals_the_definition(
    chunk_floats: int, dtype: torch.dtype, rtol: float, atol: float, temperature: float, kept: int
) -> None:
    """Also for bfloat16, to the rounding of the gradient itself. Upstream / temperature reaches 3: one float32 ulp of
    1 - p is then 4e-7."""
    logits, input_ids = random_case(kept=kept, dtype=dtype)
    logits.requires_grad_()
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    upstream[0, 3] = 0
    upstream[1] = 0
    (gradient,) = torch.autograd.grad(token_logprobs(logits, input_ids, temperature), logits, upstream)
    assert gradient.dtype == dtype
    expected = brute_force_gradient(logits.detach(), input_ids, temperature, upstream)
    torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=atol)


def test_gradients_agree_with_finite_differences(chunk_floats: int) -> None:
    logits, input_ids = random_case(dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, input_ids, 0.7), logits)
    assert torch.autograd.gradcheck(lambda z: token_entropy(z, 6, 0.7), logits)


def test_logits_that_are_a_strided_view_get_the_same_numbers_and_gradients() -> None:
    logits, input_ids = random_case()
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    gradients = []
    for case in (logits, strided):
        case = case.detach().requires_grad_()
        total = token_logprobs(case, input_ids).sum() + token_entropy(case, 5).sum()
        gradients.append(torch.autograd.grad(total, case)[0])
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [1, 3], ids=["in_a_gap", "at_the_end"])
def test_garbage_logits_of_masked_tokens_do_not_leak_into_other_tokens_or_gradients(
    garbage: float, position: int
) -> None:
    """K3: the token after `position` is masked in row 0."""
    clean, input_ids = random_case()
    dirty = clean.clone()
    dirty[0, position] = garbage
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, position + 1] = False
    results = []
    for logits in (clean.requires_grad_(), dirty.requires_grad_()):
        chosen, entropy = token_logprobs(logits, input_ids), token_entropy(logits, 5)
        total = torch.where(mask, chosen + entropy, 0.0).sum()
        results.append((total, torch.autograd.grad(total, logits)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[1][1][0, position].any()


def test_an_impossible_token_leaves_everything_finite() -> None:
    """A logit of -inf: probability 0 for one token, as a sampler that rules it out."""
    logits = torch.tensor([[[0.0, 0.0, -float("inf")], [0.0, 0.0, 0.0]]], requires_grad=True)
    input_ids = torch.tensor([[0, 1]])
    chosen, entropy = token_logprobs(logits, input_ids), token_entropy(logits, 2)
    assert chosen[0, 1].item() == pytest.approx(-math.log(2))
    assert entropy[0, 1].item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad((chosen + entropy).sum(), logits)
    assert gradient[0, 0].tolist() == pytest.approx([-0.5, 0.5, 0.0], abs=1e-6)


class LargestFloat32(TorchDispatchMode):
    """Remembers the largest float32 tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("with_gradient", [False, True])
def test_no_more_than_one_chunk_of_logits_is_in_float32(monkeypatch: pytest.MonkeyPatch, with_gradient: bool) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_FLOATS_CPU", 300)
    logits = torch.randn(4, 9, 100).bfloat16().requires_grad_(with_gradient)
    input_ids = torch.randint(0, 100, (4, 9))
    with LargestFloat32() as seen:
        total = token_logprobs(logits, input_ids).sum() + token_entropy(logits, 9).sum()
        if with_gradient:
            total.backward()
    assert seen.numel == 300


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_of_uniform_logits_is_log_of_the_vocabulary(temperature: float) -> None:
    """L9."""
    entropy = token_entropy(torch.full((2, 4, 50), 3.0), 4, temperature)
    assert entropy.shape == (2, 4)
    assert entropy[:, 0].tolist() == [0, 0]
    assert entropy[:, 1:].flatten().tolist() == pytest.approx([math.log(50)] * 6, rel=1e-6)


def test_entropy_is_that_of_the_tempered_distribution_of_the_position_before(chunk_floats: int) -> None:
    """L9."""
    logits, _ = random_case(kept=4)
    probabilities = (logits.double() / 0.7).softmax(-1)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    expected[:, 3:] = -(probabilities * probabilities.log()).sum(-1)[:, :-1]
    torch.testing.assert_close(token_entropy(logits, 6, 0.7).double(), expected, rtol=0, atol=2e-6)


def test_values_are_those_of_the_state_before_the_token_was_chosen() -> None:
    found = token_values(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert found.tolist() == [[0, 1, 2], [0, 4, 5]]


def test_score_is_read_at_the_last_real_token_and_padding_does_not_change_it() -> None:
    """R1."""
    position_values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    attention_mask = torch.tensor([[True, True, False], [True, True, True]])
    assert last_token_scores(position_values, attention_mask).tolist() == [2, 6]
    padded = torch.tensor([[1.0, 2.0, float("nan"), float("inf")], [4.0, 5.0, 6.0, float("nan")]], requires_grad=True)
    padded_mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    scores = last_token_scores(padded, padded_mask)
    assert scores.tolist() == [2, 6]
    (gradient,) = torch.autograd.grad(scores.sum(), padded)
    assert gradient.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_score_of_a_row_without_tokens_is_0() -> None:
    assert last_token_scores(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [0]


@pytest.mark.parametrize("shape", [(3, 6, 11), (2, 5, 11), (3, 0, 11), (5, 11)])
def test_logits_that_do_not_fit_the_tokens_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits are"):
        token_logprobs(torch.zeros(shape), torch.zeros(3, 5, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_that_are_not_positive_are_refused(temperature: float) -> None:
    logits, input_ids = random_case()
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(logits, input_ids, temperature)
    with pytest.raises(ValueError, match="temperature"):
        token_entropy(logits, 5, temperature)
