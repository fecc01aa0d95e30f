"""The GPU kernels, against definitions in float64: on a GPU, or on the CPU under Triton's interpreter.

Tolerances: 2e-6 for attention in float32, whose results are of order 1; in bf16 beside it what rounding the weights and
the result to 8 bits can do at most to each number; on a GPU more where products are capped. 1e-5 for log-probabilities,
1e-6 for where one token ends and the next begins.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

if not torch.cuda.is_available():
    if Version(version("triton")) < Version("3.9") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("the interpreter of Triton before 3.9 does not know numpy 2.4", allow_module_level=True)
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Parts of Triton are written in Triton: what was imported without the flag cannot be interpreted.
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]:
        del sys.modules[name]

from tests.test_generation import assert_drawn_from
from training.generation import paged_attention_kernel
from training.generation.interface import SamplingConfig
from training.generation.paged_attention_kernel import choose_splits, paged_attention
from training.generation.sampler import sample_tokens
from training.generation.sampler_kernel import draw_tokens

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN: dict[str, Any] = {"scaling": None, "sliding_window": None, "softcap": None}
LAST_UNIFORM = 1 - 2**-24

# numpy, about infinities and nan that are meant to be there.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def bf16_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bf16 matrices as if they were integers, and cuts where a GPU rounds."""
    if DEVICE.type == "cuda":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(numbers: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(numbers, source, target, mode)
        contiguous = np.ascontiguousarray(numbers).view(np.float32)
        return torch.from_numpy(contiguous).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def widened(matrix: Any) -> Any:
        if matrix.dtype.scalar != tl.bfloat16:
            return matrix
        bits = torch.from_numpy(np.ascontiguousarray(matrix.data).view(np.int16))
        return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)

    def product(builder: Any, left: Any, right: Any, *others: Any) -> Any:
        return dot(builder, widened(left), widened(right), *others)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)


# Attention


class Rows:
    """Random rows of given lengths in a pool of shuffled pages; whatever no row holds is nan."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        page_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        shared_pages: int = 0,
        seed: int | None = 0,
    ) -> None:
        """The first `shared_pages` pages of all rows are the same ones."""
        self.seed = torch.seed() if seed is None else seed
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.query = normal(len(lengths), heads, head_dim)
        needed = [math.ceil(length / page_tokens) for length in lengths]
        pages = sum(needed) + 3
        order = torch.randperm(pages, generator=generator).tolist()
        common = [order.pop() for _ in range(shared_pages)]
        poisoned = order.pop()
        shape = (pages, page_tokens, kv_heads, head_dim)
        self.keys, self.values = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
        self.page_table = torch.full((len(lengths), max(needed) + 1), poisoned, dtype=torch.int32)
        written = set()
        for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            own = [common[i] if i < shared_pages else order.pop() for i in range(count)]
            self.page_table[row, :count] = torch.tensor(own, dtype=torch.int32)
            for i, page in enumerate(own):
                if page not in written:
                    used = page_tokens if i < shared_pages else min(page_tokens, length - i * page_tokens)
                    self.keys[page, :used] = normal(used, kv_heads, head_dim)
                    self.values[page, :used] = normal(used, kv_heads, head_dim)
                    written.add(page)

    def to_device(self) -> list[Tensor]:
        return [part.to(DEVICE) for part in (self.query, self.keys, self.values, self.page_table, self.lengths)]

    def attend(self, splits: int | None = None, **options: Any) -> Tensor:
        tensors = self.to_device()
        poison_free_memory()
        return paged_attention(*tensors, **(PLAIN | options), splits=splits).cpu()

    def expected(self, absolute: bool = False, **options: Any) -> Tensor:
        """By definition, one row and head at a time; `absolute` takes the values' absolute values."""
        settings = PLAIN | options
        scaling = settings["scaling"] or self.query.shape[-1] ** -0.5
        group = self.query.shape[1] // self.keys.shape[2]
        result = torch.zeros(self.query.shape, dtype=torch.float64)
        for row, length in enumerate(self.lengths.tolist()):
            window = settings["sliding_window"] or length
            tokens = torch.arange(max(0, length - window), length)
            if not len(tokens):
                continue
            pages, places = self.page_table[row, tokens // self.keys.shape[1]].long(), tokens % self.keys.shape[1]
            for head in range(self.query.shape[1]):
                keys = self.keys[pages, places, head // group].double()
                values = self.values[pages, places, head // group].double()
                products = keys @ self.query[row, head].double() * scaling
                if settings["softcap"] is not None:
                    products = settings["softcap"] * torch.tanh(products / settings["softcap"])
                result[row, head] = products.softmax(0) @ (values.abs() if absolute else values)
        return result

    def check(self, splits: int | None = None, **options: Any) -> None:
        found, expected = self.attend(splits, **options), self.expected(**options)
        assert found.dtype == self.query.dtype
        allowed = torch.full_like(expected, 2e-6)
        if self.query.dtype == torch.bfloat16:
            by_weights = 2**-8 * self.expected(absolute=True, **options)
            allowed += by_weights + 2**-8 * (expected.abs() + by_weights)
        if DEVICE.type == "cuda" and options.get("softcap") is not None:
            # A GPU's exp2 and division are good to 2^-22, which the cap multiplies, in a weight and in their sum.
            allowed += 4 * 2**-22 * options["softcap"] * self.expected(absolute=True, **options)
        difference = (found.double() - expected).abs()
        assert (difference <= allowed).all(), (self.seed, difference.max())  # nan is not


def poison_free_memory() -> None:
    """What is allocated next holds nan on a GPU, not by chance an earlier and right result."""
    if DEVICE.type == "cuda":
        freed = [torch.full((2**size,), torch.nan, device=DEVICE) for size in range(6, 24)]
        torch.cuda.synchronize()
        del freed


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 2), (8, 1), (17, 1)])
def test_query_heads_share_the_keys_of_their_group(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    Rows([20, 5], heads=heads, kv_heads=kv_heads, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 128, 256])
def test_heads_of_any_width(head_dim: int, dtype: torch.dtype) -> None:
    Rows([19], heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype).check()


