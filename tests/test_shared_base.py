"""Step 3 with one copy of the frozen weights: the numbers of weights of their own, in a third of the memory."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from step3_ppo.config import CriticConfig, PpoConfig, PpoRunConfig, RewardModelConfig
from step3_ppo.models import Models, critic_source, load_models
from step3_ppo.ppo import update
from step3_ppo.rollout import Rollout, critic_values, make_experience
from step3_ppo.train import collect
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizers import build_tokenizer, byte_ids
from training.config import DataConfig, EngineConfig, LoraConfig, ModelConfig, OptimConfig
from training.costs import transformer_of
from training.data import Batch
from training.engine import evaluation_mode
from training.examples import PromptExample
from training.export import export
from training.forward import response_logprobs, reward_scores
from training.generation.interface import SamplingConfig
from training.models import SCORE_FILE, ScalarModel, holds_adapter, load_causal_lm, load_scalar_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("process_group")

TOKENIZER = build_tokenizer(eos="<eos>")
PROMPTS = [
    PromptExample(byte_ids(text), text, {"prompt": text}, f"prompts.jsonl:{row + 1}")
    for row, text in enumerate(["a film", "so", "it was", "the end of the"])
]
RANK, ALPHA = 4, 8.0
LORA = LoraConfig(rank=RANK, alpha=ALPHA)
SLOW = OptimConfig(lr=1e-30, schedule="constant", warmup_fraction=0.0)  # moves nothing: a learning rate of 0 is refused
FAST = OptimConfig(lr=3e-3, schedule="constant", warmup_fraction=0.0, eps=1e-5)

Folders = Callable[[str], str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a tiny causal LM of an architecture; its weights small enough that float32 rounds below 1e-6."""

    def folder(architecture: str) -> str:
        path = tmp_path_factory.getbasetemp() / f"shared-{architecture}"
        return str(path) if path.exists() else save_tiny_model(path, architecture, hidden_scale=1.5)

    return folder


def save_reward_adapters(folder: Path, base: str, **settings: Any) -> str:
    """The adapters and head of a reward model over `base`, made by transformers and peft alone."""
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    defaults = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1, "target_modules": "all-linear"}
    adapted = get_peft_model(
        model, PeftLoraConfig(task_type="SEQ_CLS", exclude_modules=["score"], **(defaults | settings))
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / SCORE_FILE).write_text(json.dumps({"gain": 0.5, "bias": -0.25}))
    return str(folder)


@pytest.fixture
def make_config(tmp_path: Path, base: Folders) -> Callable[..., PpoConfig]:
    def make(architecture: str = "llama", **options: Any) -> PpoConfig:
        path = base(architecture)
        reward = tmp_path / "reward"
        if not reward.exists():
            save_reward_adapters(reward, path)
        defaults: dict[str, Any] = {
            "actor": ModelConfig(path=path, lora=LORA),
            "critic": CriticConfig(lora=LORA, tokenizer=path),
            # Named, because transformers adds its special token to any tokenizer in a folder with Qwen2's config.
            "reward": RewardModelConfig(path=str(reward), tokenizer=path),
            "share_base": True,
            "data": DataConfig(paths=("prompts.jsonl",), format="prompt", template="plain"),
            "run": PpoRunConfig(output_dir="unused"),
            "engine": EngineConfig(zero_stage=2, precision="fp32"),
            "actor_optim": FAST,
            "critic_optim": FAST,
            "sampling": SamplingConfig(max_new_tokens=8, temperature=0.7),
            "iterations": 4,
            "rollout_batch_size": 4,
            "train_batch_size": 4,
            "micro_batch_size": 2,
        }
        return PpoConfig(**(defaults | options))

    return make


def load(config: PpoConfig) -> Models:
    """The models of a run, the actor's adapters with values as if they had been trained before."""

    def trained_before(*arguments: Any) -> Any:
        model = load_causal_lm(*arguments)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    with mock.patch("step3_ppo.models.load_causal_lm", trained_before):
        return load_models(config, load_tokenizer(config.actor))


def modules(models: Models) -> dict[str, nn.Module]:
    engines = {"actor": models.actor, "critic": models.critic, "reward model": models.reward_model}
    return {name: engine.module for name, engine in engines.items() if engine is not None}


def is_own(name: str) -> bool:
    """Whether a parameter is of a model's adapters or of its head; a language model's head is frozen with its base."""
    return "lora_" in name or "score" in name


