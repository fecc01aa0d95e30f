"""The score of a response: from a reward model, or from the user's function."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from training.data import Batch, collate, micro_batches
from training.examples import PromptExample
from training.forward import reward_scores
from training.generation.interface import Completion

ScoreFunction = Callable[[Sequence[str], Sequence[str], Sequence[Mapping]], Sequence[float]]
Scorer = Callable[[Batch, Sequence[PromptExample], Sequence[Completion]], Tensor]


def model_scorer(engine: Any, micro_batch_size: int) -> Scorer:
    """Scores from a reward model that reads the actor's token ids."""

    def score(batch: Batch, prompts: Sequence[PromptExample], completions: Sequence[Completion]) -> Tensor:
        with torch.no_grad():
            return torch.cat([reward_scores(engine, part) for part in micro_batches(batch, micro_batch_size)])

    return score


def retokenizing_scorer(
    engine: Any,
    micro_batch_size: int,
    actor_tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase,
) -> Scorer:
    """Scores from a reward model with another tokenizer: each text is decoded and tokenized again."""

    def score(batch: Batch, prompts: Sequence[PromptExample], completions: Sequence[Completion]) -> Tensor:
        rows = []
        responses = texts(actor_tokenizer, completions)
        for prompt, response, completion in zip(prompts, responses, completions, strict=True):
            ids = reward_tokenizer(prompt.text + response)["input_ids"]
            if completion.finished:  # a response that the limit has cut must not look like one that ended
                ids = [*ids, reward_tokenizer.eos_token_id]
            rows.append((ids, [True] * len(ids)))
        own = collate(rows, pad_id=reward_tokenizer.pad_token_id).to(batch.input_ids.device)
        with torch.no_grad():
            return torch.cat([reward_scores(engine, part) for part in micro_batches(own, micro_batch_size)])

    return score


def function_scorer(name: str, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """Scores from the user's function `module:function`.

    Raises:
        ValueError: there is no such function; or, when called, it did not return one finite number per response.
    """
    function = _import_function(name)

    def score(batch: Batch, prompts: Sequence[PromptExample], completions: Sequence[Completion]) -> Tensor:
        scores = list(function([p.text for p in prompts], texts(tokenizer, completions), [p.record for p in prompts]))
        if len(scores) != len(prompts):
            raise ValueError(f"{name} returned {len(scores)} scores for {len(prompts)} responses: return one for each")
        for prompt, number in zip(prompts, scores, strict=True):
            if not math.isfinite(number):
                raise ValueError(f"{name} returned {number} for the prompt at {prompt.source}: return a finite number")
        return torch.tensor(scores, dtype=torch.float32, device=batch.input_ids.device)

    return score


def _import_function(name: str) -> ScoreFunction:
    module_name, function_name = name.split(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward.function {name} cannot be imported from the current folder: {error}") from error


def texts(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion]) -> list[str]:
    """Responses as text, without special tokens."""
    return tokenizer.batch_decode([completion.response_ids for completion in completions], skip_special_tokens=True)
