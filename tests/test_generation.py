"""Sampling: the tokens, their log-probabilities and their distribution, against transformers and by definition."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from tests.test_models import randomize_adapters
from tests.tiny_models import CONFIGS
from tests.tiny_tokenizers import EOS, NUM_SPECIAL, PAD, VOCAB_SIZE
from training.config import EngineConfig, LoraConfig, ModelConfig, OptimConfig
from training.data import collate
from training.engine import backward_and_step, generation_mode, train_engine
from training.forward import response_logprobs
from training.generation import native as native_module
from training.generation.attention_hook import attention_through
from training.generation.backends import GENERATORS
from training.generation.decoder import Decoder, bucket_of, flat_forward
from training.generation.interface import Completion, Endings, Generator, SamplingConfig
from training.generation.kv_cache import SlotCache
from training.generation.lean_layers import _as_one, _projection, lean_layers
from training.generation.native import NativeGenerator, follows_the_hook
from training.generation.paged_cache import PagedCache
from training.generation.responses import Responses
from training.generation.sampler import restrict, sample_tokens
from training.models import load_causal_lm

ARCHITECTURES = sorted(CONFIGS)
GREEDY = SamplingConfig(max_new_tokens=64, temperature=0.0)


TinyModel = Callable[[str], str]
MakeGenerator = Callable[..., Generator]


# The paged one looks at which rows have ended every three steps, as it does on a GPU.
BACKENDS: dict[str, Callable[..., Generator]] = GENERATORS | {
    "native-paged": partial(NativeGenerator, paged=True, steps_unseen=3)
}


@pytest.fixture(params=sorted(BACKENDS))
def generator_of(request: pytest.FixtureRequest) -> MakeGenerator:
    """Every test below holds for every backend."""

    def make(
        module: nn.Module,
        eos_ids: Sequence[int] = (EOS,),
        batch_size: int = 8,
        stop_sequences: Sequence[Sequence[int]] = (),
    ) -> Generator:
        @contextlib.contextmanager
        def open_module() -> Iterator[nn.Module]:
            with torch.no_grad():
                yield module

        generator = BACKENDS[request.param](open_module, Endings.of(eos_ids, stop_sequences), batch_size)
        if isinstance(generator, NativeGenerator):
            if isinstance(module, Chain):
                generator.takes_the_hook = True  # it has no attention at all
            else:
                with torch.no_grad():
                    assert follows_the_hook(module)  # else the other backend would be tested
        return generator

    return make


def load(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(NUM_SPECIAL, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = prompts(3, 17, 1, 9, 12)
SEEDS = [101, 102, 103, 104, 105]


# Against transformers


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "phi3"])
def test_greedy_tokens_are_those_of_transformers(
    tiny_model: TinyModel, architecture: str, generator_of: MakeGenerator
) -> None:
    """G1, F2: 64 tokens, prompts of unequal length, one by one on the other side; also beyond a sliding window."""
    model: Any = load(tiny_model(architecture))
    completions = generator_of(model).generate(PROMPTS, GREEDY, SEEDS)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[0, len(prompt) :].tolist()
        assert completion.response_ids == expected
    assert max(len(completion.response_ids) for completion in completions) == 64
    assert len({tuple(completion.response_ids) for completion in completions}) == len(PROMPTS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "phi3"])
def test_the_samplers_logprobs_are_the_trainers(
    tiny_model: TinyModel, architecture: str, temperature: float, generator_of: MakeGenerator
) -> None:
    """G2, F1, F6: sampled with padding on the left and a cache, scored with padding on the right and at once."""
    model = load(tiny_model(architecture))
    sampling = SamplingConfig(max_new_tokens=40, temperature=temperature)
    completions = generator_of(model).generate(PROMPTS, sampling, SEEDS)
    rows = [
        (prompt + c.response_ids, [False] * len(prompt) + [True] * len(c.response_ids))
        for prompt, c in zip(PROMPTS, completions, strict=True)
    ]
    batch = collate(rows, PAD)
    with torch.no_grad():
        logprobs, _ = response_logprobs(model, batch, temperature)
    assert len({token for c in completions for token in c.response_ids}) > 20
    sampled = torch.tensor([logprob for c in completions for logprob in c.logprobs])
    torch.testing.assert_close(logprobs[batch.response_mask], sampled, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)], ids=["whole", "adapters"])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_new_weights_are_used_after_a_step(
    tiny_model: TinyModel, zero_stage: Any, lora: LoraConfig, backend: str
) -> None:
    """G4"""
    config = EngineConfig(zero_stage=zero_stage, precision="fp32")
    loaded = load_causal_lm(ModelConfig(path=tiny_model("llama"), lora=lora), torch.float32)
    randomize_adapters(loaded)
    optim = OptimConfig(lr=0.03, warmup_fraction=0.0)
    engine = train_engine(loaded, config, optim, train_batch_size=1, total_steps=10)
    device = next(engine.module.parameters()).device
    generator = BACKENDS[backend](lambda: generation_mode(engine), Endings.of([EOS]), batch_size=8)
    before = generator.generate(PROMPTS, GREEDY, SEEDS)
    backward_and_step(engine, engine(input_ids=torch.tensor([PROMPTS[1]], device=device)).logits[..., 7].sum())
    after = generator.generate(PROMPTS, GREEDY, SEEDS)
    assert after != before
    ids = torch.tensor([PROMPTS[0]], device=device)
    with torch.no_grad():
        first = engine(input_ids=ids).logits[0, -1].argmax()  # by the trained weights, adapters not merged
    assert after[0].response_ids[0] == int(first)


# The native backend


def native(module: nn.Module, batch_size: int = 8, **options: Any) -> Any:
    @contextlib.contextmanager
    def open_module() -> Iterator[nn.Module]:
        with torch.no_grad():
            yield module

    return NativeGenerator(open_module, Endings.of([EOS]), batch_size, **options)


@pytest.mark.parametrize("architecture", ["gptj", "bloom", "falcon"])
def test_an_architecture_that_ignores_the_hook_is_served_by_hf(
    tiny_model: TinyModel, architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = load(tiny_model(architecture))
    generator = native(model)
    (first, _) = generator.generate(PROMPTS[:2], GREEDY, SEEDS[:2])
    generator.generate(PROMPTS[:2], GREEDY, SEEDS[:2])
    expected = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=64, do_sample=False, eos_token_id=EOS)
    assert first.response_ids == expected[0, len(PROMPTS[0]) :].tolist()
    assert [record.message for record in caplog.records] == [
        "the native rollout backend cannot serve this architecture: hf does"
    ]


def test_attention_that_the_hook_does_not_know_is_found_out(tiny_model: TinyModel) -> None:
    """As where a layer adds something to its attention that is not among the arguments."""
    model: Any = load(tiny_model("llama"))
    with torch.no_grad():
        assert follows_the_hook(model)
        model.model.layers[1].self_attn.layer_idx = 0  # both layers would share one cache
        assert not follows_the_hook(model)


def test_rounding_in_a_deep_model_is_not_taken_for_another_attention() -> None:
    """In 16 bits the largest of many thousand differences is a quarter of the logits' deviation and more."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 8000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 30}
    config = LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert follows_the_hook(model)
        model.model.layers[1].self_attn.layer_idx = 0
        assert not follows_the_hook(model)


