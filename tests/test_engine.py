"""What DeepSpeed is told, that its steps are AdamW's, and that generating leaves no trace."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.test_models import randomize_adapters
from tests.tiny_tokenizers import NUM_SPECIAL, VOCAB_SIZE
from training import distributed
from training.config import EngineConfig, LoraConfig, ModelConfig, OptimConfig
from training.data import Batch, collate
from training.engine import (
    DTYPES,
    backward_and_step,
    deepspeed_options,
    evaluation_mode,
    frozen_engine,
    generation_mode,
    gradient_norm,
    loading_options,
    merged,
    train_engine,
)
from training.export import whole
from training.forward import response_logprobs
from training.losses import sft_loss
from training.models import load_causal_lm

pytestmark = pytest.mark.usefixtures("process_group")

FP32 = EngineConfig(zero_stage=0, precision="fp32")
OPTIM = OptimConfig(lr=3e-3, weight_decay=0.1, warmup_fraction=0.25, min_lr_fraction=0.1)
LORA = LoraConfig(rank=4, alpha=8)


def batches(count: int, rows: int = 4) -> list[Batch]:
    """Rows of unequal lengths, so that a mean of micro-batches' means is not the mean."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        lengths = [5, 17, 9, 12][:rows]
        ids = [torch.randint(NUM_SPECIAL, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
        result.append(collate([(row, [False] * 3 + [True] * (len(row) - 3)) for row in ids], pad_id=2))
    return result


def load(
    path: str, engine: EngineConfig = FP32, lora: LoraConfig | None = None, checkpointing: bool = False
) -> nn.Module:
    config = ModelConfig(path=path, lora=lora or LoraConfig(), gradient_checkpointing=checkpointing)
    return load_causal_lm(config, DTYPES[engine.precision], loading_options(engine, engine.zero_stage))


def start(model: nn.Module, engine: EngineConfig = FP32, optim: OptimConfig = OPTIM, steps: int = 8) -> Any:
    return train_engine(model, engine, optim, train_batch_size=4, total_steps=steps)


def train(engine: Any, steps: list[Batch], micro: int = 4) -> list[float]:
    """One optimizer step for each batch; the loss of each."""
    losses = []
    for batch in steps:
        batch = batch.to(distributed.device())
        count = batch.response_mask.sum()
        loss = torch.zeros(())
        parts = torch.arange(len(batch)).split(micro)
        for index in parts:
            part = batch.rows(index.to(distributed.device()))
            part_loss = sft_loss(response_logprobs(engine, part)[0], part.response_mask, count)
            backward_and_step(engine, part_loss, last=index is parts[-1])
            loss = loss + part_loss.detach().cpu()
        losses.append(float(loss))
    return losses


def weights(engine: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in engine.module.named_parameters()}


# Options


def test_batch_sizes_become_accumulation() -> None:
    options = deepspeed_options(FP32, zero_stage=0, train_batch_size=8)
    assert options["train_micro_batch_size_per_gpu"] == 1
    assert options["train_batch_size"] == 8
    assert options["gradient_accumulation_steps"] == 8
    frozen = deepspeed_options(FP32, zero_stage=0)
    assert (frozen["train_batch_size"], frozen["gradient_accumulation_steps"]) == (1, 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_switches_on_its_own_section_alone(precision: str) -> None:
    config = EngineConfig(precision=precision)  # type: ignore[arg-type]
    options = deepspeed_options(config, zero_stage=2)
    switched_on = [name for name in ("bf16", "fp16") if options.get(name, {}).get("enabled")]
    assert switched_on == [name for name in (precision,) if name != "fp32"]


def test_offload_reaches_only_what_can_be_offloaded() -> None:
    config = EngineConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    trained = deepspeed_options(config, zero_stage=3, train_batch_size=1)["zero_optimization"]
    assert trained["offload_optimizer"] == trained["offload_param"] == {"device": "cpu"}
    frozen = deepspeed_options(config, zero_stage=3)["zero_optimization"]
    assert "offload_optimizer" not in frozen
    assert frozen["offload_param"] == {"device": "cpu"}
    whole = deepspeed_options(config, zero_stage=0)["zero_optimization"]
    assert whole == {"stage": 0}


def test_a_json_file_is_laid_over_the_generated_options(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": False}, "gradient_clipping": 0.5}))
    config = EngineConfig(zero_stage=2, deepspeed_config=str(file))
    options = deepspeed_options(config, zero_stage=2, train_batch_size=1)
    assert options["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert options["gradient_clipping"] == 0.5
    assert options["bf16"] == {"enabled": True}


def test_merging_goes_into_dictionaries_and_writes_to_neither() -> None:
    base, over = {"a": {"b": 1, "c": 2}, "d": 3, "e": {"f": 1}}, {"a": {"c": 9}, "d": {"x": 1}, "e": 5, "g": 7}
    assert merged(base, over) == {"a": {"b": 1, "c": 9}, "d": {"x": 1}, "e": 5, "g": 7}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3, "e": {"f": 1}}
    assert over == {"a": {"c": 9}, "d": {"x": 1}, "e": 5, "g": 7}


def test_only_zero_3_splits_while_loading() -> None:
    assert [loading_options(FP32, stage) is None for stage in (0, 1, 2, 3)] == [True, True, True, False]


# Training


def plain_adamw(path: str, steps: list[Batch], clip: float) -> tuple[dict[str, Tensor], list[float]]:
    """The weights and losses of transformers and torch alone, with `OPTIM` over 8 steps, of which 2 warm up."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    losses = []
    for step, batch in enumerate(steps):
        progress = (step - 2) / 6
        factor = (step + 1) / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor
        total = torch.zeros(())
        for ids, real, response in zip(batch.input_ids, batch.attention_mask, batch.response_mask, strict=True):
            row = ids[real]
            logprobs = model(input_ids=row[None]).logits[0].log_softmax(-1)
            chosen = logprobs[:-1].gather(-1, row[1:, None])[:, 0]
            total = total - chosen[response[real][1:]].sum()
        loss = total / batch.response_mask.sum()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_steps_are_those_of_plain_adamw(tiny_model: Callable[[str], str], zero_stage: Any, clip: float) -> None:
    """L7, L14"""
    config = EngineConfig(zero_stage=zero_stage, precision="fp32", gradient_clipping=clip)
    engine = start(load(tiny_model("llama"), config), config)
    steps = batches(2) * 3
    losses = train(engine, steps)
    expected, expected_losses = plain_adamw(tiny_model("llama"), steps, clip)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert losses[-1] < losses[1] - 0.1
    if zero_stage < 3:
        for name, weight in weights(engine).items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("zero_stage", [0, 2])
@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["whole", "adapters"])
def test_the_micro_batch_size_changes_nothing(
    tiny_model: Callable[[str], str], zero_stage: Any, lora: LoraConfig
) -> None:
    """L5"""
    results, norms = [], []
    config = EngineConfig(zero_stage=zero_stage, precision="fp32", gradient_clipping=0.0)
    # A large eps: Adam would make a whole step of a gradient that is nothing but rounding.
    optim = OptimConfig(lr=1e-3, eps=1e-2, schedule="constant")
    for micro in (1, 2, 4):
        model = load(tiny_model("qwen2"), config, lora)
        randomize_adapters(model)
        engine = start(model, config, optim)
        train(engine, batches(3), micro)
        assert engine.global_steps == 3
        results.append(weights(engine))
        norms.append(gradient_norm(engine))
    for other in results[1:]:
        for name, weight in results[0].items():
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-6, msg=name)
    if zero_stage == 2:
        assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_keeps_float32_weights_where_a_step_is_less_than_their_rounding(zero_stage: Any) -> None:
    """L14: around 1, bf16 knows steps of 1/256 down; 100 steps of 1/5000 must add up."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    config = EngineConfig(zero_stage=zero_stage, precision="bf16")
    engine = start(model, config, OptimConfig(lr=2e-4, schedule="constant", warmup_fraction=0.0), steps=100)
    inputs = torch.ones(1, 1, dtype=torch.bfloat16, device=distributed.device())
    for _ in range(100):
        backward_and_step(engine, engine(inputs).float().sum())
    # Adam moves by lr each step while the gradient stays the same: 1 - 100 * 2e-4, and 2**-8 is the spacing there.
    assert float(engine(inputs)) == pytest.approx(0.98, abs=2**-9)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_in_bf16_too_the_first_step_is_adams_first(zero_stage: Any) -> None:
    """L14: DeepSpeed warms its optimizer up with a step of its own at stage 0."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    config = EngineConfig(zero_stage=zero_stage, precision="bf16")
    optim = OptimConfig(lr=0.125, weight_decay=1.0, schedule="constant", warmup_fraction=0.0)
    engine = start(model, config, optim)
    inputs = torch.ones(1, 1, dtype=torch.bfloat16, device=distributed.device())
    backward_and_step(engine, engine(inputs).float().sum())
    # 1 - lr * decay * 1 - lr * sign(gradient), which bf16 can write
    assert float(engine(inputs)) == 0.75


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_no_weight(zero_stage: Any, precision: Any) -> None:
    model = nn.Linear(3, 2).to(DTYPES[precision])
    engine = start(model, EngineConfig(zero_stage=zero_stage, precision=precision))
    inputs = torch.ones(4, 3, dtype=DTYPES[precision], device=distributed.device())

    def weight() -> Tensor:
        parameter = model.get_parameter("weight")
        with whole(parameter):
            return parameter.detach().clone()

    assert backward_and_step(engine, engine(inputs).float().sum())
    before, rate = weight(), engine.get_lr()
    for bad in (math.nan, math.inf):
        assert not backward_and_step(engine, engine(inputs * bad).float().sum())
        assert torch.equal(weight(), before)
        assert engine.get_lr() == rate
    assert backward_and_step(engine, engine(inputs).float().sum())
    assert weight().isfinite().all()
    assert not torch.equal(weight(), before)


def test_gradients_are_clipped_by_their_norm_over_all_weights(tiny_model: Callable[[str], str]) -> None:
    """L7"""
    norms = []
    for clip in (0.0, 0.1):
        config = EngineConfig(zero_stage=2, precision="fp32", gradient_clipping=clip)
        engine = start(load(tiny_model("llama"), config), config)
        train(engine, batches(1))
        norms.append(gradient_norm(engine))
    assert norms[0] == norms[1] > 0.1  # what is reported is the norm before clipping
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    (batch,) = batches(1)
    logprobs, _ = response_logprobs(model, batch)
    sft_loss(logprobs, batch.response_mask, batch.response_mask.sum()).backward()
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert norms[0] == pytest.approx(total, rel=1e-4)


def count_forwards(module: nn.Module) -> list[int]:
    calls = [0]
    module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["whole", "adapters"])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_gradient_checkpointing_runs_and_changes_nothing(
    tiny_model: Callable[[str], str], tmp_path: Path, zero_stage: Any, lora: LoraConfig
) -> None:
    # At ZeRO 3 small weights stay whole unless told otherwise, and then this would test nothing.
    raw = tmp_path / "deepspeed.json"
    raw.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    config = EngineConfig(zero_stage=zero_stage, precision="fp32", deepspeed_config=str(raw))
    losses, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        engine = start(load(tiny_model("llama"), config, lora, checkpointing), config)
        block = next(module for name, module in engine.module.named_modules() if name.endswith("layers.0.mlp"))
        counted = count_forwards(block)
        losses.append(train(engine, batches(3)))
        calls.append(counted[0])
    assert calls == [3, 6]
    assert losses[0] == losses[1]


def test_evaluation_switches_adapter_dropout_off_and_back_on(tiny_model: Callable[[str], str]) -> None:
    model = load(tiny_model("llama"), lora=LoraConfig(rank=4, dropout=0.5))
    randomize_adapters(model)
    engine = start(model)
    batch = batches(1)[0].to(distributed.device())
    trained = [response_logprobs(engine, batch)[0].detach() for _ in range(2)]
    assert not torch.equal(*trained)
    with evaluation_mode(engine):
        evaluated = [response_logprobs(engine, batch)[0] for _ in range(2)]
    assert torch.equal(*evaluated)
    assert not evaluated[0].requires_grad
    assert engine.module.training
    assert response_logprobs(engine, batch)[0].requires_grad


def test_a_frozen_engine_has_no_gradient_and_no_optimizer(tiny_model: Callable[[str], str]) -> None:
    """F8"""
    engine = frozen_engine(load(tiny_model("llama")), FP32)
    assert not any(parameter.requires_grad for parameter in engine.module.parameters())
    assert not engine.module.training
    batch = batches(1)[0].to(distributed.device())
    assert not response_logprobs(engine, batch)[0].requires_grad


# Generating


def has_adapter_on(module: nn.Module) -> bool:
    return any(getattr(layer, "merged_adapters", None) == [] for layer in module.modules())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generating_with_adapters_folds_them_in_and_leaves_no_trace(
    tiny_model: Callable[[str], str], zero_stage: Any, architecture: str, fails: bool
) -> None:
    """G4"""
    config = EngineConfig(zero_stage=zero_stage, precision="bf16")
    model = load(tiny_model(architecture), config, LORA)
    randomize_adapters(model)
    engine = start(model, config)
    batch = batches(1)[0].to(distributed.device())
    before, logprobs = weights(engine), response_logprobs(engine, batch)[0].detach()
    with torch.no_grad(), engine.module.disable_adapter():
        base = response_logprobs(engine, batch)[0]
    try:
        with generation_mode(engine) as module:
            assert not module.training
            assert not has_adapter_on(module)
            inside = response_logprobs(module, batch)[0]
            assert not inside.requires_grad
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    mask = batch.response_mask
    gap = (inside - logprobs)[mask].abs().mean()
    assert gap < 0.1 * (base - logprobs)[mask].abs().mean()  # merged in bf16: rounding, not the base model
    assert engine.module.training
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
    assert torch.equal(response_logprobs(engine, batch)[0], logprobs)
    train(engine, batches(2))


def test_merged_adapters_are_the_unmerged_ones_in_fp32(tiny_model: Callable[[str], str]) -> None:
    """G2"""
    model = load(tiny_model("llama"), lora=LORA)
    randomize_adapters(model)
    engine = start(model)
    batch = batches(1)[0].to(distributed.device())
    outside = response_logprobs(engine, batch)[0]
    with generation_mode(engine) as module:
        inside = response_logprobs(module, batch)[0]
    torch.testing.assert_close(inside, outside.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_generating_sees_the_weights_of_the_last_step(tiny_model: Callable[[str], str], zero_stage: Any) -> None:
    """G4"""
    config = EngineConfig(zero_stage=zero_stage, precision="fp32")
    engine = start(load(tiny_model("llama"), config), config)
    batch = batches(1)[0].to(distributed.device())
    seen = []
    for _ in range(3):
        with generation_mode(engine) as module:
            inside = response_logprobs(module, batch)[0]
        assert torch.equal(inside, response_logprobs(engine, batch)[0])
        seen.append(inside)
        train(engine, batches(1))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_another_module_can_be_opened_in_the_engines_mode(tiny_model: Callable[[str], str]) -> None:
    engine = start(load(tiny_model("llama")))
    other = load(tiny_model("gpt2"))
    with generation_mode(engine, other.train()) as module:
        assert module is other
        assert not other.training
    assert other.training