@pytest.mark.parametrize(("page_tokens", "head_dim"), [(16, 8), (32, 8), (64, 8), (256, 8), (64, 256)])
def test_pages_of_any_size_and_rows_that_end_anywhere_in_them(page_tokens: int, head_dim: int) -> None:
    """A page of 64 tokens with 256 numbers each is read in several blocks."""
    lengths = [1, page_tokens - 1, page_tokens, page_tokens + 1, 0, 3 * page_tokens + 7]
    Rows(lengths, page_tokens=page_tokens, head_dim=head_dim, heads=2, kv_heads=1).check()


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 33, 1000])
def test_a_sliding_window_counts_the_own_token(window: int, splits: int) -> None:
    Rows([1, 16, 17, 50], kv_heads=1).check(splits, sliding_window=window)


def test_pages_before_the_sliding_window_are_not_read() -> None:
    rows = Rows([70])
    expected = rows.attend(splits=2, sliding_window=20)
    rows.keys[rows.page_table[0, :3].long()] = torch.nan  # tokens 0 to 47; token 50 is the first that is seen
    rows.values[rows.page_table[0, :3].long()] = torch.nan
    rows.page_table[0, :3] = 2**30
    assert torch.equal(rows.attend(splits=2, sliding_window=20), expected)
    rows.check(splits=2, sliding_window=20)


def test_pages_behind_a_rows_end_are_not_read() -> None:
    rows = Rows([16, 33, 0])
    for row, used in enumerate([1, 3, 0]):
        rows.page_table[row, used:] = 2**30
    rows.check(splits=1)
    rows.check(splits=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0])
def test_products_are_capped(scale: float, dtype: torch.dtype) -> None:
    """From where the cap is hardly felt to where it binds."""
    rows = Rows([20, 3], dtype=dtype)
    rows.query *= scale
    rows.check(softcap=5.0)
    rows.check(softcap=5.0, scaling=0.3, sliding_window=4, splits=2)


def test_products_are_scaled() -> None:
    Rows([20, 3]).check(scaling=0.7)