def test_the_check_of_the_hook_fits_into_a_model_of_few_positions() -> None:
    sizes = {"vocab_size": 5, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=3)
    gpt2 = GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=2, n_positions=3)
    for model in (AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(gpt2)):
        with torch.no_grad():
            assert follows_the_hook(model.eval())


def test_the_modules_own_attention_is_back_after_a_rollout(tiny_model: TinyModel) -> None:
    """Also after one that was cut short."""
    model: Any = load(tiny_model("llama"))
    before = model.config._attn_implementation
    native(model).generate(PROMPTS[:1], SamplingConfig(max_new_tokens=2), SEEDS[:1])
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError):
        native(model).generate([[]], SamplingConfig(max_new_tokens=2), [1])
    with pytest.raises(IndexError):  # no such token
        native(model).generate([[VOCAB_SIZE + 5]], SamplingConfig(max_new_tokens=2), [1])
    assert model.config._attn_implementation == before
    assert native(model).generate(PROMPTS[:1], GREEDY, SEEDS[:1])


def test_equal_prompts_are_computed_once(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_model("llama"))
    seen: list[int] = []
    inside = model.forward

    def watched(**inputs: Any) -> Any:
        seen.append(inputs["input_ids"].numel())
        return inside(**inputs)

    monkeypatch.setattr(model, "forward", watched)
    generator = native(model, batch_size=3)
    generator.takes_the_hook = True
    generator.endings = Endings.of([])
    completions = generator.generate([PROMPTS[1]] * 5, SamplingConfig(max_new_tokens=4), SEEDS)
    assert len({tuple(completion.response_ids) for completion in completions}) == 5
    # Three rows of one prompt; when they are done, the other two.
    assert seen == [17, 3, 3, 3, 17, 2, 2, 2]


def test_a_waiting_prompt_takes_the_place_of_a_row_that_ends() -> None:
    class Counted(Chain):
        def forward(self, input_ids: Tensor, logits_to_keep: int | Tensor, **others: Any) -> SimpleNamespace:
            seen.append(input_ids.shape[1])
            return super().forward(input_ids, logits_to_keep, **others)

    seen: list[int] = []
    generator = native(Counted(COUNTING.table.detach()), batch_size=2)
    generator.takes_the_hook = True
    generator.endings = Endings.of([7])
    completions = generator.generate([[1], [5], [4, 4], [6]], SamplingConfig(max_new_tokens=9), SEEDS[:4])
    assert [len(completion.response_ids) for completion in completions] == [6, 2, 3, 1]
    # Both first prompts; both rows, of which the second ends; its place is taken by a prompt of two tokens; ...
    assert seen == [2, 2, 1 + 2, 2, 2, 1 + 1]


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
def test_rows_that_memory_has_no_room_for_wait_and_none_is_lost(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, paged: bool
) -> None:
    model = load(tiny_model("llama"))
    sampling = SamplingConfig(max_new_tokens=8)
    expected = native(model).generate(PROMPTS, sampling, SEEDS)
    # 2 layers x (keys, values) x 2 heads x 8 numbers x 4 bytes = 256 bytes a token; the longest row has 17 + 8, which
    # is one page of 64. One page more is there for rows of no slot.
    row = (64 if paged else 25) * 256 / 2**30
    limited = native(model, cache_gib=2.5 * row, paged=paged)
    assert_same(limited.generate(PROMPTS, sampling, SEEDS), expected)
    assert limited.metrics() == {"rollout/kv_cache_gib": (2 + paged) * row, "rollout/kv_cache_peak": 1.0}
    limited.generate(PROMPTS, sampling, SEEDS)
    (told,) = (record.message for record in caplog.records)
    assert told == f"2 of 5 rows fit into kv_cache_gib {2.5 * row:g}: the others wait"
    with pytest.raises(ValueError, match=f"a row of 25 tokens needs {row:.3g}: raise it, or lower sampling"):
        native(model, cache_gib=0.5 * row, paged=paged).generate(PROMPTS, sampling, SEEDS)


