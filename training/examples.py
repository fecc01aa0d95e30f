"""The examples of a DataConfig: read, hold some out, tokenize, limit lengths, count, keep in little memory."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.config import DataConfig
from training.formats import DataError, Example, Kind, Prompt, is_blank, load_examples
from training.tokenization import LossOn, TokenizedExample, demonstration_row, preference_rows, tokenize_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES_AT_ONCE = 1024
"""Examples in one call of the tokenizer."""

SKIP_REASONS = {
    "skipped_empty_prompt": "the prompt is empty (template plain can do without, where prompts are not sampled from)",
    "skipped_empty_response": "a response is empty",
    "skipped_equal_responses": "two responses are equal (perhaps only after truncation)",
    "skipped_long_prompt": "the prompt has more than max_prompt_tokens: raise it or set truncate_prompts",
    "skipped_long_response": "a response has more than max_response_tokens: raise it or set truncate_responses",
    "skipped_same_as_held_out": "equal to a held-out example",
    "skipped_over_max_examples": "beyond max_examples",
}

Row = tuple[ArrayLike, ArrayLike]
"""The ids of a sequence, and a mask of its response tokens."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class PromptExample:
    """A prompt to sample responses to: its ids, the text that they stand for, and the row of the file it came from."""

    prompt_ids: list[int]
    text: str
    record: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class PreferenceRows:
    """The sequences of one preference, best first, and the margin of the best over the second."""

    rows: list[Row]
    margin: float


class TokenizedDataset:
    """Sequences in one flat array each for ids and masks: 5 bytes a token, no padding."""

    def __init__(self, rows: Iterable[Row]) -> None:
        ids, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
        for row_ids, row_mask in rows:
            ids.append(np.asarray(row_ids, np.int32))
            masks.append(np.asarray(row_mask, np.bool_))
        self._ends = np.cumsum([len(row) for row in ids])
        self._ids, self._mask = np.concatenate(ids), np.concatenate(masks)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        index = range(len(self))[index]
        span = slice(self._ends[index], self._ends[index + 1])
        return self._ids[span], self._mask[span]


class PreferenceDataset:
    """Preferences, stored like the sequences of a TokenizedDataset."""

    def __init__(self, preferences: Sequence[PreferenceRows]) -> None:
        self._rows = TokenizedDataset(row for preference in preferences for row in preference.rows)
        self._ends = np.cumsum([0, *(len(preference.rows) for preference in preferences)])
        self._margins = [preference.margin for preference in preferences]

    def __len__(self) -> int:
        return len(self._margins)

    def __getitem__(self, index: int) -> PreferenceRows:
        index = range(len(self))[index]
        rows: list[Row] = [self._rows[row] for row in range(self._ends[index], self._ends[index + 1])]
        return PreferenceRows(rows, self._margins[index])


def build_demonstrations(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn = "response"
) -> tuple[TokenizedDataset, TokenizedDataset, dict[str, int]]:
    """Sequences to train on, held-out sequences, and counts as `_build` describes them."""

    def row(example: Example, tokenized: TokenizedExample) -> Row:
        return _compact(*demonstration_row(tokenized, loss_on))

    train, held_out, counts = _build(config, tokenizer, "demonstration", row)
    return TokenizedDataset(train), TokenizedDataset(held_out), counts


def build_preferences(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[PreferenceDataset, PreferenceDataset, dict[str, int]]:
    """Preferences to train on, held-out ones, and counts as `_build` describes them."""

    def rows(example: Example, tokenized: TokenizedExample) -> PreferenceRows:
        margin = getattr(example, "margin", None) or 0.0
        return PreferenceRows([_compact(*row) for row in preference_rows(tokenized)], margin)

    train, held_out, counts = _build(config, tokenizer, "preference", rows)
    return PreferenceDataset(train), PreferenceDataset(held_out), counts


def build_prompts(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[PromptExample], list[PromptExample], dict[str, int]]:
    """Prompts to train on, held-out ones (no text is in both), and counts as `_build` describes them."""

    def prompt(example: Example, tokenized: TokenizedExample) -> PromptExample:
        assert isinstance(example, Prompt)
        return PromptExample(tokenized.prompt_ids, tokenized.prompt_text, example.record, example.source)

    return _build(config, tokenizer, "prompt", prompt)


def digest(examples: TokenizedDataset | PreferenceDataset | Sequence[PromptExample]) -> str:
    """Hexadecimal digest of what a model reads of the examples, in their order."""
    result = hashlib.sha256()
    for example in (examples[index] for index in range(len(examples))):
        if isinstance(example, PromptExample):
            rows: list[Row] = [(example.prompt_ids, [])]
        else:
            rows = example.rows if isinstance(example, PreferenceRows) else [example]
        for ids, mask in rows:
            result.update(np.asarray(ids, np.int32).tobytes() + b"|" + np.asarray(mask, np.bool_).tobytes() + b";")
        result.update(b".")
    return result.hexdigest()


def describe_counts(counts: Mapping[str, int]) -> str:
    """One line for a person: how many records there were, and what became of them."""
    rest = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count and "_" in name]
    rest = [part for part in rest if not part.endswith("held out")]
    line = f"data: {counts['records']} records, {counts['train']} to train on, {counts['held_out']} held out"
    return ", ".join([line, *rest])


def _compact(ids: list[int], mask: list[bool]) -> Row:
    return np.array(ids, np.int32), np.array(mask, np.bool_)


