"""What the benchmark of supervised fine-tuning and of reward models asks of both systems."""

import math
import random
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist

from scripts.benchmark.workloads import END, FIRST_WORD

LOG_DEVIATION = 0.8
"""Of log-normal lengths, as those of chats have."""
LONGEST = 4
"""Means."""


@dataclass(frozen=True)
class SupervisedJob:
    """One pass over the data, as the workers are asked for it."""

    stage: str
    """sft or reward."""
    model: str
    """Folder."""
    precision: str
    sequences: list[list[list[int]]]
    """For each example its sequences of ids, without the end token: one text, or the better and the worse response."""
    train_batch_size: int
    micro_batch_size: int
    mean_tokens: int
    packed: bool = False
    """Whether TRL puts several texts into one row."""
    tuned: bool = False
    """Whether TRL does without what its defaults save memory with."""
    settings: list[str] = field(default_factory=list)
    """More options of the stage, for our side."""

    @cached_property
    def records(self) -> list[dict[str, str]]:
        """The examples as text. The prompt is one word, which the sequences of an example share."""
        return [record_of(example) for example in self.sequences]

    @property
    def held_out(self) -> list[dict[str, str]]:
        """A short example that is none of the others: every stage wants one."""
        example = [[FIRST_WORD, FIRST_WORD + index] for index in range(len(self.sequences[0]))]
        return [record_of(example)]

    @property
    def tokens(self) -> int:
        """Tokens of a pass, an end token for each sequence included."""
        return sum(len(ids) + 1 for example in self.sequences for ids in example)

    @property
    def longest(self) -> int:
        return max(len(ids) + 1 for example in self.sequences for ids in example)

    def with_ends(self, example: list[list[int]]) -> list[list[int]]:
        return [[*ids, END] for ids in example]


def record_of(example: list[list[int]]) -> dict[str, str]:
    names = ["response"] if len(example) == 1 else ["chosen", "rejected"]
    responses = {name: words(ids[1:]) for name, ids in zip(names, example, strict=True)}
    return {"prompt": words(example[0][:1]) + " ", **responses}


def words(ids: list[int]) -> str:
    return " ".join(f"w{index}" for index in ids)


def draw_examples(
    count: int, per_example: int, mean_tokens: int, mixed: bool, vocab_size: int, seed: int
) -> list[list[list[int]]]:
    """Random texts of equal or of log-normally drawn lengths, end tokens included in both.

    Args:
        per_example: 1 text, or 2 responses to one prompt.
        mean_tokens: of a sequence.
    """
    rng = random.Random(seed)
    total = count * per_example
    lengths = [mean_tokens] * total
    if mixed:
        normal = NormalDist(math.log(mean_tokens) - LOG_DEVIATION**2 / 2, LOG_DEVIATION)
        quantiles = [math.exp(normal.inv_cdf((index + 0.5) / total)) for index in range(total)]
        lengths = [min(max(round(length), 3), LONGEST * mean_tokens) for length in quantiles]
    rng.shuffle(lengths)
    examples = []
    for first in range(0, total, per_example):
        prompt = rng.randrange(FIRST_WORD, vocab_size)
        drawn = [
            [prompt, *(rng.randrange(FIRST_WORD, vocab_size) for _ in range(length - 2))]
            for length in lengths[first : first + per_example]
        ]
        examples.append(drawn)
    return examples
