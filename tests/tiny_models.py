"""Tiny models of real architectures with random weights, saved as ordinary folders, and data for them."""

import copy
import json
import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.tiny_tokenizers import VOCAB_SIZE, build_tokenizer

SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_SIZES = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LLAMA_SIZES, **IDS, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**LLAMA_SIZES, **IDS),
    "qwen3": Qwen3Config(**LLAMA_SIZES, **IDS, head_dim=8),
    "mistral": MistralConfig(**LLAMA_SIZES, **IDS, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256, **IDS),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256, **IDS),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=256, **IDS),
}

# Architectures that only the rollout backends are tested on: of the last three none looks its attention up by name.
MORE_CONFIGS: dict[str, PretrainedConfig] = {
    "gemma2": Gemma2Config(**LLAMA_SIZES, **IDS, head_dim=8, sliding_window=8),
    "phi3": Phi3Config(**LLAMA_SIZES, **IDS, sliding_window=8),
    "gptj": GPTJConfig(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=256, **IDS),
    "bloom": BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, **IDS),
    "falcon": FalconConfig(**SIZES, alibi=False, max_position_embeddings=256, **IDS),
}


def save_tiny_model(folder: Path, architecture: str = "llama", seed: int = 0, hidden_scale: float = 3.0) -> str:
    """Write a random causal LM with its tokenizer to `folder` and return its path.

    `hidden_scale` widens the initial weights, so that the model's predictions are far from uniform and a mistake in
    masks or positions shows.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config((CONFIGS | MORE_CONFIGS)[architecture])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(hidden_scale)
    model.save_pretrained(folder)
    build_tokenizer(eos="<eos>").save_pretrained(folder)
    return str(folder)


def save_tiny_reward_model(folder: Path, architecture: str = "llama", seed: int = 1, hidden_scale: float = 3.0) -> str:
    """Write a random model with a score head and its tokenizer to `folder`, by transformers alone; return its path."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[architecture])
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(hidden_scale)
    model.save_pretrained(folder)
    build_tokenizer(eos="<eos>").save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_tiny_data(folder: Path, count: int = 48) -> dict[str, str]:
    """Demonstrations, pairs and prompts of a toy language whose responses are of vowels (good) or of consonants."""
    rng = random.Random(0)

    def word(letters: str) -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(2, 6)))

    prompts = [f"{index} {word('abcxyz')}:" for index in range(count)]
    vowels, consonants = [f" {word('aeiou')}" for _ in prompts], [f" {word('bcdfg')}" for _ in prompts]
    mixed = [rng.choice(pair) for pair in zip(vowels, consonants, strict=True)]
    return {
        "demonstrations": write_jsonl(
            folder / "demonstrations.jsonl",
            [{"prompt": p, "response": r} for p, r in zip(prompts, mixed, strict=True)],
        ),
        "pairs": write_jsonl(
            folder / "pairs.jsonl",
            [{"prompt": p, "chosen": v, "rejected": c} for p, v, c in zip(prompts, vowels, consonants, strict=True)],
        ),
        "prompts": write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in prompts]),
    }
