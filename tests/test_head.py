"""Numbers about tokens from hidden states in chunks: those of the whole logits, which are never held."""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tests.launching import failures_of, under_torchrun
from tests.test_forward import batch_of
from tests.test_packing import KNOWN, assert_same_gradients, loaded, numbers_and_gradients
from tests.tiny_tokenizers import VOCAB_SIZE
from training import head, logprobs
from training.config import LoraConfig
from training.forward import response_logprobs
from training.head import Choices, ChunkedHead, choice_numbers, let_chunk

TinyModel = Callable[[str], str]
TOKENS, HIDDEN, VOCAB = 7, 4, 11


class Allocations(TorchDispatchMode):
    """What operations ran, the bytes of the largest storage that they made, and of all that lived at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self.operations: set[str] = set()
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known.update(tensor.untyped_storage() for tensor in args if isinstance(tensor, Tensor))
        self.operations.add(func.overloadpacket.__name__)
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self._add(storage.nbytes())
        self.largest, self.peak = max(self.largest, storage.nbytes()), max(self.peak, self.live)
        weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, size: int) -> None:
        self.live += size


def limit_to(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    for name in ("SCORED_BYTES_CPU", "TRAINED_BYTES_CPU", "LOGIT_BYTES_GPU"):
        monkeypatch.setattr(head, name, limit)


def random_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias of a head, and tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    hidden, weight, bias = ((1.5 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes)
    return hidden, weight, bias, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def by_definition(hidden: Tensor, weight: Tensor, bias: Tensor | None, choices: Choices) -> Tensor:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    every = (logits / choices.temperature).log_softmax(-1)
    chosen = every.gather(-1, choices.tokens[:, None])
    return torch.cat([chosen, -(every.exp() * every).sum(-1, keepdim=True)], 1)[:, : 1 + choices.with_entropy]


def with_gradients(function: Any, tensors: list[Tensor | None], choices: Choices, upstream: Tensor) -> list[Tensor]:
    """The numbers, then the gradient of each tensor that there is."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    found = function(*leaves, choices)
    return [found.detach(), *torch.autograd.grad(found, [leaf for leaf in leaves if leaf is not None], upstream)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logprobs", "entropy"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("step", [1, 3, TOKENS])
def test_numbers_and_gradients_are_those_of_the_whole_logits(
    monkeypatch: pytest.MonkeyPatch, step: int, has_bias: bool, with_entropy: bool, temperature: float
) -> None:
    """F6, L9"""
    limit_to(monkeypatch, 8 * VOCAB * step)
    hidden, weight, bias, tokens = random_case()
    upstream = torch.randn(TOKENS, 1 + with_entropy, generator=torch.Generator().manual_seed(1)).double()
    upstream[2], upstream[4, 0] = 0, 0
    choices = Choices(tokens, temperature, with_entropy)
    tensors: list[Tensor | None] = [hidden, weight, bias if has_bias else None]
    found = with_gradients(choice_numbers, tensors, choices, upstream)
    expected = with_gradients(by_definition, tensors, choices, upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    with torch.no_grad():
        assert torch.equal(choice_numbers(hidden, weight, tensors[2], choices), found[0])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_states_of_tokens_without_a_gradient_are_not_read(monkeypatch: pytest.MonkeyPatch, garbage: float) -> None:
    """K3"""
    limit_to(monkeypatch, 4 * VOCAB * 3)
    hidden, weight, bias, tokens = random_case(torch.float32)
    dirty = hidden.clone()
    dirty[[1, 5]] = garbage
    upstream = torch.ones(TOKENS, 2)
    upstream[[1, 5]] = 0
    choices = Choices(tokens, with_entropy=True)
    clean, found = (
        with_gradients(choice_numbers, [states, weight, bias], choices, upstream)[1:] for states in (hidden, dirty)
    )
    for one, other in zip(found, clean, strict=True):
        assert torch.equal(one, other)
    assert not found[0][[1, 5]].any()


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_what_is_trained_gets_a_gradient(monkeypatch: pytest.MonkeyPatch, trained: int) -> None:
    """With a frozen head nothing of its size is allocated."""
    limit_to(monkeypatch, 8 * 50)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 40), (50, 40), (50,))]
    tensors[trained].requires_grad_()
    choices = Choices(torch.tensor([4, 0, 49]))
    with Allocations() as seen:
        choice_numbers(tensors[0], tensors[1], tensors[2], choices).sum().backward()
    numbers = by_definition(tensors[0], tensors[1], tensors[2], choices)
    (expected,) = torch.autograd.grad(numbers.sum(), tensors[trained])
    assert tensors[trained].grad is not None
    torch.testing.assert_close(tensors[trained].grad, expected, rtol=0, atol=1e-10)
    assert [tensor.grad is not None for tensor in tensors] == [index == trained for index in range(3)]
    assert (seen.largest >= 8 * 50 * 40) == (trained == 1)