def base_weights(model: Any) -> dict[str, Tensor]:
    """The decoder's weights, by the names that they have without adapters."""
    adapted = model.model if isinstance(model, ScalarModel) else model
    named = adapted.get_base_model().base_model.named_parameters()
    return {name.replace(".base_layer", ""): weight for name, weight in named if not is_own(name)}


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: weight.data_ptr() for name, weight in base_weights(model).items()}


def frozen_bytes(models: Models) -> int:
    """Of the distinct memory that holds weights which are nobody's adapter."""
    weights = [p for model in modules(models).values() for name, p in model.named_parameters() if not is_own(name)]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in weights}.values())


def outputs(models: Models, batch: Batch) -> dict[str, Tensor]:
    """What each model says of a batch."""
    with evaluation_mode(models.actor):
        logprobs = response_logprobs(models.actor, batch, 1.0)[0]
        with models.reference() as reference:
            ref_logprobs = response_logprobs(reference, batch, 1.0)[0]
        found = {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
        if models.critic is not None:
            found["values"] = critic_values(models.critic, batch)
        if models.reward_model is not None:
            found["scores"] = reward_scores(models.reward_model, batch)
    return found


def take_update(models: Models, config: PpoConfig, iteration: int) -> Rollout:
    rollout = collect(models, PROMPTS, config, iteration)
    experience, _ = make_experience(rollout, config, config.kl.coefficient)
    update(models, experience, config, iteration, None, None)
    return rollout


# The numbers


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gpt_neox", "opt"])
def test_all_models_say_what_models_with_weights_of_their_own_say(
    make_config: Callable[..., PpoConfig], architecture: str
) -> None:
    """llama, gpt2 and opt tie their embeddings; gpt2 keeps its matrices transposed."""
    config = make_config(architecture)
    shared, apart = load(config), load(replace(config, share_base=False))
    rollout = collect(apart, PROMPTS, config, 0)
    expected = outputs(apart, rollout.batch)
    for name, found in outputs(shared, rollout.batch).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-6)
    assert shared.score_scale == apart.score_scale == (0.5, -0.25)
    # All that the adapters say is far above the tolerance.
    without = load_scalar_model(ModelConfig(path=config.actor.path), torch.float32, head="normal")
    assert (reward_scores(without, rollout.batch) - expected["scores"]).abs().min() > 1e-3
    assert (expected["logprobs"] - expected["ref_logprobs"]).abs().max() > 1e-3


