"""The least time of the PPO benchmark's iteration on this machine."""

import copy
from functools import reduce
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from scripts.benchmark.ceilings import Ceilings, measure_ceilings
from scripts.benchmark.costs import Cost, iteration_floor
from scripts.benchmark.workloads import PpoJob
from training.costs import DecoderShape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure_best(device: torch.device, dtype: torch.dtype, rows: int, tries: int = 3) -> Ceilings:
    return reduce(Ceilings.best, [measure_ceilings(device, dtype, rows) for _ in range(tries)])


def empty_model(folder: str, model_class: Any) -> Any:
    """Its shapes without its numbers."""
    with torch.device("meta"):
        return model_class.from_config(AutoConfig.from_pretrained(folder))


def with_adapters(model: Any, rank: int) -> Any:
    """The model, if the rank is above 0 with LoRA on all matrices of its layers."""
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear")) if rank else model


def floor_of(job: PpoJob, precision: str, ceilings: Ceilings) -> dict[str, Cost]:
    """The least time of the iteration at these rates."""
    frozen = [empty_model(job.actor, AutoModelForCausalLM), empty_model(job.reward, AutoModelForSequenceClassification)]
    trained = [with_adapters(copy.deepcopy(model), job.lora_rank) for model in frozen]
    return iteration_floor(
        [DecoderShape.of(model) for model in (trained if job.samples_per_prompt == 1 else trained[:1])],
        [DecoderShape.of(model) for model in frozen],
        [ids for ids in job.prompt_ids for _ in range(job.samples_per_prompt)],
        [length for lengths in job.response_lengths for length in lengths],
        batch_size=job.rows,
        number_bytes=DTYPES[precision].itemsize,
        flops_per_second=ceilings.flops_per_second,
        bytes_per_second=ceilings.bytes_per_second,
    )