def _build(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    kind: Kind,
    make_item: Callable[[Example, TokenizedExample], Item],
) -> tuple[list[Item], list[Item], dict[str, int]]:
    """Make the training items, the held-out items and the counts.

    Held out are all of `eval_paths`, or else the first `eval_size` in an order that depends on texts and seed alone:
    neither the tokenizer nor the order of the file changes it. Equal examples are neighbours in it, so leaving out what
    equals the last held-out example keeps the two parts apart.

    Counts: records = kept + all that start with skipped_; kept = train + held_out; truncated_prompts and
    truncated_responses are examples that were cut.
    """
    counts: Counter[str] = Counter(train=0, held_out=0)
    examples = _load(config, config.paths, kind, counts)
    examples.sort(key=lambda example: hashlib.blake2b(f"{config.seed} {_content(example)}".encode()).digest())
    usable = _usable(examples, tokenizer, config, counts)
    last_held_out = None
    eval_counts: Counter[str] = Counter()
    if config.eval_paths:
        eval_examples = _load(config, config.eval_paths, kind, eval_counts)
        held_out = [make_item(*pair) for pair in _usable(eval_examples, tokenizer, config, eval_counts)]
        if not held_out:
            raise _nothing_left(config.eval_paths, eval_counts)
    else:
        pairs = list(islice(usable, config.eval_size))
        held_out = [make_item(*pair) for pair in pairs]
        last_held_out = _content(pairs[-1][0]) if pairs else None
    train: list[Item] = []
    for example, tokenized in usable:
        if _content(example) == last_held_out:
            counts["skipped_same_as_held_out"] += 1
            continue
        train.append(make_item(example, tokenized))
        if len(train) == config.max_examples:
            break
    if not train:
        raise _nothing_left(config.paths, counts, held_out=0 if config.eval_paths else len(held_out))
    counts.update(eval_counts)
    counts.update(train=len(train), held_out=len(held_out), kept=len(train) + len(held_out))
    skipped = sum(count for name, count in counts.items() if name.startswith("skipped_"))
    if counts["records"] > counts["kept"] + skipped:
        counts["skipped_over_max_examples"] = counts["records"] - counts["kept"] - skipped
    return train, held_out, dict(counts)


def _load(config: DataConfig, paths: Sequence[str], kind: Kind, counts: Counter[str]) -> list[Example]:
    examples, skipped = load_examples(paths, config.format, kind, config.split, config.columns)
    counts.update(skipped)
    counts["records"] += len(examples) + skipped.total()
    return examples


def _content(example: Example) -> str:
    """What makes two examples the same: the prompt of a prompt, prompt and responses of the others."""
    responses = getattr(example, "responses", None) or getattr(example, "response", None)
    return json.dumps([example.prompt, responses])


def _usable(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", config: DataConfig, counts: Counter[str]
) -> Iterator[tuple[Example, TokenizedExample]]:
    """Tokenize in groups; yield what keeps to the limits and count the rest when its turn comes."""
    for start in range(0, len(examples), EXAMPLES_AT_ONCE):
        group = examples[start : start + EXAMPLES_AT_ONCE]
        for example, tokenized in zip(group, tokenize_examples(group, tokenizer, config.template), strict=True):
            limited = _limit_prompt(tokenized, tokenizer, config)
            limited = limited if isinstance(limited, str) else _limit_responses(limited, config)
            if config.template == "chat" and is_blank(example.prompt):
                limited = "skipped_empty_prompt"
            if isinstance(limited, str):
                counts[limited] += 1
                continue
            counts["truncated_prompts"] += limited.prompt_ids != tokenized.prompt_ids
            counts["truncated_responses"] += limited.response_ids != tokenized.response_ids
            yield example, limited


def _limit_prompt(
    tokenized: TokenizedExample, tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> TokenizedExample | str:
    """The example with its prompt within the limit, or the reason to skip it. Cut is the oldest text, but not BOS."""
    excess = len(tokenized.prompt_ids) - config.max_prompt_tokens
    if excess <= 0:
        return tokenized
    if not config.truncate_prompts:
        return "skipped_long_prompt"
    start = 1 if tokenized.prompt_ids[0] == tokenizer.bos_token_id else 0
    ids = tokenized.prompt_ids[:start] + tokenized.prompt_ids[start + excess :]
    said_by_assistant = tokenized.said_by_assistant[:start] + tokenized.said_by_assistant[start + excess :]
    return replace(tokenized, prompt_text=tokenizer.decode(ids), prompt_ids=ids, said_by_assistant=said_by_assistant)


def _limit_responses(tokenized: TokenizedExample, config: DataConfig) -> TokenizedExample | str:
    """The example with its responses within the limit, or the reason to skip it. A cut response has no EOS."""
    responses = tuple(ids[: config.max_response_tokens] for ids in tokenized.response_ids)
    if responses != tokenized.response_ids and not config.truncate_responses:
        return "skipped_long_response"
    if len({tuple(ids) for ids in responses}) < len(responses):
        return "skipped_equal_responses"
    return replace(tokenized, response_ids=responses)


def _nothing_left(paths: Sequence[str], counts: Counter[str], held_out: int = 0) -> DataError:
    found = [f"{counts[name]} x {reason}" for name, reason in SKIP_REASONS.items() if counts[name]]
    if held_out:
        found.append(f"{held_out} x held out: lower eval_size, or name a file in eval_paths")
    return DataError(f"{paths[0]}:1: none of the {counts['records']} records is left to use: {'; '.join(found)}")
