"""What TRL's workers share: models, options, and responses of the lengths that the job asks for."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from scripts.benchmark.workloads import FIRST_WORD, PAD, PpoJob

# In Llama, Mistral and Qwen.
LAYER_MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def peer(module: str) -> Any:
    """A module of TRL. Raises ImportError, which says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed, as `bash scripts/benchmark/peers.sh` installs it: {error}") from error


def causal_lm(folder: str, precision: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision])


def scalar_model(folder: str, precision: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPES[precision], num_labels=1)


def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder, padding_side="left")


def precision_options(precision: str) -> dict[str, bool]:
    """What TRL needs to be told; it refuses bf16 on a CPU that was not asked for."""
    return {"bf16": precision == "bf16", "use_cpu": not torch.cuda.is_available()}


def common_options(job: PpoJob, folder: str) -> dict[str, Any]:
    """Options of any TRL trainer: nothing saved, nothing reported, a constant learning rate."""
    return {
        "output_dir": folder,
        **precision_options(job.precision),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10**6,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.rows // job.parts // job.micro_batch_size,
    }


def lora(job: PpoJob) -> Any:
    """What peft needs for the job's adapters, on every matrix of the layers; None for none."""
    if job.lora_rank == 0:
        return None
    return peer("peft").LoraConfig(r=job.lora_rank, lora_alpha=32, target_modules=LAYER_MATRICES)


class ForcedLengths:
    """`model.generate`, whose rows end at the job's lengths and nowhere else; transformers pads them from there on."""

    def __init__(
        self, model: Any, job: PpoJob, end_id: int | None = None, mark: Callable[[str], None] = lambda phase: None
    ) -> None:
        """
        Args:
            model: its `generate` is replaced.
            end_id: what the last token of each response becomes, and no other one is; None changes none.
            mark: called with the name of the phase that begins, before and after each call.
        """
        self.generate, self.job, self.end_id, self.mark = model.generate, job, end_id, mark
        self.drawn: dict[tuple[int, ...], list[list[int]]] = {}
        model.generate = self

    def start(self) -> None:
        """Begins an iteration, in which each response is asked for once."""
        self.drawn = {tuple(ids): [] for ids in self.job.prompt_ids}
        self.left = {tuple(i): list(n) for i, n in zip(self.job.prompt_ids, self.job.response_lengths, strict=True)}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        self.mark("generate")
        prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        lengths = [self.left[prompt].pop(0) for prompt in prompts]
        width = input_ids.shape[1]
        ends = Ends(torch.tensor(lengths, device=input_ids.device) + width, self.end_id)
        output = self.generate(input_ids=input_ids, attention_mask=attention_mask, stopping_criteria=[ends], **options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        for prompt, row, length in zip(prompts, sequences, lengths, strict=True):
            self.drawn[prompt].append(row[width : width + length].tolist())
        self.mark("score")
        return output


class Ends:
    """A stopping criterion with an end for each row, which also takes care that nothing looks like an earlier one.

    TRL takes what follows the first pad or end token for padding, so where one of them was drawn another token stands.
    """

    # Transformers pads the rows that have ended only where a criterion has this.
    eos_token_id = None

    def __init__(self, ends: Tensor, end_id: int | None) -> None:
        """
        Args:
            ends: [rows] long, tokens of prompt and response.
            end_id: the last token of each response; None leaves what was drawn.
        """
        self.ends, self.end_id = ends, end_id

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """[rows] bool, from [rows, time] ids, whose last column transformers goes on with."""
        time, newest = input_ids.shape[1], input_ids[:, -1]
        special = newest == PAD
        if self.end_id is not None:
            special |= newest == self.end_id
        newest[special & (time <= self.ends)] = FIRST_WORD
        if self.end_id is not None:
            newest[time == self.ends] = self.end_id
        return time >= self.ends