def test_rows_of_one_prompt_share_the_pages_that_it_fills(tiny_model: TinyModel) -> None:
    """Of 150 tokens, 2 pages of 64 are shared; each row has one of its own for the other 22 tokens and its response."""
    model = load(tiny_model("llama"))
    sampling = SamplingConfig(max_new_tokens=12)
    asked = prompts(150, seed=2) * 3 + prompts(5)
    seeds = [4, 5, 6, 7]
    expected = native(model).generate(asked, sampling, seeds)
    generator = native(model, paged=True)
    assert_same(generator.generate(asked, sampling, seeds), expected)
    assert len({tuple(completion.response_ids) for completion in expected}) == 4
    # Room for four rows of three pages; in use were 2 + 3 and the one of the short row.
    assert generator.metrics()["rollout/kv_cache_peak"] == (2 + 3 + 1) / (4 * 3)
    # All come back, and serve the next rows.
    cache: Any = generator.decoder.cache
    assert sorted(cache.free) == list(range(1, 13))
    assert_same(generator.generate(asked, sampling, seeds), expected)


def test_what_lies_in_free_pages_is_never_seen(tiny_model: TinyModel) -> None:
    """Rows come and go through poisoned memory, of which a page ends within the prompt, one within the response."""
    model = load(tiny_model("llama"))
    sampling = SamplingConfig(max_new_tokens=30)
    asked, seeds = prompts(60, 40, 64, 3, 90, 41), list(range(6))
    expected = native(model).generate(asked, sampling, seeds)
    generator = native(model, batch_size=2, paged=True, steps_unseen=4)
    generator.generate(asked, sampling, seeds)
    with torch.inference_mode():  # as it was made
        for memory in (memory for pair in generator.decoder.cache.layers.values() for memory in pair):
            memory.fill_(1e4)
    assert_same(generator.generate(asked, sampling, seeds), expected)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "phi3"])
def test_a_step_with_pages_reads_nothing_back_from_the_device(tiny_model: TinyModel, architecture: str) -> None:
    """So it can be captured in a CUDA graph; with slots, which are for the CPU, the longest row is read."""
    model = load(tiny_model(architecture))
    sampling = SamplingConfig(max_new_tokens=8, min_new_tokens=2, temperature=0.7)
    endings = Endings.of([EOS], [[3, 4]])
    for cache in (PagedCache(4, 40, 4, torch.device("cpu")), SlotCache(4, 40)):
        decoder = Decoder(model, cache, Responses(4, sampling, endings, torch.device("cpu")), 40)
        with torch.no_grad(), attention_through(model, cache), lean_layers(model, cache, 4):
            assert cache.admit(0, 3, 8, None)
            decoder.responses.start(0, [1], [8])
            decoder.read(0, [(PROMPTS[0], [0])])
            # Tensors without numbers: what asks for one raises.
            with FakeTensorMode(allow_non_fake_inputs=True):
                if isinstance(cache, PagedCache):
                    decoder.decode(3, 1)
                else:
                    with pytest.raises(DataDependentOutputException):
                        decoder.decode(3, 1)


class GraphsOfTheCpu:
    """Stands for `torch.cuda.CUDAGraph`: a capture has no effect, and a replay takes the captured step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, decoder: Any) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []
        own_step = decoder._step
        outside = self

        class Graph:
            rows = 0

            def replay(self) -> None:
                outside.replayed.append(self.rows)
                own_step(self.rows)

            def pool(self) -> None:
                return None

        @contextlib.contextmanager
        def capture(graph: Any, pool: Any) -> Iterator[None]:
            def note(rows: int) -> None:
                graph.rows = rows
                self.captured.append(rows)

            monkeypatch.setattr(decoder, "_step", note)
            yield
            monkeypatch.setattr(decoder, "_step", own_step)

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        decoder.captures = True


def test_a_step_is_captured_once_for_each_number_of_rows(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again when weights have moved. What is replayed draws the same."""
    model = load(tiny_model("llama"))
    asked, seeds = prompts(*range(3, 15), seed=3), list(range(12))
    sampling, limits = SamplingConfig(max_new_tokens=16), [4] * 5 + [16] * 7
    expected = native(model, batch_size=12).generate(asked, sampling, seeds, limits)
    generator = native(model, batch_size=12, paged=True, steps_unseen=3)
    generator.generate(asked, sampling, seeds, limits)
    graphs = GraphsOfTheCpu(monkeypatch, generator.decoder)
    assert_same(generator.generate(asked, sampling, seeds, limits), expected)
    # One token from the prompts, three with 12 rows, then twelve with the 7 that are left, who fill a bucket of 8.
    assert graphs.captured == [12, 8]
    assert graphs.replayed == [12] * 2 + [8] * 11
    assert_same(generator.generate(asked, sampling, seeds, limits), expected)
    assert graphs.captured == [12, 8]
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    changed = native(model, batch_size=12).generate(asked, sampling, seeds, limits)
    assert changed != expected
    assert_same(generator.generate(asked, sampling, seeds, limits), changed)
    assert graphs.captured == [12, 8]
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert_same(generator.generate(asked, sampling, seeds, limits), changed)
    assert graphs.captured == [12, 8, 12, 8]