def test_products_too_large_for_exp_are_no_nan() -> None:
    rows = Rows([40, 2])
    rows.query *= 1000
    rows.query = rows.query.round()  # so that products of thousands are exact enough
    rows.keys = (rows.keys * 4).round() / 4
    rows.check(splits=1, scaling=0.5)
    rows.check(splits=4, scaling=0.5)
    rows.check(softcap=50.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_share_pages(dtype: torch.dtype) -> None:
    rows = Rows([70, 40, 33], shared_pages=2, dtype=dtype)
    assert (rows.page_table[:, :2] == rows.page_table[0, :2]).all()
    rows.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [2, 4, 16])
def test_splits_are_combined(splits: int, dtype: torch.dtype) -> None:
    """Also where there are more of them than blocks of tokens."""
    Rows([100, 33, 1, 0], dtype=dtype).check(splits)


def test_a_row_without_tokens_gives_zeros() -> None:
    for splits in (1, 2):
        for window in (None, 3):
            found = Rows([0, 5, 0]).attend(splits, sliding_window=window)
            assert (found[[0, 2]] == 0).all()
            assert (found[1] != 0).all()


@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_does_not_depend_on_its_neighbours(splits: int) -> None:
    """To the bit, whatever the batch and the width of the page table."""
    rows = Rows([70, 18, 45])
    together = rows.attend(splits)
    alone = Rows([1])
    alone.keys, alone.values = rows.keys, rows.values
    for row, pages in enumerate([5, 2, 3]):
        alone.query, alone.lengths = rows.query[row : row + 1], rows.lengths[row : row + 1]
        alone.page_table = rows.page_table[row : row + 1, :pages].contiguous()
        assert torch.equal(alone.attend(splits)[0], together[row])


def test_queries_may_have_any_strides() -> None:
    rows = Rows([20, 5, 33])
    expected = rows.attend()
    apart = torch.full((4, 16, 7), torch.nan)  # [heads, head_dim, rows]: no stride is 1
    apart[:, :, 1:4] = rows.query.permute(1, 2, 0)
    rows.query = apart.permute(2, 0, 1)[1:4]
    assert rows.query.stride(2) != 1
    assert torch.equal(rows.attend(), expected)


def test_keys_may_lie_beside_values_in_one_pool() -> None:
    rows = Rows([20, 5, 33])
    expected = rows.attend()
    tensors = rows.to_device()
    pool = torch.stack([tensors[1], tensors[2]], dim=1)
    found = paged_attention(tensors[0], pool[:, 0], pool[:, 1], tensors[3], tensors[4], **PLAIN)
    assert torch.equal(found.cpu(), expected)