def test_a_rollout_is_that_of_models_with_weights_of_their_own(make_config: Callable[..., PpoConfig]) -> None:
    config = make_config()
    found, expected = (
        collect(load(replace(config, share_base=shares)), PROMPTS, config, 0) for shares in (True, False)
    )
    assert [c.response_ids for c in found.completions] == [c.response_ids for c in expected.completions]
    for name in ("scores", "values", "logprobs", "ref_logprobs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6)


# The memory


@pytest.mark.parametrize(
    ("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16")]
)
def test_the_base_is_one_memory_that_updates_leave_as_it_is(
    make_config: Callable[..., PpoConfig], zero_stage: Any, precision: Any
) -> None:
    """F8"""
    config = make_config("qwen2", engine=EngineConfig(zero_stage=zero_stage, precision=precision))
    models = load(config)
    # On a GPU too: where one module is moved, the others follow only if they hold the same objects.
    for name, weight in base_weights(models.actor.module).items():
        assert all(base_weights(model)[name] is weight for model in modules(models).values())
    saved = load_file(Path(config.actor.path) / "model.safetensors")
    trained_before = {
        (name, parameter): weight.detach().clone()
        for name, model in modules(models).items()
        for parameter, weight in model.named_parameters()
        if weight.requires_grad
    }
    assert {name for name, _ in trained_before} == {"actor", "critic"}
    scorer = {name: p.detach().clone() for name, p in modules(models)["reward model"].named_parameters()}
    for iteration in range(2):
        take_update(models, config, iteration)
        actor, critic, reward_model = (addresses(model) for model in modules(models).values())
        assert actor == critic == reward_model
        assert len(actor) == len(saved) - 1  # all but the language model's head
    for name, weight in base_weights(models.actor.module).items():
        assert torch.equal(weight, saved[f"model.{name}"].to(weight.dtype)), name
        assert not weight.requires_grad
    for name, p in modules(models)["reward model"].named_parameters():
        assert torch.equal(p, scorer[name]), name
    for (model, name), before in trained_before.items():
        assert is_own(name)
        assert not torch.equal(modules(models)[model].get_parameter(name), before), (model, name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_frozen_weights_take_a_third(make_config: Callable[..., PpoConfig], architecture: str) -> None:
    """As many bytes as the file of the base has; apart, the three decoders have those of one each."""
    config = make_config(architecture, estimator="reinforce_pp")  # without a critic: apart, that trains its base
    saved = load_file(Path(config.actor.path) / "model.safetensors")
    whole = sum(weight.nbytes for weight in saved.values())
    decoder = sum(weight.nbytes for name, weight in saved.items() if "lm_head" not in name)
    assert frozen_bytes(load(config)) == whole
    assert frozen_bytes(load(replace(config, share_base=False))) == whole + decoder
    with_critic = make_config(architecture)
    assert frozen_bytes(load(with_critic)) == whole
    assert frozen_bytes(load(replace(with_critic, share_base=False))) == whole + 2 * decoder


@pytest.mark.parametrize(
    ("still", "moved", "unmoved"),
    [
        ("critic_optim", "logprobs", ("ref_logprobs", "values", "scores")),
        ("actor_optim", "values", ("logprobs", "scores")),
    ],
    ids=["actor", "critic"],
)
def test_an_update_of_one_model_changes_nothing_that_another_says(
    make_config: Callable[..., PpoConfig], still: str, moved: str, unmoved: tuple[str, ...]
) -> None:
    config = make_config(**{still: SLOW})
    models = load(config)
    batch = collect(models, PROMPTS, config, 0).batch
    before = outputs(models, batch)
    take_update(models, config, 0)
    after = outputs(models, batch)
    assert all(torch.equal(after[name], before[name]) for name in unmoved)
    assert (after[moved] - before[moved]).abs().max() > 1e-3


def test_each_model_keeps_its_own_attention_and_packing(make_config: Callable[..., PpoConfig]) -> None:
    critic = CriticConfig(lora=LORA, attention="eager", gradient_checkpointing=True)
    config = make_config(critic=critic)
    models = load(replace(config, reward=replace(config.reward, packing=False)))
    found = {name: transformer_of(model).config._attn_implementation for name, model in modules(models).items()}
    assert found == {"actor": "sdpa_packed", "critic": "eager", "reward model": "sdpa"}
    take_update(models, config, 0)


# What is saved


@pytest.mark.parametrize("merge_on_save", [False, True])
def test_what_is_exported_loads_to_the_same_numbers(
    make_config: Callable[..., PpoConfig], tmp_path: Path, merge_on_save: bool
) -> None:
    """O5, R8"""
    lora = replace(LORA, merge_on_save=merge_on_save)
    config = make_config("gpt2", critic=CriticConfig(lora=lora))
    config = replace(config, actor=replace(config.actor, lora=lora))
    models = load(config)
    rollout = take_update(models, config, 0)
    export(models.actor, tmp_path / "actor", TOKENIZER, config.actor)
    export(models.critic, tmp_path / "critic", TOKENIZER, critic_source(config))
    assert holds_adapter(tmp_path / "actor") is holds_adapter(tmp_path / "critic") is not merge_on_save
    expected = outputs(models, rollout.batch)
    with torch.no_grad():
        actor = load_causal_lm(ModelConfig(path=str(tmp_path / "actor")), torch.float32)
        logprobs = response_logprobs(actor, rollout.batch, 1.0)[0]
        critic = load_scalar_model(ModelConfig(path=str(tmp_path / "critic")), torch.float32)
        values = critic_values(critic, rollout.batch)
    torch.testing.assert_close(logprobs, expected["logprobs"], rtol=0, atol=1e-6)
    torch.testing.assert_close(values, expected["values"], rtol=0, atol=1e-6)
    if not merge_on_save:  # it may share again
        again = load(replace(config, critic=replace(config.critic, path=str(tmp_path / "critic"))))
        torch.testing.assert_close(outputs(again, rollout.batch)["values"], expected["values"], rtol=0, atol=1e-6)


def length(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_where_a_function_scores_the_critic_starts_at_0_on_the_actors_base(
    make_config: Callable[..., PpoConfig], tmp_path: Path
) -> None:
    config = make_config(reward=RewardModelConfig(function="tests.test_shared_base:length"))
    models = load(config)
    assert outputs(models, collect(models, PROMPTS, config, 0).batch)["values"].count_nonzero() == 0
    rollout = take_update(models, config, 0)
    actor, critic = (addresses(model) for model in modules(models).values())
    assert actor == critic
    export(models.critic, tmp_path / "critic", TOKENIZER, critic_source(config))
    again = load_scalar_model(ModelConfig(path=str(tmp_path / "critic")), torch.float32)
    values = outputs(models, rollout.batch)["values"]
    assert values.count_nonzero() > 0
    with torch.no_grad():
        torch.testing.assert_close(critic_values(again, rollout.batch), values, rtol=0, atol=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actor": ModelConfig(path="x")}, r"actor\.lora\.rank is 0, .*: set actor\.lora\.rank, or leave share_base"),
        ({"critic": CriticConfig()}, r"critic\.lora\.rank is 0, .*: set critic\.lora\.rank"),
        ({"engine": EngineConfig(zero_stage=3)}, r"engine\.zero_stage is 3, .*: set zero_stage to 2"),
        (
            {"reward": RewardModelConfig(function="a:b"), "estimator": "reinforce_pp"},
            r"reinforce_pp has no critic and reward\.function needs no model.*: leave share_base out",
        ),
    ],
)
def test_options_that_leave_nothing_to_share_are_refused(
    make_config: Callable[..., PpoConfig], options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"share_base is True, but {message}"):
        make_config(**options)


def refused(config: PpoConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_models(config, TOKENIZER)


def test_a_reward_model_on_another_base_is_refused(
    make_config: Callable[..., PpoConfig], tmp_path: Path, tiny_reward_model: Folders
) -> None:
    config = make_config()
    other = save_tiny_model(tmp_path / "other", seed=9)
    over_other = save_reward_adapters(tmp_path / "over_other", other)
    remedy = "train step 2 with lora.rank above 0 from that very model"
    for path, found in (
        (over_other, f"adapters .SEQ_CLS. over {other}"),
        (tiny_reward_model("llama"), "a whole model"),
    ):
        for estimator, option in (("gae", "critic.path"), ("reinforce_pp", "reward.path")):
            changed = replace(config, reward=RewardModelConfig(path=path), estimator=estimator)
            refused(changed, f"{option} is {path}, {found}, but share_base needs .*{config.actor.path}.*: {remedy}")
    refused(replace(config, critic=CriticConfig(path=other, lora=LORA)), f"critic.path is {other}, a whole model")
    refused(replace(config, actor=replace(config.actor, revision="v2")), "at the same revision")
    actor: Any = load_causal_lm(config.actor, torch.float32)
    actor.save_pretrained(tmp_path / "sft")
    TOKENIZER.save_pretrained(tmp_path / "sft")
    sft = str(tmp_path / "sft")
    refused(replace(config, critic=CriticConfig(path=sft, lora=LORA)), r"critic.path is .*, adapters \(CAUSAL_LM\)")
    refused(
        replace(config, actor=replace(config.actor, path=sft)),
        r"actor\.path is .*sft, which holds adapters.*\(train step 1 with lora\.merge_on_save\)",
    )


def test_the_base_may_be_named_in_another_way(make_config: Callable[..., PpoConfig], tmp_path: Path) -> None:
    config = make_config()
    (tmp_path / "link").symlink_to(config.actor.path)
    models = load(replace(config, actor=replace(config.actor, path=f"{tmp_path}/reward/../link")))
    actor, critic, _ = (addresses(model) for model in modules(models).values())
    assert actor == critic


@pytest.mark.parametrize(
    "lora",
    [LoraConfig(rank=8, alpha=ALPHA), LoraConfig(rank=RANK), LoraConfig(rank=RANK, alpha=ALPHA, target_modules=("q",))],
    ids=["rank", "alpha", "targets"],
)
def test_a_critic_of_other_adapters_than_it_goes_on_with_is_refused(
    make_config: Callable[..., PpoConfig], lora: LoraConfig
) -> None:
    message = r"critic\.lora is not that of .*reward, .*: set critic\.lora\.rank to 4 and critic\.lora\.alpha to 8\.0"
    refused(make_config(critic=CriticConfig(lora=lora)), message)


def test_chosen_layers_may_be_named_again_for_the_critic(make_config: Callable[..., PpoConfig], tmp_path: Path) -> None:
    config = make_config()
    shutil.rmtree(tmp_path / "reward")
    save_reward_adapters(tmp_path / "reward", config.actor.path, target_modules=["v_proj", "q_proj"])
    critic = CriticConfig(lora=replace(LORA, target_modules=("q_proj", "v_proj")))
    found = modules(load(replace(config, critic=critic)))["critic"]
    trained = [name for name, p in found.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 + 1  # blocks, layers, A and B; the head


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_adapters_that_change_the_base_itself_are_refused(
    make_config: Callable[..., PpoConfig], tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = make_config()
    shutil.rmtree(tmp_path / "reward")
    save_reward_adapters(tmp_path / "reward", config.actor.path, **settings)
    refused(config, "whose bias or init_lora_weights in adapter_config.json changes weights of the base")
