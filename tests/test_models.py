"""What is loaded: which weights, which head, which tokenizer, and what padding may change (nothing)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, OPTConfig

from tests.tiny_models import CONFIGS, IDS, save_tiny_model, save_tiny_reward_model
from tests.tiny_tokenizers import EOS, IM_END, NUM_SPECIAL, PAD, VOCAB_SIZE, build_tokenizer, byte_ids
from training.config import LoraConfig, ModelConfig
from training.data import collate
from training.formats import Demonstration
from training.forward import response_logprobs, reward_scores
from training.losses import sft_loss
from training.models import (
    SCORE_FILE,
    ScalarModel,
    check_same_tokenizer,
    eos_token_ids,
    holds_adapter,
    is_reward_model,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
)
from training.tokenization import tokenize_demonstration

ARCHITECTURES = sorted(CONFIGS)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Ids of ordinary bytes, no special token among them."""
    return torch.randint(NUM_SPECIAL, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits


def randomize_adapters(model: torch.nn.Module, seed: int = 3) -> None:
    """LoRA's B starts at zero; give A and B values, as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


Edit = Callable[[dict[str, Tensor]], None]


def edit_weights(folder: str | Path, edit: Edit, name: str = "model.safetensors") -> None:
    state = load_file(Path(folder) / name)
    edit(state)
    save_file(state, Path(folder) / name, metadata={"format": "pt"})


# Tokenizers


def test_a_tokenizer_without_pad_token_pads_with_eos_and_grows_no_embedding(tmp_path: Path) -> None:
    """F4"""
    build_tokenizer(pad=None, eos="<eos>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    assert len(tokenizer) == VOCAB_SIZE


def test_an_own_pad_token_stays(tmp_path: Path) -> None:
    build_tokenizer(pad="own", eos="<eos>").save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(path=str(tmp_path))).pad_token_id == PAD


def test_eos_is_learnt_also_where_it_is_the_pad_token(tmp_path: Path) -> None:
    """F4, F5"""
    path = save_tiny_model(tmp_path)
    build_tokenizer(pad=None, eos="<eos>").save_pretrained(tmp_path)
    config = ModelConfig(path=path)
    tokenizer = load_tokenizer(config)
    row = tokenize_demonstration(Demonstration("ab", "", "f:1"), tokenizer, "plain")
    batch = collate([row, tokenize_demonstration(Demonstration("abcdef", "gh", "f:2"), tokenizer, "plain")], pad_id=EOS)
    assert batch.response_mask[0].tolist() == [False, False, True] + [False] * (batch.input_ids.shape[1] - 3)
    assert batch.input_ids[0, 2] == EOS
    model = load_causal_lm(config, torch.float32)
    logprobs, _ = response_logprobs(model, batch)
    (gradient,) = torch.autograd.grad(sft_loss(logprobs, batch.response_mask, 4)[None], logprobs)
    assert gradient[0].tolist() == [0, 0, -0.25] + [0] * (batch.input_ids.shape[1] - 3)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_the_tokenizer_may_come_from_another_folder(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    build_tokenizer(eos="<|im_end|>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=tiny_model("llama"), tokenizer=str(tmp_path)))
    assert tokenizer.eos_token_id == IM_END


@pytest.mark.parametrize(
    ("listed", "expected"),
    [(None, [IM_END]), (EOS, [IM_END, EOS]), ([EOS, IM_END, 77], [IM_END, EOS, 77]), ([IM_END], [IM_END])],
)
def test_every_eos_of_tokenizer_and_generation_config_counts_once(
    tmp_path: Path, listed: int | list[int] | None, expected: list[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({} if listed is None else {"eos_token_id": listed}))
    assert eos_token_ids(ModelConfig(path=str(tmp_path)), build_tokenizer(eos="<|im_end|>")) == expected


def test_without_a_generation_config_the_tokenizers_eos_ends_a_response(tmp_path: Path) -> None:
    assert eos_token_ids(ModelConfig(path=str(tmp_path)), build_tokenizer(eos="<eos>")) == [EOS]


def test_tokenizers_that_differ_are_refused_with_the_options_name(tmp_path: Path) -> None:
    other_words = build_tokenizer(eos="<eos>")
    other_words.add_tokens(["film"])
    other_end = build_tokenizer(eos="<|im_end|>")
    for other in (other_words, other_end):
        with pytest.raises(ValueError, match=r"reward\.retokenize"):
            check_same_tokenizer(build_tokenizer(eos="<eos>"), other, "reward model", "set reward.retokenize True")


def test_equal_tokenizers_pass_whatever_their_pad_token() -> None:
    check_same_tokenizer(build_tokenizer(pad="own"), build_tokenizer(pad="eos"), "reward model", "")


# Weights


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_causal_lm_is_the_one_that_transformers_loads(tiny_model: Callable[[str], str], architecture: str) -> None:
    """O5"""
    path = tiny_model(architecture)
    model = load_causal_lm(ModelConfig(path=path), torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = random_ids(2, 12)
    assert torch.equal(logits_of(model, ids), logits_of(reference, ids))
    assert all(parameter.requires_grad for parameter in model.parameters())


def save_with_dropout(folder: Path, architecture: str) -> str:
    path = save_tiny_model(folder, architecture)
    config = json.loads((folder / "config.json").read_text())
    config |= {name: 0.5 for name in config if "drop" in name and name != "layerdrop"}
    (folder / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "gpt_neox"])
def test_dropout_is_off_also_in_training_mode(tmp_path: Path, architecture: str) -> None:
    """F7"""
    path = save_with_dropout(tmp_path, architecture)
    ids = random_ids(2, 12)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    assert not torch.equal(logits_of(plain, ids), logits_of(plain, ids))  # else this test would see nothing
    model = load_causal_lm(ModelConfig(path=path), torch.float32).train()
    assert torch.equal(logits_of(model, ids), logits_of(model, ids))
    critic = load_scalar_model(ModelConfig(path=path), torch.float32, head="normal").train()
    mask = torch.ones_like(ids)
    assert torch.equal(critic(ids, mask), critic(ids, mask))


def test_layers_are_not_dropped_either(tmp_path: Path) -> None:
    """F7"""
    path = save_tiny_model(tmp_path, "opt")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layerdrop": 0.9}))
    model = load_causal_lm(ModelConfig(path=path), torch.float32)
    ids = random_ids(2, 12)
    assert torch.equal(logits_of(model.train(), ids), logits_of(model.eval(), ids))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda state: state.pop("model.layers.1.mlp.up_proj.weight"),
            r"missing model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (lambda state: state.update(extra=torch.ones(2)), "unexpected extra"),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(7)}),
            r"of another shape model\.norm\.weight \(7,\)",
        ),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_a_folder_with_other_weights_is_refused(tmp_path: Path, edit: Edit, message: str) -> None:
    path = save_tiny_model(tmp_path)
    edit_weights(path, edit)
    for head in ("none", "normal"):
        with pytest.raises(ValueError, match=message) as refused:
            if head == "none":
                load_causal_lm(ModelConfig(path=path), torch.float32)
            else:
                load_scalar_model(ModelConfig(path=path), torch.float32, head=head)
        assert path in str(refused.value)


def test_a_reward_model_whose_head_has_another_name_is_refused(tmp_path: Path) -> None:
    path = save_tiny_reward_model(tmp_path)
    edit_weights(path, lambda state: state.update(v_head=state.pop("score.weight")))
    with pytest.raises(ValueError, match=r"missing score\.weight, unexpected v_head"):
        load_scalar_model(ModelConfig(path=path), torch.float32)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere cannot be loaded: "):
        load_causal_lm(ModelConfig(path=str(tmp_path / "nowhere")), torch.float32)


# The scalar head


def test_a_reward_model_needs_a_saved_head(tiny_model: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="without a score head"):
        load_scalar_model(ModelConfig(path=tiny_model("llama")), torch.float32)


def test_is_reward_model_tells_a_head_from_none(
    tiny_model: Callable[[str], str], tiny_reward_model: Callable[[str], str]
) -> None:
    for architecture in ("llama", "gpt2"):
        assert not is_reward_model(ModelConfig(path=tiny_model(architecture)))
        assert is_reward_model(ModelConfig(path=tiny_reward_model(architecture)))


def save_wide_model(folder: Path, config: LlamaConfig | OPTConfig) -> str:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_a_new_head_has_deviation_1_over_sqrt_of_width_plus_1(tmp_path: Path) -> None:
    """R2"""
    width = 4096
    config = LlamaConfig(
        hidden_size=width, head_dim=2, num_attention_heads=1, num_key_value_heads=1, intermediate_size=4,
        num_hidden_layers=1, vocab_size=8, **IDS,
    )  # fmt: skip
    model = load_scalar_model(ModelConfig(path=save_wide_model(tmp_path, config)), torch.float32, head="normal")
    head = model.model.score
    assert head.bias is None
    assert head.weight.shape == (1, width)
    assert float(head.weight.detach().std()) == pytest.approx(1 / math.sqrt(width + 1), rel=0.05)
    assert abs(float(head.weight.detach().mean())) < 4 / width


def test_the_width_is_that_of_the_heads_input(tmp_path: Path) -> None:
    """R2: the last layer of OPT-350M is narrower than the others."""
    config = OPTConfig(
        hidden_size=8, word_embed_proj_dim=4096, ffn_dim=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=8,
        max_position_embeddings=16, **IDS,
    )  # fmt: skip
    model = load_scalar_model(ModelConfig(path=save_wide_model(tmp_path, config)), torch.float32, head="normal")
    assert float(model.model.score.weight.detach().std()) == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    ids = torch.tensor([[3, 4, 5]])
    assert model(ids, torch.ones_like(ids)).shape == (1, 3)


def test_a_new_head_does_not_depend_on_the_seed_of_the_process(tiny_model: Callable[[str], str]) -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = load_scalar_model(ModelConfig(path=tiny_model("llama")), torch.float32, head="normal")
        weights.append(model.model.score.weight)
    assert torch.equal(*weights)


def test_a_head_of_zeros_gives_values_of_zero_and_learns(tiny_model: Callable[[str], str]) -> None:
    """L8"""
    model = load_scalar_model(ModelConfig(path=tiny_model("llama")), torch.float32, head="zero")
    ids = random_ids(2, 6)
    values = model(ids, torch.ones_like(ids))
    assert values.count_nonzero() == 0
    (gradient,) = torch.autograd.grad(values.sum(), model.model.score.weight)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("head", ["saved", "normal", "zero"])
def test_a_saved_head_is_kept_whatever_is_asked_for(tiny_reward_model: Callable[[str], str], head: str) -> None:
    path = tiny_reward_model("llama")
    model = load_scalar_model(ModelConfig(path=path), torch.float32, head=head)
    saved = load_file(Path(path) / "model.safetensors")["score.weight"]
    assert torch.equal(model.model.score.weight, saved)


def hf_score(path: str, row: list[int]) -> float:
    """The score of one row without padding, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([row])).logits)


