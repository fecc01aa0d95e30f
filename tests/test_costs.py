"""Costs counted from a model's weights: by hand, by brute force, and by torch's own counter on real architectures."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from scripts.benchmark.costs import SHAPES
from tests.tiny_models import CONFIGS, IDS, LLAMA_SIZES, MORE_CONFIGS
from training.config import EngineConfig, ModelConfig
from training.costs import DecoderShape, attended
from training.data import collate
from training.engine import frozen_engine, loading_options
from training.forward import critic_values, response_logprobs
from training.models import load_causal_lm, load_scalar_model

MIXTURES = {
    "qwen3_moe": Qwen3MoeConfig(
        **LLAMA_SIZES, **IDS, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "mixtral": MixtralConfig(**LLAMA_SIZES, **IDS, num_local_experts=4, num_experts_per_tok=2),
}
ALL = CONFIGS | MORE_CONFIGS | MIXTURES
ROWS, TIME = 3, 24
LENGTHS = [TIME] * ROWS
# Of a layer of width 32 with 4 heads of 8: q and output 32 x 32, k and v 32 x 32 or, with 2 heads, 32 x 16. MLPs of
# width 48 have 3 matrices with a gate, else 2; GPT-2, GPT-J and Bloom (and Falcon, whose one head of keys and values is
# 8 wide) have 2 of width 4 x 32.
GROUPED, FULL = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32 * 32
BODIES = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"], 2 * (GROUPED + 3 * 32 * 48)),
    **dict.fromkeys(["gpt2", "gptj", "bloom"], 2 * (FULL + 2 * 32 * 128)),
    **dict.fromkeys(["gpt_neox", "opt"], 2 * (FULL + 2 * 32 * 48)),
    "falcon": 2 * (2 * 32 * 32 + 2 * 32 * 8 + 2 * 32 * 128),
    # With the matrix that chooses; two experts of three matrices each.
    "qwen3_moe": 2 * (GROUPED + 32 * 8 + 2 * 3 * 32 * 24),
    "mixtral": 2 * (GROUPED + 32 * 4 + 2 * 3 * 32 * 48),
}
# 120 numbers in the body, 40 in the head; a token that sees one other computes two products of 2 numbers in 2 heads.
TOY = DecoderShape(body=120, head=40, heads=2, kv_heads=1, head_dim=2, windows=(None,))


def build(architecture: str, auto_class: Any = AutoModelForCausalLM, **overrides: Any) -> Any:
    config = copy.deepcopy(ALL[architecture])
    config.update(overrides)
    torch.manual_seed(0)
    model = auto_class.from_config(config, attn_implementation="eager").eval()
    if architecture in MIXTURES:
        model.set_experts_implementation("eager")  # torch's counter knows no grouped products
    return model


def ids() -> torch.Tensor:
    return torch.arange(ROWS * TIME).view(ROWS, TIME)


def counted(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def all_pairs(shape: DecoderShape) -> int:
    """FLOPs that attention by plain products spends on pairs that nobody sees, in one forward."""
    return ROWS * TIME**2 * len(shape.windows) * shape.pair_flops - shape.attention_flops(LENGTHS)


def angles(model: Any) -> int:
    """Some versions of transformers compute the angles of rotary positions as a product of their own."""
    return sum(2 * TIME * module.inv_freq.numel() for module in model.modules() if hasattr(module, "inv_freq"))


# Numbers


@pytest.mark.parametrize("architecture", ALL)
def test_body_and_head_are_those_of_the_architecture(architecture: str) -> None:
    model = build(architecture)
    shape = DecoderShape.of(model)
    assert shape.body == BODIES[architecture]
    assert shape.head == model.config.vocab_size * 32
    assert (shape.heads, shape.head_dim, len(shape.windows)) == (4, 8, 2)
    assert shape.trained_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "embeddings"), [("135m", 134515008, 1), ("1b", 1235814400, 1), ("8b", 8030261248, 2)]
)
def test_bodies_follow_from_the_published_numbers_of_parameters(name: str, parameters: int, embeddings: int) -> None:
    """As the model cards of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B count them, less embeddings and norms."""
    with torch.device("meta"):
        shape = DecoderShape.of(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[name])))
    sizes = SHAPES[name]
    head = sizes["vocab_size"] * sizes["hidden_size"]
    norms = (2 * sizes["num_hidden_layers"] + 1) * sizes["hidden_size"]
    assert (shape.body, shape.head) == (parameters - embeddings * head - norms, head)
    assert shape.trained_parameters == parameters


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox"])
def test_a_scalar_model_has_the_body_and_no_vocabulary(architecture: str) -> None:
    model = build(architecture, AutoModelForSequenceClassification, num_labels=1)
    shape = DecoderShape.of(model)
    assert (shape.body, shape.head, shape.trained_head) == (BODIES[architecture], 0, 0)


def test_a_head_that_lies_among_the_layers_is_not_counted_with_them() -> None:
    model = build("qwen2")
    model.base_model_prefix = "none"
    assert DecoderShape.of(model).body == BODIES["qwen2"]


def test_adapters_are_counted_apart_and_alone_learn() -> None:
    """Rank 4: a matrix of n x m numbers gets 4 (n + m). Seven matrices in each of two layers."""
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    shape = DecoderShape.of(model)
    adapters = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert (shape.body, shape.adapters) == (BODIES["llama"], adapters)
    assert (shape.trained, shape.trained_head, shape.trained_parameters) == (adapters, 0, adapters)
    frozen = DecoderShape.of(build("llama").requires_grad_(False))
    assert (frozen.trained, frozen.trained_head, frozen.trained_parameters) == (0, 0, 0)


def test_what_wraps_a_model_changes_nothing_also_where_zero_3_splits_it(
    process_group: None, tiny_model: Callable[[str], str], tiny_reward_model: Callable[[str], str]
) -> None:
    config = EngineConfig(zero_stage=3, precision="fp32")
    options = loading_options(config, 3)
    expected = DecoderShape.of(build("llama").requires_grad_(False))
    loaded = load_causal_lm(ModelConfig(path=tiny_model("llama")), torch.float32, options)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 0  # split
    assert DecoderShape.of(frozen_engine(loaded, config)) == expected
    scalar = load_scalar_model(ModelConfig(path=tiny_reward_model("llama")), torch.float32)
    shape = DecoderShape.of(scalar)
    assert (shape.body, shape.head) == (expected.body, 0)
    assert shape.trained_parameters == sum(parameter.numel() for parameter in scalar.parameters())


def test_what_is_no_model_of_transformers_is_refused() -> None:
    with pytest.raises(ValueError, match="costs of Linear are not known: give a model of transformers"):
        DecoderShape.of(nn.Linear(2, 2))


# FLOPs


@pytest.mark.parametrize("architecture", ALL)
def test_a_forward_and_its_backward_cost_what_torch_counts(architecture: str) -> None:
    model = build(architecture)
    shape = DecoderShape.of(model)
    with torch.no_grad():
        forward = counted(lambda: model(input_ids=ids(), use_cache=False))
    assert forward - all_pairs(shape) - shape.forward_flops(LENGTHS, ROWS * TIME) in (0, angles(model))
    training = counted(lambda: model(input_ids=ids(), use_cache=False).logits.sum().backward())
    assert training - 3 * all_pairs(shape) - shape.training_flops(LENGTHS, ROWS * TIME) in (0, angles(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_adapters_cost_what_torch_counts(architecture: str) -> None:
    model = get_peft_model(build(architecture), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()  # else the first layer's inputs need no gradient
    shape = DecoderShape.of(model)
    training = counted(lambda: model(input_ids=ids(), use_cache=False).logits.sum().backward())
    assert training - 3 * all_pairs(shape) - shape.training_flops(LENGTHS, ROWS * TIME) in (0, angles(model))
    with torch.no_grad():
        forward = counted(lambda: model(input_ids=ids(), use_cache=False))
        with model.disable_adapter():
            reference = counted(lambda: model(input_ids=ids(), use_cache=False))
    assert forward - all_pairs(shape) - shape.forward_flops(LENGTHS, ROWS * TIME) in (0, angles(model))
    without = shape.forward_flops(LENGTHS, ROWS * TIME, adapters=False)
    assert reference - all_pairs(shape) - without in (0, angles(model))


def test_under_adapters_matrices_cost_two_forwards_and_else_three() -> None:
    for trained, forwards in ((0, 2), (120, 3)):
        shape = DecoderShape(120, 40, 2, 1, 2, (None,), trained=trained, trained_head=trained // 3)
        # Two rows of 3 and 1 tokens, which see 1 + 2 + 3 and 1; 2 of them are responses.
        assert shape.training_flops([3, 1], 2) == forwards * 2 * (120 * 4 + 40 * 2) + 3 * 16 * 7
        assert shape.forward_flops([3, 1], 2) == 2 * (120 * 4 + 40 * 2) + 16 * 7


def products(work: Callable[[], Any]) -> int:
    """FLOPs of products with matrices, attention apart."""
    with FlopCounterMode(display=False) as counter:
        work()
    found = counter.get_flop_counts()["Global"]
    return sum(found.get(operation, 0) for operation in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("packing", [True, False])
def test_packed_forwards_compute_useful_products_and_no_others(
    packing: bool, tiny_model: Callable[[str], str], tiny_reward_model: Callable[[str], str]
) -> None:
    """Prompts of 4 and 2 tokens, responses of 9 and 3: padded to 16, of which the last 13 get logits."""
    rows = [([5] * 13, [False] * 4 + [True] * 9), ([6] * 5, [False] * 2 + [True] * 3)]
    batch = collate(rows, pad_id=0)
    model = load_causal_lm(ModelConfig(path=tiny_model("llama"), packing=packing), torch.float32)
    critic = load_scalar_model(ModelConfig(path=tiny_reward_model("llama"), packing=packing), torch.float32)
    actor = DecoderShape.of(model)
    with torch.no_grad():
        found = products(lambda: response_logprobs(model, batch)), products(lambda: critic_values(critic, batch))
    tokens, logits = (18, 12) if packing else (32, 30)
    score_head = 2 * 32 * tokens
    useful = actor.forward_flops([13, 5], 12) - actor.attention_flops([13, 5])
    assert found == (2 * (actor.body * tokens + actor.head * logits), 2 * actor.body * tokens + score_head)
    assert (found[0] == useful) == packing


# Attention and rollouts


@pytest.mark.parametrize("architecture", [name for name in ALL if name not in MIXTURES])
def test_attention_costs_as_many_pairs_as_transformers_attends_to(architecture: str) -> None:
    """Weights above 0, over layers and heads; Mistral, Phi-3 and every other layer of Gemma-2 see 8 tokens."""
    model = build(architecture)
    shape = DecoderShape.of(model)
    with torch.no_grad():
        weights = model(input_ids=ids(), use_cache=False, output_attentions=True).attentions
    seen = sum(int((layer > 0).sum()) for layer in weights)
    assert shape.attention_flops(LENGTHS) == 4 * shape.head_dim * seen


def test_pairs_are_those_that_a_loop_finds() -> None:
    for length in range(12):
        for window in (None, 1, 3, 11, 12, 40):
            one_by_one = sum(1 for i in range(length) for j in range(i + 1) if window is None or i - j < window)
            assert attended(length, window) == one_by_one


def test_layers_that_do_not_attend_cost_no_pairs() -> None:
    config = copy.deepcopy(CONFIGS["qwen3"])
    config.sliding_window, config.layer_types = 8, ["linear_attention", "sliding_attention"]
    model = build("qwen3")
    model.config = config
    assert DecoderShape.of(model).windows == (8,)


def test_a_rollout_of_a_toy_model_by_hand() -> None:
    """Two samples of [1, 2, 3], of 3 tokens and 1, and one of [4], of 2.

    4 distinct tokens of prompts, which see 1 + 2 + 3 and 1; 2 logits behind them. Then 3 tokens are read, which see 4,
    5 and 2.
    """
    prompts, responses = [[1, 2, 3], [1, 2, 3], [4]], [3, 1, 2]
    assert TOY.rollout_flops(prompts, responses) == 2 * (120 * (4 + 3) + 40 * (2 + 3)) + 16 * (7 + 11)
    assert TOY.rollout_flops([[1, 2]], [0]) == TOY.rollout_flops([[1, 2]], [1]) == 2 * (120 * 2 + 40) + 16 * 3


def test_a_rollout_costs_the_sum_over_its_tokens_also_with_windows_and_folded_adapters() -> None:
    shape = DecoderShape(120, 40, 2, 1, 2, windows=(None, 4, 4), adapters=1000, trained=1000)
    prompts, responses = [[1, 2, 3], [4] * 9, [1, 2, 3], [5]], [6, 2, 1, 8]
    flops, computed = 0, set()
    for prompt, response in zip(prompts, responses, strict=True):
        positions = [] if tuple(prompt) in computed else list(range(1, len(prompt) + 1))
        logits = bool(positions)
        computed.add(tuple(prompt))
        positions += range(len(prompt) + 1, len(prompt) + response)
        flops += 2 * (120 * len(positions) + 40 * (logits + response - 1))
        flops += sum(16 * (seen + 2 * min(seen, 4)) for seen in positions)
    assert shape.rollout_flops(prompts, responses) == flops
