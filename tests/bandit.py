"""A language of single letters, small enough to sum over every response, and two scores whose best policy is known."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

LETTERS = "abcdefghijk"
COUNTED = LETTERS[:6]
EOS = 0
IDS = {letter: index for index, letter in enumerate(LETTERS, start=1)}

# Learnt positions, for rotary ones cannot tell "aa" from "a": what follows either would be the same. The weights are
# wide enough that a model of random ones predicts far from uniformly.
CONFIG = GPT2Config(
    vocab_size=len(LETTERS) + 1,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=16,
    initializer_range=0.1,
    bos_token_id=None,
    eos_token_id=EOS,
)


def save_letter_model(folder: Path, seed: int = 0) -> str:
    """Write a random causal LM over the letters and EOS, with its tokenizer, to `folder` and return its path."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    build_letter_tokenizer().save_pretrained(folder)
    return str(folder)


def build_letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, and EOS, which pads as well: no two responses of different tokens have the same text."""
    core = Tokenizer(models.WordLevel({"<eos>": EOS} | IDS))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def counting(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping]) -> list[float]:
    """Share of three letters that count on from the prompt's last, from f to a: after "cae", "fab" scores 1."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        last = COUNTED.index(prompt[-1])
        right = [COUNTED[(last + step) % len(COUNTED)] for step in (1, 2, 3)]
        scores.append(sum(one == other for one, other in zip(right, response, strict=False)) / 3)
    return scores


def tastes(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping]) -> list[float]:
    """A standard normal number for each pair of prompt and response, the same at every call."""
    return [random.Random(f"{p} {r}").gauss(0, 1) for p, r in zip(prompts, responses, strict=True)]


def response_probabilities(
    model: PreTrainedModel, prompt: str, max_new_tokens: int, temperature: float = 1.0
) -> dict[str, float]:
    """The probability of every response of at most `max_new_tokens` tokens, EOS included; they sum to 1.

    A text of fewer letters ended with EOS, one of as many was cut at the limit. One row for each text before the next
    token: no padding, no cache, nothing of the library.
    """
    ended: dict[str, float] = {}
    running = {"": 1.0}
    for _ in range(max_new_tokens):
        rows = torch.tensor([[IDS[letter] for letter in prompt + text] for text in running])
        with torch.no_grad():
            following = (model(rows).logits[:, -1].double() / temperature).softmax(-1).tolist()
        longer: dict[str, float] = {}
        for (text, probability), row in zip(running.items(), following, strict=True):
            ended[text] = probability * row[EOS]
            longer |= {text + letter: probability * row[IDS[letter]] for letter in LETTERS}
        running = longer
    return ended | running