ROWS = [[*byte_ids(text), EOS] for text in ("a good film", "no", "neither good nor bad, but long")]


def scores_of(model: ScalarModel, rows: list[list[int]], pad_id: int = PAD, pad_to_multiple: int = 8) -> Tensor:
    batch = collate([(row, [True] * len(row)) for row in rows], pad_id, pad_to_multiple)
    with torch.no_grad():
        return reward_scores(model, batch)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_transformers(tiny_reward_model: Callable[[str], str], architecture: str) -> None:
    """R1, R8"""
    path = tiny_reward_model(architecture)
    model = load_scalar_model(ModelConfig(path=path), torch.float32)
    expected = [hf_score(path, row) for row in ROWS]
    assert max(expected) - min(expected) > 0.1
    assert scores_of(model, ROWS).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_garbage_in_it_do_not_change_scores(
    tiny_reward_model: Callable[[str], str], architecture: str
) -> None:
    """R1, F1"""
    model = load_scalar_model(ModelConfig(path=tiny_reward_model(architecture)), torch.float32)
    expected = scores_of(model, ROWS)
    for pad_id, multiple in ((EOS, 8), (PAD, 64), (99, 33)):
        torch.testing.assert_close(scores_of(model, ROWS, pad_id, multiple), expected, rtol=0, atol=1e-5)
    batch = collate([(row, [True] * len(row)) for row in ROWS], PAD, 64)
    batch.input_ids[~batch.attention_mask] = random_ids(int((~batch.attention_mask).sum()), seed=5)
    with torch.no_grad():
        torch.testing.assert_close(reward_scores(model, batch), expected, rtol=0, atol=1e-5)


