"""The score of a response: from a reward model, or from the user's function."""

import importlib
import math
import queue
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from step3_ppo.config import PpoConfig
from training import distributed
from training.accounting import Accounting
from training.data import Batch, collate, share_out
from training.examples import PromptExample
from training.forward import reward_scores
from training.generation.interface import Completion
from training.packing import repeated_tokens, rows_together

ScoreFunction = Callable[[Sequence[str], Sequence[str], Sequence[Mapping]], Sequence[float]]


class OwnRows:
    """The rows of a batch that this rank's models read, and which of them together."""

    def __init__(self, batch: Batch, config: PpoConfig) -> None:
        """Every rank must give the same batch, and has as many forwards as the others."""
        self.batch = batch
        sizes = batch.sizes
        together = [[row] for row in range(len(batch))]
        if config.micro_batch_tokens is not None:
            even_share = -(-sum(tokens for tokens, _ in sizes) // distributed.world_size())
            most_tokens = min(config.micro_batch_tokens, even_share)
            together = rows_together(batch.input_ids, batch.attention_mask, most_tokens)
        lengths = [sum(sizes[row][0] for row in rows) for rows in together]
        shares = share_out(lengths, distributed.world_size(), config.micro_batch_size, config.micro_batch_tokens)
        own = [sorted(row for number in part for row in together[number]) for part in shares[distributed.rank()]]
        # In the order of the batch, in which samples of one prompt are neighbours: packed rows then share it. A rank
        # without rows runs along with some, because its weights may be needed; what it finds is left out.
        parts = [(rows or [0], bool(rows)) for rows in own]
        self.counts = [is_counted for _, is_counted in parts]
        self.rows = [torch.tensor(part, dtype=torch.long, device=batch.input_ids.device) for part, _ in parts]
        self.micro_batches = [batch.rows(rows) for rows in self.rows]
        self.sizes = [[sizes[row] for row in part] for part, _ in parts]
        """Tokens and response tokens of each row of each micro-batch."""

    @cached_property
    def repeated(self) -> list[list[int]]:
        """Tokens of each micro-batch that packing computes once for several rows; asked for by the accounts alone."""
        return [repeated_tokens(b.input_ids, b.attention_mask) for b in self.micro_batches]

    def run(self, forward: Callable[[Batch], Tensor]) -> Tensor:
        """What `forward` says of all rows, each computed on one rank. Every rank must call this.

        Args:
            forward: Batch of some rows -> [rows] or [rows, time].

        Returns: [batch] or [batch, time], 0 in padding.
        """
        with torch.no_grad():
            found = [forward(micro_batch) for micro_batch in self.micro_batches]
        result = found[0].new_zeros(self.batch.input_ids.shape[: found[0].dim()])
        for rows, values, is_counted in zip(self.rows, found, self.counts, strict=True):
            if is_counted:
                columns = () if values.dim() == 1 else (slice(values.shape[1]),)
                result[rows, *columns] = values
        return distributed.sum_over_ranks(result)

    def count_passes(self, accounting: Accounting, phase: str, model: Any, **kind: bool) -> None:
        """Tell `accounting` of a forward of `model` over these rows; `kind` as `Accounting.add_pass` has it."""
        for micro_batch, sizes, repeated in zip(self.micro_batches, self.sizes, self.repeated, strict=True):
            tokens, logits = (list(column) for column in zip(*sizes, strict=True))
            accounting.add_pass(phase, model, micro_batch.input_ids, tokens, sum(logits), repeated=repeated, **kind)


Scorer = Callable[[OwnRows, Sequence[PromptExample], Sequence[Completion]], Tensor]
"""(rows, and their prompts and completions) -> [batch] scores; every rank must call it."""


def model_scorer(engine: Any) -> Scorer:
    """Scores from a reward model that reads the actor's token ids."""

    def score(own: OwnRows, prompts: Sequence[PromptExample], completions: Sequence[Completion]) -> Tensor:
        return own.run(partial(reward_scores, engine))

    return score


def retokenizing_scorer(
    engine: Any,
    config: PpoConfig,
    actor_tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase,
) -> Scorer:
    """Scores from a reward model with another tokenizer: each text is decoded and tokenized again."""

    def score(own: OwnRows, prompts: Sequence[PromptExample], completions: Sequence[Completion]) -> Tensor:
        rows = []
        responses = texts(actor_tokenizer, completions)
        for prompt, response, completion in zip(prompts, responses, completions, strict=True):
            ids = reward_tokenizer(prompt.text + response)["input_ids"]
            if completion.finished:  # a response that the limit has cut must not look like one that ended
                ids = [*ids, reward_tokenizer.eos_token_id]
            rows.append((ids, [True] * len(ids)))
        batch = collate(rows, pad_id=reward_tokenizer.pad_token_id).to(own.batch.input_ids.device)
        return OwnRows(batch, config).run(partial(reward_scores, engine))

    return score


def function_scorer(name: str, tokenizer: PreTrainedTokenizerBase, minutes: float = 10.0) -> Scorer:
    """Scores from the user's function `module:function`.

    Args:
        minutes: that one call may take.

    Raises:
        ValueError: there is no such function; or, when called, it raised, took too long, or did not return one finite
            number per response.
    """
    function = _import_function(name)

    def score(own: OwnRows, prompts: Sequence[PromptExample], completions: Sequence[Completion]) -> Tensor:
        share = distributed.own_share(len(prompts))
        scores = checked(prompts[share], texts(tokenizer, completions[share]))
        result = torch.zeros(len(prompts))
        result[share] = torch.tensor(scores, dtype=torch.float32)
        return distributed.sum_over_ranks(result).to(own.batch.input_ids.device)

    def checked(prompts: Sequence[PromptExample], responses: list[str]) -> list[float]:
        def call(prompts: Sequence[PromptExample], responses: list[str]) -> list[float]:
            return list(function([p.text for p in prompts], responses, [p.record for p in prompts]))

        try:
            scores = within(60 * minutes, partial(call, prompts, responses))
        except TimeoutError as error:
            places = f"{prompts[0].source} to {prompts[-1].source}"
            raise ValueError(
                f"{name} did not return within {minutes:g} minutes for the responses to the prompts at {places}: make "
                "it faster, or raise reward.function_minutes"
            ) from error
        except Exception as error:
            culprit = _first_that_raises(call, prompts, responses) or prompts[0]
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"{name} raised {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno}) on the "
                f"response to the prompt at {culprit.source}: let it return a score for every text"
            ) from error
        if len(scores) != len(prompts):
            raise ValueError(f"{name} returned {len(scores)} scores for {len(prompts)} responses: return one for each")
        for prompt, number in zip(prompts, scores, strict=True):
            if not math.isfinite(number):
                raise ValueError(f"{name} returned {number} for the prompt at {prompt.source}: return a finite number")
        return scores

    return score


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises.

    Raises:
        TimeoutError: it takes longer; it is then left alone.
    """
    outcome: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def _first_that_raises(
    call: Callable[[Sequence[PromptExample], list[str]], Any], prompts: Sequence[PromptExample], responses: list[str]
) -> PromptExample | None:
    for prompt, response in zip(prompts, responses, strict=True):
        try:
            call([prompt], [response])
        except Exception:
            return prompt
    return None


def _import_function(name: str) -> ScoreFunction:
    module_name, function_name = name.split(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward.function {name} cannot be imported from the current folder: {error}") from error


def texts(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion]) -> list[str]:
    """Responses as text, without special tokens."""
    return tokenizer.batch_decode([completion.response_ids for completion in completions], skip_special_tokens=True)