def test_a_captured_step_may_have_rows_that_have_not_begun(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for 3 of 12 rows: they fill up to a bucket of 8."""
    model = load(tiny_model("llama"))
    asked, seeds, sampling = prompts(*range(3, 15), seed=3), list(range(12)), SamplingConfig(max_new_tokens=8)
    expected = native(model, batch_size=12).generate(asked, sampling, seeds)
    generator = native(model, batch_size=12, paged=True, steps_unseen=3, cache_gib=3 * 64 * 256 / 2**30)
    captured = []

    def with_graphs(*arguments: Any) -> Decoder:
        decoder = Decoder(*arguments)
        captured.append(GraphsOfTheCpu(monkeypatch, decoder).captured)
        return decoder

    monkeypatch.setattr(native_module, "Decoder", with_graphs)
    assert_same(generator.generate(asked, sampling, seeds), expected)
    assert captured == [[8]]


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
def test_a_row_that_is_done_stays_within_its_memory(tiny_model: TinyModel, paged: bool) -> None:
    """It draws on until the next look, here with a row behind which there is no memory at all."""
    model = load(tiny_model("llama"))
    asked, limits, sampling = prompts(3, 60, seed=7), [16, 4], SamplingConfig(max_new_tokens=16)
    expected = native(model).generate(asked, sampling, [1, 2], limits)
    unseen = native(model, paged=paged, steps_unseen=5)
    assert_same(unseen.generate(asked, sampling, [1, 2], limits), expected)


def test_a_step_that_cannot_be_captured_runs_without(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tiny_model("llama"))
    sampling = SamplingConfig(max_new_tokens=8)
    expected = native(model).generate(PROMPTS, sampling, SEEDS)
    generator = native(model, paged=True, steps_unseen=3)
    generator.generate(PROMPTS, sampling, SEEDS)
    GraphsOfTheCpu(monkeypatch, generator.decoder)

    @contextlib.contextmanager
    def refused(graph: Any, pool: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refused)
    for _ in range(2):
        assert_same(generator.generate(PROMPTS, sampling, SEEDS), expected)
    (told,) = (record.message for record in caplog.records)
    assert told.startswith("a decoding step cannot be captured in a CUDA graph and runs without: operation not")


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_deepspeed_lays_the_weights_of_a_layer_side_by_side(
    tiny_model: TinyModel, architecture: str, zero_stage: Any, precision: Any
) -> None:
    """So q, k and v are one product, and gate and up another, on the weights that are trained and without a copy."""
    config = EngineConfig(zero_stage=zero_stage, precision=precision)
    loaded = load_causal_lm(ModelConfig(path=tiny_model(architecture)), torch.float32)
    optim = OptimConfig(lr=0.03, warmup_fraction=0.0)
    engine = train_engine(loaded, config, optim, train_batch_size=1, total_steps=10)
    for layer in engine.module.model.layers:
        attention = layer.self_attn
        for parts in (attention.q_proj, attention.k_proj, attention.v_proj), (layer.mlp.gate_proj, layer.mlp.up_proj):
            weights = [part.weight for part in parts]
            whole = _as_one(weights)
            assert whole is not None and torch.equal(whole, torch.cat(weights))
            biases = [part.bias for part in parts if part.bias is not None]
            assert not biases or _as_one(biases) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "phi3"])
def test_on_a_gpu_pages_kernels_and_graphs_draw_what_the_cpu_draws(
    tiny_model: TinyModel, architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tiny_model(architecture))
    asked = PROMPTS + [prompts(90, seed=5)[0]] * 3
    seeds, sampling = list(range(8)), SamplingConfig(max_new_tokens=40, temperature=0.9)
    expected = native(model).generate(asked, sampling, seeds)
    generator = native(model.cuda())
    for _ in range(2):
        assert_same(generator.generate(asked, sampling, seeds), expected)
    assert generator.decoder.graphs
    assert not caplog.records
    graphs = generator.decoder.graphs
    with torch.no_grad():  # a graph reads what the weights are now
        model.get_output_embeddings().weight.mul_(-1)
    found = generator.generate(asked, sampling, seeds)
    assert generator.decoder.graphs is graphs
    assert_same(found, native(model.cpu()).generate(asked, sampling, seeds))


@pytest.mark.parametrize(("rows", "bucket"), [(1, 8), (8, 8), (9, 16), (33, 64), (97, 100), (100, 100)])
def test_rows_are_rounded_up_to_a_captured_number(rows: int, bucket: int) -> None:
    assert bucket_of(rows, slots=100) == bucket


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
def test_a_rollout_that_was_cut_short_leaves_nothing_behind(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, paged: bool
) -> None:
    model = load(tiny_model("llama"))
    sampling = SamplingConfig(max_new_tokens=8)
    generator = native(model, paged=paged)
    expected = generator.generate(PROMPTS, sampling, SEEDS)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generator.generate(PROMPTS, sampling, SEEDS)
    assert_same(generator.generate(PROMPTS, sampling, SEEDS), expected)


def test_memory_is_kept_between_calls_until_sleep(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"))
    sampling = SamplingConfig(max_new_tokens=8)
    generator = native(model)
    expected = generator.generate(PROMPTS, sampling, SEEDS)
    kept = generator.decoder
    assert_same(generator.generate(PROMPTS[:3], sampling, SEEDS[:3]), expected[:3])
    assert generator.decoder is kept
    generator.sleep()
    assert generator.decoder is None
    assert generator.generate(PROMPTS, sampling, SEEDS) == expected
    kept = generator.decoder
    generator.generate(prompts(40), sampling, [1])  # a longer row
    assert generator.decoder is not kept
    sleepy = native(model, keep_cache=False)
    assert_same(sleepy.generate(PROMPTS, sampling, SEEDS), expected)
    assert sleepy.decoder is None
    assert sleepy.metrics()["rollout/kv_cache_gib"] > 0


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_lean_layers_compute_what_the_modules_do(tiny_model: TinyModel, architecture: str) -> None:
    """And the modules are as before when they leave."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32)
    layer = type(model.model.layers[0])
    calls = 0

    def counted(*inputs: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return own(*inputs, **options)

    own, layer.forward = layer.forward, counted
    try:
        expected, found = (decoded(model, lean) for lean in (False, True))
        assert calls == 2 * 2  # two layers, two forwards, none of them lean
    finally:
        layer.forward = own
    assert not any("forward" in part.__dict__ for part in model.modules())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_lean_layers_in_bf16_are_as_near_to_float32_as_the_modules(tiny_model: TinyModel, architecture: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.bfloat16)
    modules, lean = (decoded(model, lean).float() for lean in (False, True))
    exact = decoded(model.float(), lean=False)
    assert 0 < (lean - exact).abs().mean() < 1.2 * (modules - exact).abs().mean()


@torch.no_grad()
def decoded(model: Any, lean: bool) -> Tensor:
    """Logits after a prompt, and after another token."""
    cache = SlotCache(slots=1, capacity=20)
    with attention_through(model, cache), lean_layers(model, cache, 1) if lean else contextlib.nullcontext():
        none = torch.zeros(0, dtype=torch.long)
        first = flat_forward(model, cache, none, none, [(PROMPTS[1], [0])])
        return torch.cat([first, flat_forward(model, cache, torch.tensor([9]), torch.tensor([17]), [])])


def test_weights_that_lie_side_by_side_are_multiplied_at_once(tiny_model: TinyModel) -> None:
    """As DeepSpeed lays them; a step of the optimizer is seen through the view, and nothing is copied."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"), dtype=torch.float32)  # it has biases
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(3, parts[0].in_features)
    apart = _projection(parts, 3)
    for name in ("weight", "bias"):
        flat = torch.cat([getattr(part, name).detach().flatten() for part in parts])
        for part, own in zip(parts, flat.split([getattr(part, name).numel() for part in parts]), strict=True):
            getattr(part, name).data = own.view_as(getattr(part, name))
    whole = _as_one([part.weight for part in parts])
    assert whole is not None and whole.data_ptr() == parts[0].weight.data_ptr()
    together = _projection(parts, 3)
    with torch.no_grad():
        torch.testing.assert_close(together(x), apart(x), rtol=1e-6, atol=1e-6)
        parts[1].weight.zero_()
        parts[2].bias.add_(1)
        torch.testing.assert_close(together(x), torch.cat([part(x) for part in parts], dim=-1), rtol=1e-6, atol=1e-6)
    assert _as_one([parts[0].weight, parts[2].weight]) is None
    assert _as_one([parts[1].weight, parts[0].weight]) is None


# Rows, seeds and ends, on a model of a few words that is written down as a table


class Chain(nn.Module):
    """A language model in which the next token depends on the last one alone, by a table of logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, logits_to_keep: int | Tensor, **_: Any) -> SimpleNamespace:
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(logits=self.table[input_ids[:, keep]])


def always(successors: dict[int, int], size: int = 8) -> Chain:
    """After each token the one that `successors` names, with certainty."""
    logits = torch.full((size, size), -1e4)
    for last, following in successors.items():
        logits[last, following] = 0.0
    return Chain(logits)


COUNTING = always({i: (i + 1) % 8 for i in range(8)})  # 0 1 2 3 4 5 6 7 0 1 ...


def test_eos_ends_a_row_and_is_part_of_it(generator_of: MakeGenerator) -> None:
    """F5"""
    sampling = SamplingConfig(max_new_tokens=10)
    completions = generator_of(COUNTING, eos_ids=[5]).generate([[0], [3, 3], [4]], sampling, [1, 2, 3])
    assert completions == [
        Completion([1, 2, 3, 4, 5], [0.0] * 5, True),
        Completion([4, 5], [0.0] * 2, True),
        Completion([5], [0.0], True),
    ]


def test_a_row_that_fills_the_limit_is_not_finished(generator_of: MakeGenerator) -> None:
    """F5, K7"""
    sampling = SamplingConfig(max_new_tokens=3)
    (long, exact) = generator_of(COUNTING, eos_ids=[5]).generate([[0], [2]], sampling, [1, 2])
    assert long == Completion([1, 2, 3], [0.0] * 3, False)
    assert exact == Completion([3, 4, 5], [0.0] * 3, True)


def test_any_of_several_eos_ids_ends_a_row(generator_of: MakeGenerator) -> None:
    sampling = SamplingConfig(max_new_tokens=10)
    completions = generator_of(COUNTING, eos_ids=[5, 2]).generate([[0], [3]], sampling, [1, 2])
    assert [completion.response_ids for completion in completions] == [[1, 2], [4, 5]]
    assert all(completion.finished for completion in completions)


def test_an_eos_in_the_prompt_ends_nothing(generator_of: MakeGenerator) -> None:
    (completion,) = generator_of(COUNTING, eos_ids=[5]).generate([[5]], SamplingConfig(max_new_tokens=3), [1])
    assert completion == Completion([6, 7, 0], [0.0] * 3, False)


def test_no_eos_is_drawn_before_the_shortest_length(generator_of: MakeGenerator) -> None:
    logits = torch.full((4, 4), -1e4)
    logits[:, 2], logits[:, 3], logits[:, 1] = 0.0, 0.0, -20.0  # 2 and 3 end; 1 is all but impossible
    chain = Chain(logits)
    for shortest in (0, 1, 4):
        sampling = SamplingConfig(max_new_tokens=6, min_new_tokens=shortest)
        for completion in generator_of(chain, eos_ids=[2, 3]).generate([[0]] * 20, sampling, list(range(20))):
            assert completion.response_ids[:-1] == [1] * shortest
            assert completion.response_ids[-1] in (2, 3)
            # The log-probability is the one of what was drawn from: with EOS ruled out, token 1 was certain.
            assert completion.logprobs == pytest.approx([0.0] * shortest + [math.log(0.5)], abs=1e-6)


def test_a_stop_sequence_ends_a_row_and_is_part_of_it(generator_of: MakeGenerator) -> None:
    # The last one never comes: its tokens do, in another order.
    generator = generator_of(COUNTING, eos_ids=[7], stop_sequences=[[3, 4], [6], [5, 4]])
    completions = generator.generate([[0], [3], [5], [6]], SamplingConfig(max_new_tokens=10), [1, 2, 3, 4])
    assert completions == [
        Completion([1, 2, 3, 4], [0.0] * 4, True),
        Completion([4, 5, 6], [0.0] * 3, True),  # the 3 of the prompt is no part of the response
        Completion([6], [0.0], True),
        Completion([7], [0.0], True),
    ]


def test_each_row_may_have_its_own_limit(generator_of: MakeGenerator) -> None:
    generator = generator_of(COUNTING, eos_ids=[5], batch_size=2)
    sampling = SamplingConfig(max_new_tokens=8)
    completions = generator.generate([[0], [0], [0], [6]], sampling, [1, 2, 3, 4], [2, 8, 1, 3])
    assert [completion.response_ids for completion in completions] == [[1, 2], [1, 2, 3, 4, 5], [1], [7, 0, 1]]
    assert [completion.finished for completion in completions] == [False, True, False, False]


def test_whoever_waits_is_told_of_rows_as_they_end(generator_of: MakeGenerator) -> None:
    """Row 2 after one token, rows 0 and 3 after two, row 1 after five."""
    generator = generator_of(COUNTING, eos_ids=[5], batch_size=4)
    told: list[tuple[list[int], list[Completion]]] = []
    completions = generator.generate(
        [[0], [0], [0], [0]],
        SamplingConfig(max_new_tokens=8),
        [1, 2, 3, 4],
        [2, 8, 1, 2],
        on_finish=lambda rows, ended: told.append((list(rows), list(ended))),
    )
    assert [sorted(rows) for rows, _ in told] == [[2], [0, 3], [1]]
    for rows, ended in told:
        assert ended == [completions[row] for row in rows]


@pytest.mark.parametrize(
    ("prompt_ids", "limits", "message"),
    [
        ([[3], []], None, "prompt 1 has no tokens"),
        ([[3], [4]], [2, 9], "the limit of prompt 1 is 9: choose 1 to 8"),
        ([[3], [4]], [0, 1], "the limit of prompt 0 is 0"),
        ([[3], [4] * 250], None, "prompt 1 has 250 tokens and its response up to 8, but the model reads at most 256"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_its_number(
    tiny_model: TinyModel, prompt_ids: Any, limits: Any, message: str, generator_of: MakeGenerator
) -> None:
    generator = generator_of(load(tiny_model("llama")))
    with pytest.raises(ValueError, match=message):
        generator.generate(prompt_ids, SamplingConfig(max_new_tokens=8), [1, 2], limits)


def test_an_empty_stop_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop sequence has no tokens"):
        Endings.of([1], [[3], []])


def test_rows_come_back_in_the_order_of_the_prompts(generator_of: MakeGenerator) -> None:
    starts = [[4, 4, 4], [1], [6, 6], [3], [2, 2, 2, 2]]
    for batch_size in (1, 2, 5):
        generator = generator_of(COUNTING, eos_ids=[7], batch_size=batch_size)
        completions = generator.generate(starts, SamplingConfig(max_new_tokens=20), [0] * 5)
        assert [completion.response_ids[0] for completion in completions] == [5, 2, 7, 4, 3]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "opt"])
def test_a_row_does_not_depend_on_its_neighbours(
    tiny_model: TinyModel, architecture: str, generator_of: MakeGenerator
) -> None:
    """G5: alone, in any order, in batches of any size, and with neighbours that end early."""
    model = load(tiny_model(architecture))
    sampling = SamplingConfig(max_new_tokens=24, temperature=0.9)
    # Many EOS ids: rows leave the batch at different times.
    eos_ids = list(range(NUM_SPECIAL, NUM_SPECIAL + 20))
    many, seeds = prompts(3, 17, 1, 9, 12, 2, 5, 5, seed=4), list(range(50, 58))
    together = generator_of(model, eos_ids).generate(many, sampling, seeds)
    assert len({len(completion.response_ids) for completion in together}) > 3
    for batch_size in (1, 3):
        others = generator_of(model, eos_ids, batch_size).generate(many, sampling, seeds)
        assert_same(others, together)
    order = [5, 2, 7, 0]
    picked = generator_of(model, eos_ids).generate([many[i] for i in order], sampling, [seeds[i] for i in order])
    assert_same(picked, [together[i] for i in order])


def assert_same(completions: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(completions, expected, strict=True):
        assert one.response_ids == other.response_ids
        assert one.finished == other.finished
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_equal_seeds_draw_the_same_and_others_do_not(tiny_model: TinyModel, generator_of: MakeGenerator) -> None:
    """O4"""
    generator = generator_of(load(tiny_model("llama")))
    sampling = SamplingConfig(max_new_tokens=16)
    first = generator.generate([PROMPTS[0]] * 4, sampling, [7, 8, 7, 9])
    torch.manual_seed(123)  # the state of the process plays no part
    second = generator.generate([PROMPTS[0]] * 4, sampling, [7, 8, 7, 9])
    assert first == second
    assert first[0] == first[2]
    assert len({tuple(completion.response_ids) for completion in first}) == 3


# Distributions


def distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """What is to be sampled from, by its definition: no tensor, no code of the project."""
    weights = [math.exp(logit / temperature) for logit in logits]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        order = order[:top_k]
    total = sum(weights[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        kept.append(token)
        reached += weights[token] / total
        if reached >= top_p:
            break
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


def assert_drawn_from(counts: Counter[int], expected: list[float]) -> None:
    """Pearson's chi-squared test, at four standard deviations; the seeds are fixed, so it fails always or never."""
    draws = counts.total()
    assert all(expected[token] > 0 for token in counts)
    cells: list[tuple[float, int]] = []
    rest = [0.0, 0]
    for token, probability in enumerate(expected):
        if probability * draws >= 5:
            cells.append((probability * draws, counts[token]))
        else:  # a cell with few draws is not normal: pool them
            rest = [rest[0] + probability * draws, rest[1] + counts[token]]
    if rest[0] >= 5:
        cells.append((rest[0], int(rest[1])))
    statistic = sum((observed - mean) ** 2 / mean for mean, observed in cells)
    degrees = len(cells) - 1
    assert statistic <= degrees + 4 * math.sqrt(2 * degrees), (statistic, degrees)


RESTRICTIONS = [(0, 1.0), (4, 1.0), (0, 0.8), (5, 0.7)]


@pytest.mark.parametrize(("top_k", "top_p"), RESTRICTIONS)
def test_tokens_of_a_tiny_vocabulary_come_as_often_as_they_should(
    top_k: int, top_p: float, generator_of: MakeGenerator
) -> None:
    """G3: at temperature 0.7, every transition of a chain of 8 words."""
    logits = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) * 1.5
    sampling = SamplingConfig(max_new_tokens=10, temperature=0.7, top_k=top_k, top_p=top_p)
    generator = generator_of(Chain(logits), eos_ids=[99], batch_size=1500)
    completions = generator.generate([[row % 8] for row in range(1500)], sampling, list(range(1500)))
    transitions: dict[int, Counter[int]] = {last: Counter() for last in range(8)}
    expected = [distribution(row, 0.7, top_k, top_p) for row in logits.tolist()]
    for row, completion in enumerate(completions):
        last = row % 8
        for token, logprob in zip(completion.response_ids, completion.logprobs, strict=True):
            transitions[last][token] += 1
            assert logprob == pytest.approx(math.log(expected[last][token]), abs=1e-4)
            last = token
    for last, counts in transitions.items():
        assert_drawn_from(counts, expected[last])


def test_the_chi_squared_test_would_notice_another_temperature(generator_of: MakeGenerator) -> None:
    logits = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) * 1.5
    sampling = SamplingConfig(max_new_tokens=1, temperature=0.85)
    completions = generator_of(Chain(logits), batch_size=4000).generate([[0]] * 4000, sampling, list(range(4000)))
    counts = Counter(completion.response_ids[0] for completion in completions)
    assert_drawn_from(counts, distribution(logits[0].tolist(), 0.85, 0, 1.0))
    with pytest.raises(AssertionError):
        assert_drawn_from(counts, distribution(logits[0].tolist(), 0.7, 0, 1.0))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (10, 0.9)])
def test_tokens_of_a_transformer_come_as_often_as_they_should(
    tiny_model: TinyModel, top_k: int, top_p: float, generator_of: MakeGenerator
) -> None:
    """G3"""
    model = load(tiny_model("llama"))
    sampling = SamplingConfig(max_new_tokens=1, temperature=0.7, top_k=top_k, top_p=top_p)
    seeds = list(range(1000, 5000))
    completions = generator_of(model, batch_size=4000).generate([PROMPTS[0]] * 4000, sampling, seeds)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].tolist()
    counts = Counter(completion.response_ids[0] for completion in completions)
    assert_drawn_from(counts, distribution(logits, 0.7, top_k, top_p))