def test_16_bit_numbers_are_float32_ones_of_rounded_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three roundings takes 2**-9 of a size: of the logits' gradient, of a chunk's share, of the result."""
    limit_to(monkeypatch, 2 * VOCAB * 3)
    hidden, weight, bias, tokens = random_case(torch.bfloat16)
    choices, upstream = Choices(tokens), torch.ones(TOKENS, 1)
    numbers, *found = with_gradients(choice_numbers, [hidden, weight, bias], choices, upstream)
    logits, none = F.linear(hidden, weight, bias).float(), torch.eye(VOCAB)
    expected, change = with_gradients(lambda z, c: by_definition(z, none, None, c), [logits], choices, upstream)
    torch.testing.assert_close(numbers, expected, rtol=0, atol=5e-6)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 3
    factors = (change, weight.float()), (change.T, hidden.float()), (change.T, torch.ones(TOKENS, 1))
    for gradient, (left, right) in zip(found, factors, strict=True):
        error = (gradient.float().view(left.shape[0], -1) - left @ right).abs()
        assert (error <= 2**-7 * (left.abs() @ right.abs()) + 1e-6).all()


def test_the_gradient_of_a_16_bit_head_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of equal numbers in bfloat16 ends at 256 of them: the next one is half a unit in the last place."""
    limit_to(monkeypatch, 0)
    hidden, weight, bias, tokens = random_case(torch.bfloat16)
    one = with_gradients(choice_numbers, [hidden[:1], weight, bias], Choices(tokens[:1]), torch.ones(1, 1))
    same = hidden[:1].expand(600, HIDDEN)
    found = with_gradients(choice_numbers, [same, weight, bias], Choices(tokens[:1].expand(600)), torch.ones(600, 1))
    for many, single in zip(found[2:], one[2:], strict=True):
        torch.testing.assert_close(many.float(), 600 * single.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("is_trained", [False, True], ids=["scoring", "training"])
def test_no_more_than_a_chunk_of_logits_is_held(monkeypatch: pytest.MonkeyPatch, is_trained: bool) -> None:
    """Of 80 tokens over a vocabulary of 128 Ki; beside it the gradient of the weight, which is 4 wide."""
    vocab, tokens, step = 2**17, 80, 8
    chunk, width = 4 * vocab * step, 4 * vocab * 4
    limit_to(monkeypatch, chunk)
    monkeypatch.setattr(logprobs, "CHUNK_FLOATS_CPU", vocab)
    hidden, weight = torch.randn(tokens, 4), torch.randn(vocab, 4, requires_grad=is_trained)
    choices = Choices(torch.randint(0, vocab, (tokens,)))
    with Allocations() as seen:
        numbers = choice_numbers(hidden, weight, None, choices)
        assert chunk <= seen.peak < 2 * chunk
        if is_trained:
            numbers.sum().backward()
    assert seen.largest == chunk
    # A chunk and its gradient; the sum and the part that is added to it; a few rows in float32.
    assert seen.peak < (2 * chunk + 2 * width if is_trained else chunk) + 4 * 4 * logprobs.CHUNK_FLOATS_CPU


def test_32_ki_tokens_over_128_ki_words_are_scored_in_chunks_of_32_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole logits are 8 GiB. On tensors without memory."""
    monkeypatch.setattr(logprobs, "CHUNK_FLOATS_CPU", 2**23)
    hidden, weight, tokens = (
        torch.empty(shape, device="meta", dtype=dtype)
        for shape, dtype in (((2**15, 8), torch.bfloat16), ((2**17, 8), torch.bfloat16), ((2**15,), torch.long))
    )
    with Allocations() as seen, torch.no_grad():
        numbers = choice_numbers(hidden, weight, None, Choices(tokens))
    assert numbers.shape == (2**15, 1)
    assert seen.largest == 2**25
    assert seen.peak <= 4 * 2**25


def test_training_keeps_logits_that_fit_where_scoring_takes_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, tokens = random_case(torch.float32)
    monkeypatch.setattr(head, "SCORED_BYTES_CPU", 0)
    monkeypatch.setattr(head, "TRAINED_BYTES_CPU", 4 * VOCAB * TOKENS)
    rows = rows_of_logits(monkeypatch)
    choice_numbers(hidden, weight, bias, Choices(tokens))
    assert rows == {1}
    rows.clear()
    found = choice_numbers(hidden, weight.requires_grad_(), bias, Choices(tokens))
    assert rows == {TOKENS}
    assert "Chunked" not in str(found.grad_fn)


@pytest.mark.parametrize("architecture", KNOWN)
def test_logprobs_entropy_and_gradients_of_a_model_are_the_padded_ones(
    monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, architecture: str
) -> None:
    """F1; one token at a time."""
    path = tiny_model(architecture)
    expected, gradients = numbers_and_gradients(loaded(path, packing=False), batch_of())
    limit_to(monkeypatch, 0)
    rows = rows_of_logits(monkeypatch)
    found, own = numbers_and_gradients(loaded(path, packing=True), batch_of())
    assert rows == {1}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same_gradients(own, gradients)


def rows_of_logits(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Will hold for how many tokens at a time logits are read."""
    rows: set[int] = set()
    read = logprobs._chunks

    def seen(logits: Tensor, *arguments: Any) -> Any:
        rows.add(logits.shape[1])
        return read(logits, *arguments)

    monkeypatch.setattr(logprobs, "_chunks", seen)
    return rows


@pytest.mark.parametrize(
    ("lora", "is_chunked"),
    [
        pytest.param(LoraConfig(rank=4), True, id="a_frozen_head"),
        pytest.param(LoraConfig(rank=4, target_modules=("q_proj", "lm_head")), False, id="an_adapted_head"),
    ],
)
def test_with_adapters_numbers_and_gradients_are_the_padded_ones(
    monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, lora: LoraConfig, is_chunked: bool
) -> None:
    """Also with checkpointed layers. An adapter on the head adds to its output, so that head gives all its logits."""
    limit_to(monkeypatch, 0)
    results = []
    for packing in (False, True):
        model = loaded(tiny_model("qwen2"), packing, lora=lora, gradient_checkpointing=True).train()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # else the adapters would add nothing
                parameter.data.normal_(std=0.2, generator=generator)
        rows = rows_of_logits(monkeypatch)
        results.append(numbers_and_gradients(model, batch_of()))
        monkeypatch.undo()
        limit_to(monkeypatch, 0)
    assert (rows == {1}) == is_chunked
    (expected, gradients), (found, own) = results
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same_gradients(own, gradients)


def test_a_head_gives_logits_again_after_a_forward_with_choices_that_fails(tiny_model: TinyModel) -> None:
    model: Any = loaded(tiny_model("llama"), packing=True)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits

    def fail(*_: Any) -> None:
        raise OSError("a forward that fails")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(OSError, match="a forward that fails"):
        response_logprobs(model, batch_of())
    hook.remove()
    assert torch.equal(model(ids).logits, before)
    assert before.shape == (1, 3, VOCAB_SIZE)


def test_choices_within_choices_leave_the_outer_ones(tiny_model: TinyModel) -> None:
    model: Any = loaded(tiny_model("llama"), packing=True)
    one, other = Choices(torch.tensor([3, 4])), Choices(torch.tensor([5]), with_entropy=True)
    hidden = torch.randn(1, 2, 32)
    with model.lm_head.given(one):
        with model.lm_head.given(other):
            assert model.lm_head(hidden[:, :1]).shape == (1, 1, 2)
        assert model.lm_head(hidden).shape == (1, 2, 1)
    assert model.lm_head(hidden).shape == (1, 2, VOCAB_SIZE)


@pytest.mark.parametrize("architecture", ["gptj", "llama"], ids=["with_a_bias", "tied"])
def test_a_head_keeps_its_weights_and_its_logits(tiny_model: TinyModel, architecture: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    plain = copy.deepcopy(model)
    let_chunk(model)
    assert type(model.lm_head) is ChunkedHead
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (architecture == "llama")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, plain(ids).logits)
    hidden, choices = torch.randn(1, 2, 32), Choices(torch.tensor([3, 4]), 0.7, True)
    with model.lm_head.given(choices):
        found = model.lm_head(hidden)[0]
    expected = by_definition(hidden[0], plain.lm_head.weight, plain.lm_head.bias, choices)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_another_kind_of_head_is_left_alone(tiny_model: TinyModel) -> None:
    class Doubled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    model: Any = loaded(tiny_model("qwen2"), packing=True)
    model.lm_head.__class__ = Doubled
    let_chunk(model)
    plain: Any = loaded(tiny_model("qwen2"), packing=False)
    plain.lm_head.__class__ = Doubled
    found, expected = (response_logprobs(m, batch_of())[0] for m in (model, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_last_positions_take_one_product_with_a_frozen_head() -> None:
    """Not one for each row, as torch does for a slice with gaps."""
    part = nn.Linear(16, 64, bias=False).requires_grad_(False)
    part.__class__ = ChunkedHead
    with Allocations() as seen:
        part(torch.randn(8, 5, 16)[:, -2:])
    assert "mm" in seen.operations and "bmm" not in seen.operations


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What went wrong in each check on two ranks, all run in one launch."""
    return failures_of(under_torchrun("tests.head_checks"), timeout_seconds=240)


@pytest.mark.parametrize("check", ["tied", "untied", "frozen"])
def test_chunks_change_no_gradient_where_weights_are_split_over_two_ranks(failures: dict[str, str], check: str) -> None:
    assert failures[check] == ""