def test_a_pool_may_hold_more_than_2_to_31_numbers() -> None:
    """Only the pages that are written take memory on a CPU."""
    rows = Rows([20], dtype=torch.bfloat16, heads=2, kv_heads=1)
    query, keys, values, page_table, lengths = rows.to_device()
    large = [torch.empty(2**23 + 2, 16, 1, 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for target, source in zip(large, (keys, values), strict=True):
        target[2**23 :] = source[page_table[0, :2].long()]
    far = torch.tensor([[2**23, 2**23 + 1]], dtype=torch.int32, device=DEVICE)
    found = paged_attention(query, large[0], large[1], far, lengths, **PLAIN)
    assert torch.equal(found.cpu(), rows.attend())


@pytest.mark.parametrize(
    ("rows", "kv_heads", "max_tokens", "splits"),
    [
        (256, 8, 4096, 1),  # 2048 programs are more than the 4 x 132 that are wanted
        (66, 8, 4096, 1),  # as many as that
        (65, 8, 4096, 2),
        (32, 8, 4096, 4),  # 528 / 256 = 2.06
        (1, 8, 65536, 64),  # 528 / 8 = 66, but 64 are the most
        (1, 8, 2048, 16),  # 128 tokens to a split
        (1, 8, 2047, 8),
        (1, 8, 128, 1),
        (1, 1, 16, 1),
    ],
)
def test_splits_fill_the_device_and_are_not_too_short(rows: int, kv_heads: int, max_tokens: int, splits: int) -> None:
    assert choose_splits(rows, kv_heads, max_tokens, multiprocessors=132) == splits


def test_without_a_choice_the_splits_are_those_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(*sizes: int) -> int:
        asked.append(sizes)
        return 2

    monkeypatch.setattr(paged_attention_kernel, "choose_splits", choose)
    monkeypatch.setattr(paged_attention_kernel, "num_multiprocessors", lambda device: 132)
    Rows([70, 18, 45]).check()
    assert asked == [(3, 2, 6 * 16, 132)]  # 5 pages for the longest row, and one that none of them uses


# The sampler


def draw(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    logits, uniforms = logits.to(DEVICE), uniforms.to(DEVICE)
    poison_free_memory()
    tokens, logprobs = draw_tokens(logits, uniforms, temperature)
    assert (tokens.dtype, logprobs.dtype) == (torch.long, torch.float32)
    return tokens.cpu(), logprobs.cpu()


def assert_draws_are_defined(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> None:
    """Each token's share of the unit interval holds its uniform, up to 1e-6 at both ends."""
    tokens, logprobs = draw(logits, uniforms, temperature)
    for row, token in enumerate(tokens.tolist()):
        expected = (logits[row].double() / temperature).log_softmax(-1)
        ends = expected.exp().cumsum(-1)
        assert expected[token] > -torch.inf
        assert ends[token] - expected[token].exp() - 1e-6 <= uniforms[row] < ends[token] + 1e-6
        assert abs(logprobs[row] - expected[token]) < 1e-5


def random_rows(rows: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * 3, torch.rand(rows, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 1000, 4096, 4097, 10_000])
def test_a_draw_inverts_the_cumulative_distribution(vocab: int, temperature: float, dtype: torch.dtype) -> None:
    logits, uniforms = random_rows(6, vocab)
    assert_draws_are_defined(logits.to(dtype), uniforms, temperature)


def test_the_kernel_draws_the_tokens_of_the_plain_sampler() -> None:
    logits, uniforms = random_rows(60, 3000, seed=1)
    ends = (logits.double() / 0.7).softmax(-1).cumsum(-1)
    assert ((ends - uniforms[:, None]).abs().amin(-1) > 1e-7).all()
    expected_tokens, expected_logprobs = sample_tokens(logits, uniforms, SamplingConfig(temperature=0.7))
    tokens, logprobs = draw(logits, uniforms, 0.7)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", [-3e4, 0.0, 3e4])
def test_logits_may_be_far_from_zero(offset: float) -> None:
    logits, uniforms = random_rows(4, 600)
    assert_draws_are_defined((logits + offset).round(decimals=2), uniforms)


@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST_UNIFORM, 1.0])  # 1.0 is what rounding may make of the last one
@pytest.mark.parametrize("vocab", [300, 5000])
def test_a_token_that_is_ruled_out_is_never_drawn(vocab: int, uniform: float) -> None:
    """At the start, at the end, between others, and whole blocks of them."""
    logits, _ = random_rows(6, vocab)
    logits[0, :-1] = -torch.inf
    logits[1, 1:] = -torch.inf
    logits[2, : vocab // 2] = -torch.inf
    logits[3, vocab // 2 :] = -torch.inf
    logits[4, 1::2] = -torch.inf
    logits[5, :280] = logits[5, 281:] = -torch.inf
    tokens, logprobs = draw(logits, torch.full((6,), uniform))
    assert (logits.gather(1, tokens[:, None]) > -torch.inf).all()
    assert logprobs.isfinite().all()
    assert tokens[[0, 1, 5]].tolist() == [vocab - 1, 0, 280]
    assert logprobs[[0, 1, 5]].tolist() == [0.0, 0.0, 0.0]
    if uniform == 0:
        assert tokens.tolist() == [vocab - 1, 0, vocab // 2, 0, 0, 280]


def test_the_last_draw_is_not_past_the_last_token() -> None:
    """Each small weight is 3/4 of what 1 can grow by in float32, so the sum over the block is too large."""
    logits = torch.full((1, 256), math.log(0.75 * 2**-23))
    logits[0, 0] = 0.0
    logits[0, 200:] = -torch.inf
    tokens, _ = draw(logits, torch.tensor([LAST_UNIFORM]))
    assert 190 <= int(tokens) < 200


def test_a_row_with_nan_names_a_token_of_the_vocabulary() -> None:
    """A row of a batch that nobody uses may hold anything; what it draws is looked up in the embedding."""
    logits, _ = random_rows(3, 300)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 290] = torch.nan
    tokens, _ = draw(logits, torch.tensor([0.0, 0.5, LAST_UNIFORM]))
    assert ((tokens >= 0) & (tokens < 300)).all()


def test_tokens_come_as_often_as_they_should() -> None:
    """G3"""
    logits, _ = random_rows(1, 300, seed=2)
    uniforms = torch.rand(600, generator=torch.Generator().manual_seed(3))
    tokens, _ = draw(logits.expand(600, 300), uniforms, 0.7)
    counts = Counter(tokens.tolist())
    assert_drawn_from(counts, (logits[0].double() / 0.7).softmax(-1).tolist())
    with pytest.raises(AssertionError):
        assert_drawn_from(counts, (logits[0].double() / 1.0).softmax(-1).tolist())


def test_rows_of_logits_may_lie_apart() -> None:
    logits, uniforms = random_rows(4, 700)
    expected, _ = draw(logits[:, :300].contiguous(), uniforms)
    assert draw(logits[:, :300], uniforms)[0].tolist() == expected.tolist()


# On a GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (8, 1, 256), (14, 2, 64), (32, 32, 80)])
def test_attention_on_a_gpu(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Other numbers at each run."""
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_tokens": 64}
    rows = Rows([1, 700, 64, 65, 0, 1999], dtype=dtype, shared_pages=1, seed=None, **sizes)
    for splits in (None, 1, 8):
        rows.check(splits)
    rows.check(sliding_window=100, softcap=30.0, scaling=0.2)


@pytest.mark.gpu
def test_the_sampler_on_a_gpu() -> None:
    """Other numbers at each run."""
    logits, uniforms = torch.randn(64, 128_256) * 2, torch.rand(64)
    assert_draws_are_defined(logits.bfloat16(), uniforms)
    assert_draws_are_defined(logits, uniforms, 0.7)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 4])
def test_a_cuda_graph_follows_lengths_and_pages(splits: int) -> None:
    """What is captured holds for whatever the buffers hold at each replay."""
    first, second = Rows([100, 33, 1, 0], seed=None), Rows([17, 0, 90, 112], seed=None)
    second.keys, second.values = first.keys, first.values
    second.page_table = first.page_table[0, :6][torch.randint(6, second.page_table.shape)]  # pages without nan
    buffers = first.to_device()
    paged_attention(*buffers, **PLAIN, splits=splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = paged_attention(*buffers, **PLAIN, splits=splits)
    for rows in (second, first):
        for buffer, new in zip(buffers, rows.to_device(), strict=True):
            buffer.copy_(new)
        output.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(output.cpu().double(), rows.expected(), rtol=0, atol=2e-6)


# Compiled without a GPU


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the benchmark reports of the smallest set of kernels, in a process that does not interpret."""
    folder = tmp_path_factory.mktemp("kernels")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    options = ["--head-dims", "128", "--groups", "4", "--output", str(folder / "kernels.json")]
    command = [sys.executable, "-m", "scripts.benchmark.kernels", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    yield json.loads((folder / "kernels.json").read_text()) | {"printed": done.stdout}


def test_every_kernel_compiles_for_hopper_and_spills_no_register(compiled: dict[str, Any]) -> None:
    kernels = {one["kernel"] for one in compiled["kernels"]}
    assert kernels == {"attend_kernel", "combine_kernel", "summarize_kernel", "draw_kernel"}
    for one in compiled["kernels"]:
        assert 8 < one["registers"] < 255
        assert one["spilled_bytes"] == 0
        assert one["shared_bytes"] > 0
    assert "no GPU" in compiled["printed"]


def test_the_interpreter_is_refused_by_the_benchmark() -> None:
    command = [sys.executable, "-m", "scripts.benchmark.kernels"]
    environment = dict(os.environ) | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
