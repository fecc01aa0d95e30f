"""Options that two or more stages use, and their checks. Imports no torch, so a wrong option is refused at once."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def num_processes() -> int:
    """Processes of the run, as its launcher tells; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_range(config: object, *names: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuses a field of `config` outside [low, high]; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"a number from {low} to {high}"
            raise ValueError(f"{name} is {value}: it needs {limits}")


def check_positive(config: object, *names: str) -> None:
    """Refuses a field of `config` that is 0, negative or not finite; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: it needs a number above 0")


def check_not_empty(config: object, *names: str) -> None:
    """Refuses a field of `config` that is an empty string, tuple or dict."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{name} is empty: it needs a value")


def holds_json_object(path: Path) -> bool:
    """Whether a file is one JSON object: {...}."""
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def check_batch_sizes(
    train_batch_size: int, micro_batch_size: int, world_size: int, micro_batch_tokens: int | None = None
) -> None:
    """Refuses a batch that does not give every GPU equally many micro-batches, or rows where tokens make them up."""
    unit, name = micro_batch_size * world_size, "micro_batch_size x GPUs"
    if micro_batch_tokens is not None:
        unit, name = world_size, "GPUs"
    if train_batch_size < 1 or unit < 1 or train_batch_size % unit:
        nearest = max(1, (train_batch_size + unit // 2) // max(1, unit)) * unit
        raise ValueError(f"train_batch_size is {train_batch_size}, not a multiple of {name} ({unit}): try {nearest}")


def check_micro_batch_tokens(micro_batch_tokens: int | None, longest: int) -> None:
    """Refuses a budget that the longest example, of `longest` tokens, may not fit into."""
    if micro_batch_tokens is not None and micro_batch_tokens < longest:
        raise ValueError(
            f"micro_batch_tokens is {micro_batch_tokens}, less than the longest example may have ({longest}): raise "
            "it, or lower the limits of prompts and responses"
        )


def check_held_out(data: "DataConfig") -> None:
    """Refuses data of which nothing is held out: every step says whether it helped."""
    if data.eval_size == 0 and not data.eval_paths:
        raise ValueError("data.eval_size is 0: hold out at least 1 example, or name a file in data.eval_paths")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters in place of full fine-tuning (Hu et al. 2021)."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights instead. Larger values learn more and cost memory in proportion."""
    alpha: float = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of adapter inputs dropped in training, from 0 to below 1. PPO wants 0: its ratios compare two forwards."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter; empty means every linear layer of the decoder blocks."""
    merge_on_save: bool = False
    """Saves one merged model in place of the adapter. Takes the disk space of the whole model."""

    def __post_init__(self) -> None:
        check_range(self, "rank", low=0)
        check_positive(self, "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it needs a number from 0 to below 1")
        if self.rank == 0 and (self.target_modules or self.merge_on_save):
            raise ValueError("rank is 0, but target_modules or merge_on_save is given: set rank, or leave them out")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pretrained causal language model."""

    path: str
    """Hub name or folder of the model, in the Hugging Face layout with safetensors weights."""
    tokenizer: str | None = None
    """Hub name or folder of the tokenizer; None takes the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None takes the newest."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model. Only for authors whom you trust with this machine."""
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass: much less memory for about a third more time."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel. flash_attention_2 needs the package flash-attn and a GPU."""
    packing: bool = True
    """Leave padding out of what is computed, with sdpa and the usual architectures; others compute it. Results are the
    same to rounding."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters; off unless rank is set."""

    def __post_init__(self) -> None:
        check_not_empty(self, "path")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training examples and the held-out ones."""

    paths: tuple[str, ...]
    """Files (.jsonl, .json, .csv, .parquet) or hub names, read one after the other."""
    format: str
    """How a record becomes an example; the key of a format in training/formats.py."""
    template: Literal["plain", "chat"] = "chat"
    """How a prompt becomes text: the tokenizer's chat template, or the plain text as it stands."""
    split: str = "train"
    """Split to read of a data set from the hub."""
    eval_paths: tuple[str, ...] = ()
    """Held-out files or hub names; empty takes eval_size examples out of `paths`."""
    eval_size: int = 256
    """Number of examples held out from training when eval_paths is empty. More give steadier numbers, more slowly."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column names of the format on the left, those in your file on the right, where they differ."""
    max_prompt_tokens: int = 512
    """Longest prompt in tokens. Memory and time grow with it."""
    max_response_tokens: int = 512
    """Longest response in tokens, its end token included. Memory and time grow with it."""
    truncate_prompts: bool = False
    """Cuts long prompts on the left in place of skipping them."""
    truncate_responses: bool = False
    """Cuts long responses on the right in place of skipping them; they lose their end token."""
    max_examples: int | None = None
    """Number of examples to train on at most; None takes all."""
    seed: int = 0
    """Seed of the held-out split. Apart from the run's seed, so that the held-out set stays the same over seeds."""

    def __post_init__(self) -> None:
        check_not_empty(self, "paths", "format", "split")
        check_range(self, "eval_size", "seed", low=0)
        check_range(self, "max_prompt_tokens", "max_response_tokens", "max_examples", low=1)

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its response may have."""
        return self.max_prompt_tokens + self.max_response_tokens


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed holds and updates a model."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """Split over GPUs: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights. Less memory, more traffic."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the forward and backward pass. fp16 is for GPUs without bf16; fp32 takes twice the memory."""
    offload_optimizer: bool = False
    """Keeps the optimizer state in CPU memory: saves 12 bytes of GPU memory per weight and slows each step."""
    offload_parameters: bool = False
    """Keeps the weights in CPU memory, for zero_stage 3: fits larger models and slows each forward a lot."""
    gradient_clipping: float = 1.0
    """Longest norm of the gradient of one step; 0 leaves it as it is."""
    compile_layers: bool = False
    """Compiles the decoder layers for training and scoring: faster steps after a minute at the start, for long runs.
    Needs a C++ compiler. Results are the same to rounding."""
    activation_budget: float = 1.0
    """Share, from 0 to 1, of the activations that compiled layers keep for the backward pass; what is cheapest is
    computed again first. Saves less memory than gradient_checkpointing, and less time is lost. For compile_layers."""
    deepspeed_config: str | None = None
    """JSON file of raw DeepSpeed options, merged over the generated ones."""

    def __post_init__(self) -> None:
        check_range(self, "gradient_clipping", low=0)
        check_range(self, "activation_budget", low=0, high=1)
        if self.activation_budget < 1 and not self.compile_layers:
            raise ValueError(
                f"activation_budget is {self.activation_budget}, but compile_layers is False: set it to True, or use "
                "the model's gradient_checkpointing"
            )
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError(
                "precision is fp16, but zero_stage is 0, at which DeepSpeed divides gradients by a loss scale that the "
                "loss was not multiplied with: set zero_stage to 1, 2 or 3, or precision to bf16"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer is True, but zero_stage is 0: set zero_stage to 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters is True, but zero_stage is {self.zero_stage}: set zero_stage to 3")
        if self.deepspeed_config is not None and not Path(self.deepspeed_config).is_file():
            raise ValueError(f"deepspeed_config is {self.deepspeed_config}, not a file: give a JSON file or None")
        if self.deepspeed_config is not None and not holds_json_object(Path(self.deepspeed_config)):
            raise ValueError(f"deepspeed_config is {self.deepspeed_config}, which is not a JSON object: mend the file")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) and its learning rate."""

    lr: float
    """Highest learning rate. Too small learns slowly; too large makes the loss rise."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square (as in GPT-3, Brown et al. 2020)."""
    eps: float = 1e-8
    """Added to the divisor of the update."""
    weight_decay: float = 0.0
    """Pull of the weights towards 0, per step and unit of lr; not on biases and norms."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_fraction: float = 0.03
    """Share of the steps over which the learning rate rises from 0, from 0 to 1."""
    min_lr_fraction: float = 0.0
    """Learning rate at the end as a share of lr, from 0 to 1."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "eps")
        check_range(self, "weight_decay", low=0)
        check_range(self, "warmup_fraction", "min_lr_fraction", low=0, high=1)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}: it needs two numbers from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, its seed, and how often it reports."""

    output_dir: str
    """Folder of the run: metrics, checkpoints and the final model."""
    seed: int = 1
    """Seed of the data order, of new LoRA weights and of sampling. A new score head is the same for every seed."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int = 0
    """Steps between two evaluations on held-out data; 0 evaluates only before and after."""
    tensorboard: bool = False
    """Also writes the metrics for TensorBoard, into the run's folder."""
    wandb_project: str | None = None
    """Also sends the metrics to this project on Weights & Biases."""
    timeout_minutes: float = 30.0
    """How long a process waits for the others, and how long none of them may move, before the run ends with an error
    that names the process that is behind."""
    save_every: int = 0
    """Steps between two checkpoints; 0 saves by time alone. A run that is asked to stop saves in any case."""
    save_minutes: float = 30.0
    """Minutes between two checkpoints; 0 saves by steps alone. Each needs 12 bytes of disk for every trained weight."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, beside the one with the best evaluation."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest good checkpoint of `output_dir`, if there is one; never begins anew."""
    allow_changes: bool = False
    """Go on from a checkpoint also where options differ from those of the run that saved it."""
    max_skipped_steps: int = 5
    """Steps in a row whose gradient may be infinite or nan, and which are left out, before the run ends; with fp16 20
    more, as its loss scale falls."""

    def __post_init__(self) -> None:
        check_not_empty(self, "output_dir")
        check_range(self, "seed", "eval_every", low=0)
        check_range(self, "log_every", "keep_checkpoints", low=1)
        check_range(self, "save_every", "save_minutes", "max_skipped_steps", low=0)
        check_positive(self, "timeout_minutes")