# The sampler by itself


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def kept(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> list[int]:
    return restrict(logits, top_k, top_p)[0].isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [
        (1e-9, [1]),  # never empty
        (0.49, [1]),
        (0.5, [1]),  # reached exactly: the smallest set has one token
        (0.51, [1, 3]),
        (0.75, [1, 3]),
        (0.76, [1, 2, 3]),
        (0.99, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, tokens: list[int]) -> None:
    # Sixteenths, so that sums are exact.
    assert kept(logits_of(1 / 16, 1 / 2, 3 / 16, 1 / 4), top_p=top_p) == tokens


@pytest.mark.parametrize(("top_k", "tokens"), [(0, [0, 1, 2]), (1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (99, [0, 1, 2])])
def test_top_k_keeps_the_likeliest(top_k: int, tokens: list[int]) -> None:
    assert kept(logits_of(0.1, 0.6, 0.3), top_k=top_k) == tokens


def test_top_p_counts_probability_within_top_k() -> None:
    # Of 0.4, 0.3, 0.2, 0.1 the first two stay; then 0.4 is 4/7 of what is left.
    assert kept(logits_of(0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.55) == [0]
    assert kept(logits_of(0.4, 0.3, 0.2, 0.1), top_p=0.55) == [0, 1]


def test_without_restrictions_logits_stay_as_they_are() -> None:
    logits = torch.randn(3, 7)
    assert torch.equal(restrict(logits, 0, 1.0), logits)
    assert torch.equal(restrict(logits, 7, 1.0), logits)


def test_rows_are_restricted_each_by_itself() -> None:
    logits = torch.cat([logits_of(0.9, 0.05, 0.05), logits_of(0.34, 0.33, 0.33)])
    assert restrict(logits, 0, 0.9).isfinite().tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.249, 0), (0.25, 1), (0.374, 1), (0.376, 3), (0.999, 3), (1 - 2**-24, 3)]
)
def test_a_token_is_drawn_by_inverting_the_cumulative_distribution(uniform: float, token: int) -> None:
    tokens, logprobs = sample_tokens(logits_of(0.25, 0.125, 0.0, 0.625), torch.tensor([uniform]), SamplingConfig())
    assert tokens.tolist() == [token]
    assert float(logprobs[0]) == pytest.approx(math.log([0.25, 0.125, 0.0, 0.625][token]), abs=1e-6)


def test_a_token_that_is_ruled_out_is_never_drawn() -> None:
    for probabilities in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]):
        for uniform in (0.0, 0.5 - 2**-25, 0.5, 1 - 2**-24):
            tokens, logprobs = sample_tokens(logits_of(*probabilities), torch.tensor([uniform]), SamplingConfig())
            assert probabilities[int(tokens)] > 0
            assert logprobs.isfinite().all()


