"""Load what the pipeline trains: a causal language model, or one with a scalar head in place of the vocabulary."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig as AdapterConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from training.config import LoraConfig, ModelConfig
from training.head import let_chunk
from training.packing import PackedBatch, let_pack, packs
from training.untrusted import (
    ADAPTER_FILE,
    check_config,
    check_model,
    check_path,
    check_tokenizer,
    read_adapter,
    read_number,
    read_object,
)

# Every rank would print its own bars and notes; what matters of them, missing weights, is checked here.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

SCORE_FILE = "score_normalization.json"


class ScalarHead(nn.Linear):
    """hidden -> 1, multiplied in float32: in bf16 a score of 3.14 would be known only to 0.01."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float())


class ScalarModel(nn.Module):
    """A decoder with one number per position: reward model or critic.

    Wraps Hugging Face's sequence-classification model, so that the saved folder loads there as well; the score is
    read by this project's own masks, not by comparing ids with the pad token.
    """

    def __init__(self, model: nn.Module, gain: float = 1.0, bias: float = 0.0) -> None:
        """
        Args:
            model: a sequence-classification model with one label, or a peft model around one.
            gain, bias: the score is gain * (head's output) + bias.
        """
        super().__init__()
        self.model: Any = model
        self.gain = gain
        self.bias = bias

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, time] float32: the normalised score after each position of `input_ids` [batch, time].

        What it is in padding is undefined.
        """
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if packs(model):
            packed = PackedBatch(input_ids, attention_mask)
            hidden = model.base_model(**packed.inputs, use_cache=False).last_hidden_state[0]
            return packed.unpack(self.gain * model.score(hidden)[:, 0] + self.bias)
        hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self.gain * model.score(hidden.last_hidden_state)[..., 0] + self.bias

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.model.gradient_checkpointing_enable(**kwargs)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token.

    Where there is none, EOS fills in: no new embedding, and masks never look at ids, so nothing confuses the two.
    """
    path = config.tokenizer or config.path
    check_path(path)
    with _reading(path):
        check_tokenizer(path, config.revision)
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.path} has no EOS token: responses could not end; choose another")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def eos_token_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's EOS, then those of the model's generation config."""
    ids = [tokenizer.eos_token_id]
    with contextlib.suppress(OSError):  # the file is optional
        listed = GenerationConfig.from_pretrained(config.path, revision=config.revision).eos_token_id
        ids += listed if isinstance(listed, list) else [listed]
    return list(dict.fromkeys(i for i in ids if i is not None))


def load_causal_lm(config: ModelConfig, dtype: torch.dtype, zero3_options: dict | None = None) -> nn.Module:
    """A causal language model, with new LoRA adapters if `config.lora.rank` > 0.

    Args:
        config: where to load from: a hub name, a folder, or a folder with adapters, which are merged.
        dtype: of the weights.
        zero3_options: DeepSpeed options to split the weights over ranks while loading; None loads whole weights.

    Raises:
        ValueError: weights are missing from the folder or left over.
    """
    model = _load(AutoModelForCausalLM, config, dtype, zero3_options)
    let_chunk(model)
    return _finish(model, config, task="CAUSAL_LM")


def load_scalar_model(
    config: ModelConfig, dtype: torch.dtype, zero3_options: dict | None = None, *, head: str = "saved"
) -> ScalarModel:
    """A model with a scalar head.

    Args:
        config, dtype, zero3_options: as for `load_causal_lm`.
        head: "saved" needs a head in the folder (a reward model). "normal" draws a new one where there is none, from
            N(0, 1/(d+1)) (Stiennon et al. 2020, appendix B.1); "zero" makes its output 0 (a critic that starts blind).
    """
    model, is_new = _load_with_head(config, dtype, zero3_options)
    if is_new and head == "saved":
        raise ValueError(
            f"{config.path} holds a language model without a score head, not a reward model: give the folder that "
            "step 2 wrote (its `final`), or train one with step2_reward"
        )
    if is_new:
        _draw_head(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1) if head == "normal" else 0.0)
    gain, bias = _read_normalization(config.path)
    return ScalarModel(_finish(model, config, task="SEQ_CLS"), gain, bias)