def test_gain_and_bias_are_applied(tmp_path: Path, tiny_reward_model: Callable[[str], str]) -> None:
    """R6"""
    path = save_tiny_reward_model(tmp_path)
    raw = scores_of(load_scalar_model(ModelConfig(path=path), torch.float32), ROWS)
    (tmp_path / SCORE_FILE).write_text(json.dumps({"gain": 0.5, "bias": -3.0}))
    model = load_scalar_model(ModelConfig(path=path), torch.float32)
    assert (model.gain, model.bias) == (0.5, -3.0)
    torch.testing.assert_close(scores_of(model, ROWS), 0.5 * raw - 3.0)


def test_scores_are_float32_and_of_float32_precision_in_a_bf16_model(tiny_reward_model: Callable[[str], str]) -> None:
    model = load_scalar_model(ModelConfig(path=tiny_reward_model("llama")), torch.bfloat16)
    scores = scores_of(model, ROWS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


# LoRA

LORA = LoraConfig(rank=4, alpha=8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_nothing_and_adapters_off_are_the_base(
    tiny_model: Callable[[str], str], architecture: str, dtype: torch.dtype
) -> None:
    """F9"""
    path = tiny_model(architecture)
    base = load_causal_lm(ModelConfig(path=path), dtype)
    model: Any = load_causal_lm(ModelConfig(path=path, lora=LORA), dtype)
    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = logits_of(base, ids)
        assert torch.equal(logits_of(model, ids), expected)
        randomize_adapters(model)
        assert not torch.allclose(logits_of(model, ids), expected, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(logits_of(model, ids), expected)


def test_adapters_alone_are_trained_on_every_linear_layer_of_the_blocks(tiny_model: Callable[[str], str]) -> None:
    model = load_causal_lm(ModelConfig(path=tiny_model("llama"), lora=LORA), torch.bfloat16)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(trained) == 2 * len(layers) * 2  # blocks, layers, A and B
    assert all("lora_" in name and any(layer in name for layer in layers) for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.bfloat16}


def test_target_modules_choose_the_layers(tiny_model: Callable[[str], str]) -> None:
    lora = LoraConfig(rank=4, target_modules=("q_proj", "v_proj"))
    model = load_causal_lm(ModelConfig(path=tiny_model("llama"), lora=lora), torch.float32)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in trained)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_scalar_model_with_adapters_trains_its_whole_head(
    tiny_model: Callable[[str], str], tiny_reward_model: Callable[[str], str], architecture: str
) -> None:
    base = load_scalar_model(ModelConfig(path=tiny_reward_model(architecture)), torch.float32)
    model = load_scalar_model(ModelConfig(path=tiny_reward_model(architecture), lora=LORA), torch.float32)
    assert torch.equal(scores_of(model, ROWS), scores_of(base, ROWS))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if "lora_" not in name] == [
        "model.base_model.model.score.modules_to_save.default.weight"
    ]
    new = load_scalar_model(ModelConfig(path=tiny_model(architecture), lora=LORA), torch.float32, head="zero")
    assert scores_of(new, ROWS).count_nonzero() == 0


def test_adapters_leave_out_a_language_models_output_layer(tiny_model: Callable[[str], str]) -> None:
    for architecture, output in (("llama", "lm_head"), ("gpt_neox", "embed_out")):
        model = load_causal_lm(ModelConfig(path=tiny_model(architecture), lora=LORA), torch.float32)
        assert not any(output in name and "lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["whole", "adapters"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_changes_no_gradient(
    tiny_model: Callable[[str], str], architecture: str, lora: LoraConfig
) -> None:
    ids = random_ids(2, 12)
    gradients = []
    for checkpointing in (False, True):
        config = ModelConfig(path=tiny_model(architecture), lora=lora, gradient_checkpointing=checkpointing)
        model = load_causal_lm(config, torch.float32).train()
        randomize_adapters(model)
        logits_of(model, ids).logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 0
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def save_adapter(folder: Path, base: str, seed: int = 3) -> str:
    model: Any = load_causal_lm(ModelConfig(path=base, lora=LORA), torch.float32)
    randomize_adapters(model, seed)
    model.save_pretrained(folder)
    return str(folder)


def test_a_folder_of_adapters_is_loaded_merged(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    """O5"""
    base = tiny_model("qwen2")
    adapter = save_adapter(tmp_path, base)
    assert holds_adapter(adapter) and not holds_adapter(base)
    unmerged = load_causal_lm(ModelConfig(path=base, lora=LORA), torch.float32)
    randomize_adapters(unmerged)
    merged = load_causal_lm(ModelConfig(path=adapter), torch.float32)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    ids = random_ids(2, 12)
    torch.testing.assert_close(logits_of(merged, ids), logits_of(unmerged, ids), rtol=1e-4, atol=1e-4)


def test_adapters_remember_the_revision_of_their_base(
    tmp_path: Path, tiny_model: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own folder has none. Transformers reads a folder whatever revision is asked for."""
    model: Any = load_causal_lm(ModelConfig(path=tiny_model("llama"), revision="v2", lora=LORA), torch.float32)
    model.save_pretrained(tmp_path)
    asked = []
    own = AutoModelForCausalLM.from_pretrained

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options["revision"]))
        return own(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    load_causal_lm(ModelConfig(path=str(tmp_path)), torch.float32)
    assert asked == [(tiny_model("llama"), "v2")]


def test_adapters_of_a_reward_model_without_its_head_are_refused(
    tmp_path: Path, tiny_model: Callable[[str], str]
) -> None:
    config = ModelConfig(path=tiny_model("llama"), lora=LORA)
    load_scalar_model(config, torch.float32, head="normal").model.save_pretrained(tmp_path)
    weights = "adapter_model.safetensors"
    edit_weights(tmp_path, lambda state: state.update(head=state.pop("base_model.model.score.weight")), weights)
    with pytest.raises(ValueError, match=r"does not hold the adapters of .*: missing .*score"):
        load_scalar_model(ModelConfig(path=str(tmp_path)), torch.float32)


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"),
        lambda state: state.update({"base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.ones(48, 4)}),
    ],
    ids=["missing", "unexpected"],
)
def test_a_folder_with_other_adapters_is_refused(tmp_path: Path, tiny_model: Callable[[str], str], edit: Edit) -> None:
    adapter = save_adapter(tmp_path, tiny_model("llama"))
    edit_weights(adapter, edit, "adapter_model.safetensors")
    with pytest.raises(ValueError, match="up_proj"):
        load_causal_lm(ModelConfig(path=adapter), torch.float32)