def test_the_last_draw_of_a_large_vocabulary_is_not_past_its_end() -> None:
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:, 40_000:] = -torch.inf  # the sum over 50,000 tokens rounds
    tokens, logprobs = sample_tokens(logits, torch.full((64,), 1 - 2**-24), SamplingConfig())
    assert (tokens < 40_000).all()
    assert logprobs.isfinite().all()


def test_temperature_0_takes_the_likeliest_and_reports_the_models_own_probability() -> None:
    sampling = SamplingConfig(temperature=0.0, top_k=1, top_p=0.1)
    tokens, logprobs = sample_tokens(logits_of(0.2, 0.5, 0.3), torch.tensor([0.99]), sampling)
    assert tokens.tolist() == [1]
    assert float(logprobs[0]) == pytest.approx(math.log(0.5), abs=1e-6)


def test_the_temperature_divides_logits() -> None:
    """F6"""
    # At 1/2 probabilities are squared: 0.2, 0.8 become 0.04, 0.64 of 0.68.
    sampling = SamplingConfig(temperature=0.5)
    _, logprobs = sample_tokens(logits_of(0.2, 0.8), torch.tensor([0.5]), sampling)
    assert float(logprobs[0]) == pytest.approx(math.log(0.64 / 0.68), abs=1e-6)


def test_logprobs_of_bf16_logits_are_computed_in_float32() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    uniforms = torch.tensor([0.1, 0.4, 0.6, 0.9])
    tokens, logprobs = sample_tokens(logits, uniforms, SamplingConfig(temperature=0.7))
    expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)


def test_by_default_every_token_can_be_drawn_at_the_models_own_probability() -> None:
    """F6"""
    default = SamplingConfig()
    assert (default.temperature, default.top_k, default.top_p, default.min_new_tokens) == (1.0, 0, 1.0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "from 0 to max_new_tokens"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_impossible_sampling_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)