def load_scalar_model_on(base: PeftModel, config: ModelConfig, dtype: torch.dtype) -> ScalarModel:
    """A model with a scalar head and adapters whose other weights are those of `base`: the same memory.

    Args:
        base: as `load_causal_lm` gives it with adapters, not yet in an engine.
        config: of the same base. A folder with adapters of a reward model gives adapters and head, which are trained
            on if `config.lora.rank` > 0 and are frozen otherwise. From the base itself both are new, the output 0.
        dtype: of the weights.

    Raises:
        ValueError: the adapters do not fit.
    """
    whole = base.get_base_model()
    base_config = _read_config(whole.name_or_path, config, num_labels=1)
    with torch.device("meta"):  # the weights are there already
        model = AutoModelForSequenceClassification.from_config(
            base_config, attn_implementation=config.attention, trust_remote_code=config.trust_remote_code
        )
    _put_head(model)
    model.score.weight = nn.Parameter(torch.zeros_like(model.score.weight, dtype=dtype, device="cpu"))
    _take_weights(model.base_model, whole.base_model)
    if config.packing:
        let_pack(model)
    if holds_adapter(config.path):
        trained = config.lora.rank > 0
        model = _with_adapters(model, config.path, is_trainable=trained, autocast_adapter_dtype=False)
    gain, bias = _read_normalization(config.path)
    return ScalarModel(_finish(model, config, task="SEQ_CLS"), gain, bias)


def is_reward_model(config: ModelConfig) -> bool:
    """Whether the folder or hub name holds a model with a score head."""
    if holds_adapter(config.path):
        return _read_adapter(config.path).get("task_type") == "SEQ_CLS"
    with _reading(config.path):
        check_config(config.path, config.revision)
        saved = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    return any("ForSequenceClassification" in name for name in saved.architectures or [])


def holds_adapter(path: str | Path) -> bool:
    """Whether a folder holds LoRA adapters rather than a whole model."""
    check_path(path)
    return (Path(path) / ADAPTER_FILE).exists()


def load_merged(adapter: Path, source: ModelConfig, dtype: torch.dtype, *, with_head: bool) -> PreTrainedModel:
    """The model of `source` with the adapters of the folder `adapter` added to its weights, whole, in host memory."""
    if with_head:
        base, _ = _load_with_head(source, dtype, None)
    else:
        base = _load(AutoModelForCausalLM, source, dtype, None)
    return _merge(base, adapter)


def _load_with_head(
    config: ModelConfig, dtype: torch.dtype, zero3_options: dict | None
) -> tuple[PreTrainedModel, bool]:
    """The sequence-classification model, and whether its head is new."""
    is_new = not is_reward_model(config)
    model = _load(AutoModelForSequenceClassification, config, dtype, zero3_options, new_head=is_new, num_labels=1)
    _put_head(model)
    return model, is_new


def _put_head(model: PreTrainedModel) -> None:
    """Makes the head of a sequence-classification model a `ScalarHead`."""
    if not hasattr(model, "score"):
        raise ValueError(
            f"{type(model).__name__} of {model.name_or_path} keeps its head elsewhere: choose another architecture"
        )
    head = ScalarHead(1, 1, bias=False)
    head.weight = model.score.weight
    head.in_features = model.score.in_features
    model.score = head


def _take_weights(decoder: nn.Module, source: nn.Module) -> None:
    """Gives a decoder the frozen weights of another one, which has adapters, as its own."""
    names = dict(source.named_parameters(remove_duplicate=False))
    taken = {name.replace("base_layer.", ""): weight for name, weight in names.items() if not weight.requires_grad}
    # The very parameters, not only their values: a move to the GPU then moves them for all who hold them.
    for name, value in [*taken.items(), *source.named_buffers()]:
        module, _, last = name.rpartition(".")
        setattr(decoder.get_submodule(module), last, value)


