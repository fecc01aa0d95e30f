"""Write trained weights as ordinary Hugging Face folders, from any ZeRO stage, whole or as LoRA adapters."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from training.config import ModelConfig
from training.distributed import barrier, is_main
from training.durable import replace_folder
from training.models import SCORE_FILE, ScalarModel, holds_adapter, load_merged


def export(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelConfig,
    replacements: Mapping[str, Tensor] | None = None,
) -> None:
    """Save the engine's model so that `from_pretrained` loads it. Every rank must call this.

    The folder appears under its name only when it is complete: it is written beside and renamed.

    Args:
        engine: a trained causal LM, or `ScalarModel`, perhaps with adapters.
        folder: where to save; an older folder of that name is replaced.
        tokenizer: saved alongside.
        source: what the model was loaded from. Adapters are saved alone, unless `source.lora.merge_on_save`, or unless
            `source` itself holds adapters: then only a whole model can name what it stands on.
        replacements: on the main rank, whole values to save in place of some parameters' own (a moving average).
    """
    scalar = engine.module if isinstance(engine.module, ScalarModel) else None
    model: Any = scalar.model if scalar else engine.module
    state = gather_state(model, replacements or {})
    if is_main():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, state_dict=state)
        if isinstance(model, PeftModel) and (source.lora.merge_on_save or holds_adapter(source.path)):
            dtype = next(model.parameters()).dtype
            merged = load_merged(partial, source, dtype, with_head=scalar is not None)
            shutil.rmtree(partial)
            merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if scalar:
            (partial / SCORE_FILE).write_text(json.dumps({"gain": scalar.gain, "bias": scalar.bias}) + "\n")
        replace_folder(partial, folder)
    barrier()


def gather_state(model: nn.Module, replacements: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Whole weights in host memory on the main rank, None elsewhere. Every rank must call this.

    Args:
        model: a Hugging Face or peft model; its parameters may be split by ZeRO-3.
        replacements: whole values by name, to take in place of some parameters' own.
    """
    state: dict[str, Tensor] = {}
    adapters_only = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if adapters_only and not parameter.requires_grad:
            continue
        with whole(parameter):
            if is_main():
                state[name] = replacements.get(name, parameter).detach().to(parameter.dtype).cpu().clone()
    if not is_main():
        return None
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return state | ({} if adapters_only else buffers)


def whole(parameter: nn.Parameter) -> deepspeed.zero.GatheredParameters:
    """A context in which the parameter has all its values, also where ZeRO-3 splits it."""
    return deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id"))
