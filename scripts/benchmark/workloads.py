"""What the PPO benchmark asks of every system: models, prompts, and how long each response is to be."""

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from scripts.benchmark.costs import SHAPES

# Ids of the tokenizer that every system gets. No prompt holds them; text is words w2, w3, ...
PAD, END, FIRST_WORD = 0, 1, 2
MODEL_SHAPES: dict[str, dict[str, Any]] = {
    **SHAPES,
    # What `--grow` takes on a CPU.
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 32, "num_attention_heads": 4}
    | {"vocab_size": 2048, "num_key_value_heads": 2, "tie_word_embeddings": True},
    # For tests.
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"vocab_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Workload:
    """Prompts of evenly drawn lengths; responses of exponentially drawn ones, or all of the same."""

    prompts: int
    samples_per_prompt: int
    min_prompt: int
    max_prompt: int
    mean_response: int
    """Tokens; the cap itself makes all responses equally long."""
    max_response: int


WORKLOADS = {
    "A": Workload(256, 1, 256, 256, 256, 256),
    "B": Workload(256, 1, 64, 256, 370, 1024),
    "C": Workload(32, 8, 64, 256, 370, 1024),
    "D": Workload(32, 1, 32, 64, 32, 64),
}


@dataclass(frozen=True)
class PpoJob:
    """One PPO iteration, as the workers are asked for it."""

    actor: str
    """Folder, as the next two."""
    reference: str
    reward: str
    """Where the critic starts, too."""
    precision: str
    prompt_ids: list[list[int]]
    response_lengths: list[list[int]]
    """Tokens of each response to each prompt."""
    micro_batch_size: int = 8
    """Responses of one forward and backward pass."""
    chunk_size: int = 64
    """Responses that TRL generates and scores together."""
    parts: int = 1
    """Rounds of generation, scoring and update that the iteration is cut into, where memory holds no more."""
    tuned: bool = False
    """Whether TRL does without what its defaults save memory with."""
    settings: list[str] = field(default_factory=list)
    """More options of step 3, for our side."""
    lora_rank: int = 0
    """Rank of the adapters that actor and critic learn in place of their weights; 0 for none."""
    lr: float = 1e-6
    epochs: int = 1
    responses: list[list[list[int]]] | None = None
    """Tokens of the responses, where they are not to be sampled."""

    @property
    def samples_per_prompt(self) -> int:
        return len(self.response_lengths[0])

    @property
    def rows(self) -> int:
        return len(self.prompt_ids) * self.samples_per_prompt

    @property
    def max_response(self) -> int:
        return max(map(max, self.response_lengths))


def draw_lengths(workload: Workload, seed: int) -> tuple[list[int], list[list[int]]]:
    """Tokens of the prompts, and of each one's responses. They depend on the workload and the seed alone.

    Responses take evenly spaced quantiles in random order, so that their mean is the workload's however few they are.
    """
    rng = random.Random(seed)
    prompts = [rng.randint(workload.min_prompt, workload.max_prompt) for _ in range(workload.prompts)]
    count = workload.prompts * workload.samples_per_prompt
    if workload.mean_response == workload.max_response:
        lengths = [workload.max_response] * count
    else:
        scale = exponential_scale(workload.mean_response, workload.max_response)
        drawn = [round(-scale * math.log1p(-(index + 0.5) / count)) for index in range(count)]
        lengths = [min(max(length, 1), workload.max_response) for length in drawn]
    rng.shuffle(lengths)
    size = workload.samples_per_prompt
    return prompts, [lengths[start : start + size] for start in range(0, count, size)]


def exponential_scale(mean: float, cap: float) -> float:
    """The scale s of an exponential variable whose minimum with `cap` has this mean: s (1 - exp(-cap / s)) = mean."""
    low, high = mean, 1e6 * cap
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if -middle * math.expm1(-cap / middle) < mean else (low, middle)
    return low


def draw_prompts(lengths: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Random words; no two prompts are alike, because systems find a response's length by its prompt."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(FIRST_WORD, vocab_size) for _ in range(length)] for length in lengths]
    if len(set(map(tuple, prompts))) < len(prompts):
        raise ValueError("two prompts are equal: choose another seed or longer prompts")
    return prompts


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words w2, w3, ... for all other ids of a model, so that text and tokens say the same."""
    words = {"<pad>": PAD, "<end>": END} | {f"w{index}": index for index in range(FIRST_WORD, vocab_size)}
    core = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<pad>", "<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>", padding_side="left")


def write_models(
    folder: Path, model: str | None, shape: str | None, layers: int | None, seed: int, scale: float = 1.0
) -> dict[str, Any]:
    """Folders of the actor and of a reward model with a random head, with one tokenizer; the reference is the actor.

    Args:
        model: folder of a causal language model; its own tokenizer is left out.
        shape: in place of a model, random weights of these sizes, in `layers` layers if that is not None.
        scale: what random matrices are multiplied by.
    """
    torch.manual_seed(seed)
    if model is not None:
        actor = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    else:
        sizes = {**MODEL_SHAPES[str(shape)], "max_position_embeddings": 8192}
        sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
        actor = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in actor.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(scale)
    actor.config.pad_token_id, actor.config.eos_token_id, actor.config.bos_token_id = PAD, END, END
    actor.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=END)
    vocab_size = actor.config.vocab_size
    folders = {"actor": str(folder / "actor"), "reward": str(folder / "reward")}
    actor.save_pretrained(folders["actor"])
    del actor
    reward = AutoModelForSequenceClassification.from_pretrained(folders["actor"], num_labels=1, dtype=torch.bfloat16)
    torch.nn.init.normal_(reward.score.weight, std=(reward.config.hidden_size + 1) ** -0.5)
    reward.save_pretrained(folders["reward"])
    for path in folders.values():
        word_tokenizer(vocab_size).save_pretrained(path)
    return {**folders, "reference": folders["actor"]}