def _load(
    auto_class: Any,
    config: ModelConfig,
    dtype: torch.dtype,
    zero3_options: dict | None,
    new_head: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    if holds_adapter(config.path):
        adapters = _read_adapter(config.path)
        base = replace(config, path=adapters["base_model_name_or_path"], revision=adapters.get("revision"))
        # Merged on every rank in full: adding to a weight that is split over ranks would miss most of it.
        model = _load_weights(auto_class, base, dtype, new_head="num_labels" in overrides, **overrides)
        return _merge(model, config.path)
    with _split_while_loading(zero3_options):
        return _load_weights(auto_class, config, dtype, new_head=new_head, **overrides)


def _load_weights(
    auto_class: Any, config: ModelConfig, dtype: torch.dtype, *, new_head: bool, **overrides: Any
) -> PreTrainedModel:
    path = config.path
    with _reading(path):
        check_model(path, config.revision)
        model, info = auto_class.from_pretrained(
            path,
            config=_read_config(path, config, **overrides),
            revision=config.revision,
            dtype=dtype,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with a message that names them
        )
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if new_head:
        missing.discard("score.weight")
        unexpected.discard("lm_head.weight")
        unexpected.discard("embed_out.weight")
    reshaped = [f"{name} {tuple(saved)} instead of {tuple(ours)}" for name, saved, ours in info["mismatched_keys"]]
    if missing or unexpected or reshaped:
        raise ValueError(
            f"{path} does not hold the weights of {type(model).__name__}: missing {_few(missing)}, unexpected "
            f"{_few(unexpected)}, of another shape {_few(reshaped)}. Give a folder written by save_pretrained for "
            "this architecture"
        )
    if config.packing:
        let_pack(model)
    return model


def _read_config(path: str, config: ModelConfig, **overrides: Any) -> PretrainedConfig:
    model_config = AutoConfig.from_pretrained(
        path, revision=config.revision, trust_remote_code=config.trust_remote_code, **overrides
    )
    _switch_dropout_off(model_config)
    return model_config


def _merge(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """`model` with the adapters of a folder added to its weights."""
    return _with_adapters(model, folder).merge_and_unload().requires_grad_(True)  # peft froze what it adapted


def _with_adapters(model: PreTrainedModel, folder: str | Path, **options: bool) -> PeftModel:
    """`model` with the adapters of a folder beside its weights, without dropout; `options` of peft's loader."""
    _read_adapter(folder)
    settings = AdapterConfig.from_pretrained(folder)
    if settings.task_type == "CAUSAL_LM":
        settings.task_type = None  # else peft asks for a model that generates, and under a score head it does not
    settings.lora_dropout = 0.0  # that of the run that trained them
    try:
        adapted = PeftModel.from_pretrained(model, folder, config=settings, **options)
        # Loaded once more, because only this call tells what did not fit.
        info = adapted.load_adapter(folder, adapted.active_adapter, **options)
        missing, unexpected = info.missing_keys, info.unexpected_keys
    except KeyError as error:  # a module that is saved whole: the head
        missing, unexpected = list(error.args), []
    if missing or unexpected:
        raise ValueError(
            f"{folder} does not hold the adapters of {type(model).__name__}: missing {_few(missing)}, unexpected "
            f"{_few(unexpected)}. Give a folder written by save_pretrained on this base model"
        )
    return adapted


def _read_adapter(folder: str | Path) -> dict[str, Any]:
    with _reading(str(folder)):
        return read_adapter(folder)


def _few(names: Any) -> str:
    names = sorted(str(name) for name in names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def _switch_dropout_off(config: PretrainedConfig) -> None:
    """PPO compares log-probabilities of two forwards: they must be functions of the weights alone."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turns what a library says of files that it cannot read into a sentence that names the model."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        absent = "" if Path(path).exists() else "there is no such folder, and as a name on the hub: "
        raise ValueError(f"{path} cannot be loaded: {absent}{' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _split_while_loading(zero3_options: dict | None) -> Iterator[None]:
    if zero3_options is None:
        yield
        return
    keep_alive = HfDeepSpeedConfig(zero3_options)  # transformers holds only a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


def _finish(model: PreTrainedModel | PeftModel, config: ModelConfig, task: str) -> nn.Module:
    if config.lora.rank > 0 and not isinstance(model, PeftModel):
        peft_config = _peft_config(config.lora, task)
        model = get_peft_model(model, peft_config, autocast_adapter_dtype=False, revision=config.revision)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora.rank > 0:
            model.enable_input_require_grads()
    return model


def _peft_config(lora: LoraConfig, task: str) -> PeftLoraConfig:
    return PeftLoraConfig(
        task_type=task,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
        exclude_modules=["score"] if task == "SEQ_CLS" and not lora.target_modules else None,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def _draw_head(weight: nn.Parameter, std: float) -> None:
    """Fill the head in place; the same numbers on every rank, whatever their seeds."""
    parameters = [weight] if hasattr(weight, "ds_id") else []
    with torch.no_grad(), deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if parameters else None):
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * std
        weight.copy_(drawn.to(weight))


def _read_normalization(path: str) -> tuple[float, float]:
    if not (Path(path) / SCORE_FILE).exists():
        return 1.0, 0.0
    with _reading(path):
        values = read_object(path, SCORE_FILE, revision=None) or {}
        return read_number(values, "gain", SCORE_FILE), read_number(values, "bias", SCORE_FILE)


def check_same_tokenizer(
    actor: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str, remedy: str
) -> None:
    """Refuse a model that would read the actor's ids as other words.

    Args:
        actor, other: the two tokenizers.
        role: what the other model is, for the message.
        remedy: what to do, for the message.

    Raises:
        ValueError: the vocabularies differ.
    """
    if actor.get_vocab() == other.get_vocab() and actor.eos_token_id == other.eos_token_id:
        return
    raise ValueError(
        f"the tokenizers of the actor ({len(actor)} tokens) and of the {role} ({len(other)} tokens) differ, so the "
        f"{role} would read other text than was written: {remedy}"
    )
