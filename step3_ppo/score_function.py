"""The score of a response from the user's function: of all responses together, or of each as it ends."""

import importlib
import math
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from step3_ppo.scoring import OwnRows, Scorer, texts
from training import distributed
from training.data import Batch
from training.examples import PromptExample
from training.generation.interface import Completion


class ScoreFunction:
    """The user's function `module:function`, whose answers are checked."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, minutes: float = 10.0) -> None:
        """
        Args:
            minutes: that one call may take.

        Raises:
            ValueError: there is no such function.
        """
        self.name = name
        self.tokenizer = tokenizer
        self.minutes = minutes
        self.function: Callable[..., Any] = _import_function(name)

    def scores(self, prompts: Sequence[PromptExample], completions: Sequence[Completion]) -> list[float]:
        """One for each response.

        Raises:
            ValueError: the function raised, took too long, or did not return one finite number per response.
        """
        responses = texts(self.tokenizer, completions)
        try:
            scores = within(60 * self.minutes, partial(self._call, prompts, responses))
        except TimeoutError as error:
            places = f"{prompts[0].source} to {prompts[-1].source}"
            raise ValueError(
                f"{self.name} did not return within {self.minutes:g} minutes for the responses to the prompts at "
                f"{places}: make it faster, or raise reward.function_minutes"
            ) from error
        except Exception as error:
            culprit = self._first_that_raises(prompts, responses) or prompts[0]
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"{self.name} raised {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno}) on "
                f"the response to the prompt at {culprit.source}: let it return a score for every text"
            ) from error
        if len(scores) != len(prompts):
            raise ValueError(
                f"{self.name} returned {len(scores)} scores for {len(prompts)} responses: return one for each"
            )
        for prompt, number in zip(prompts, scores, strict=True):
            if not math.isfinite(number):
                raise ValueError(
                    f"{self.name} returned {number} for the prompt at {prompt.source}: return a finite number"
                )
        return scores

    def _call(self, prompts: Sequence[PromptExample], responses: Sequence[str]) -> list[float]:
        return list(self.function([p.text for p in prompts], list(responses), [p.record for p in prompts]))

    def _first_that_raises(self, prompts: Sequence[PromptExample], responses: Sequence[str]) -> PromptExample | None:
        for prompt, response in zip(prompts, responses, strict=True):
            try:
                self._call([prompt], [response])
            except Exception:
                return prompt
        return None


def function_scorer(function: ScoreFunction) -> Scorer:
    """Scores from a function that is called once, with all responses of a rank."""

    def score(own: OwnRows, prompts: Sequence[PromptExample], completions: Sequence[Completion]) -> Tensor:
        share = distributed.own_share(len(prompts))
        return scores_of_all_ranks(function.scores(prompts[share], completions[share]), share, own.batch)

    return score


class EarlyScores:
    """Scores from a function that is called with the responses that have ended, while others are still drawn."""

    def __init__(self, function: ScoreFunction, prompts: Sequence[PromptExample]) -> None:
        """
        Args:
            prompts: those of this rank's responses.
        """
        self.function = function
        self.prompts = prompts
        self.scores: dict[int, float] = {}
        self.error: Exception | None = None
        self.ended: queue.SimpleQueue[tuple[Sequence[int], Sequence[Completion]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def add(self, rows: Sequence[int], completions: Sequence[Completion]) -> None:
        """`on_finish` of `Generator.generate`."""
        self.ended.put((rows, completions))

    def result(self) -> list[float]:
        """One score for each of the prompts. Raises: ValueError, as `ScoreFunction.scores`."""
        self.ended.put(None)
        self.thread.join()
        if self.error is not None:
            raise self.error
        return [self.scores[row] for row in range(len(self.prompts))]

    def _run(self) -> None:
        try:
            while (ended := self.ended.get()) is not None:
                rows, completions = ended
                scores = self.function.scores([self.prompts[row] for row in rows], completions)
                self.scores |= zip(rows, scores, strict=True)
        except Exception as error:  # it is raised where the scores are asked for
            self.error = error


def scores_of_all_ranks(scores: Sequence[float], share: slice, batch: Batch) -> Tensor:
    """[batch] float32, of which this rank has the scores of `share`. Every rank must call this."""
    result = torch.zeros(len(batch))
    result[share] = torch.tensor(scores, dtype=torch.float32)
    return distributed.sum_over_ranks(result).to(batch.input_ids.device)


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


def _import_function(name: str) -> Callable[..., Any]:
    module_name, function_name = name.split(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward.function {name} cannot be imported from the current folder: {error}") from error
