"""The formats that turn raw records into demonstrations, preferences and prompts."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from training.records import DataError, Record, found_columns, kind_of, read_records


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


Text = str | tuple[Message, ...]
Kind = Literal["demonstration", "preference", "prompt"]
SkipCounts = Counter[str]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """A text to respond to. `source` is "path:line"; `record` the whole row, which a score function may read."""

    prompt: Text
    source: str
    record: Record


@dataclass(frozen=True)
class Demonstration:
    """A prompt and a good response. In a chat the prompt is every turn before the last one of the assistant."""

    prompt: Text
    response: str
    source: str


@dataclass(frozen=True)
class Preference:
    """A prompt and two or more responses, best first. `margin` says how much better the first of a pair is."""

    prompt: Text
    responses: tuple[str, ...]
    margin: float | None
    source: str


Example = Prompt | Demonstration | Preference


def _column(record: Record, name: str, source: str) -> Any:
    if name not in record:
        example = next(iter(record), "its_name")
        raise DataError(
            f"{source}: no column {name!r}; {found_columns(record)}. Say which one it is with `columns`, "
            f"as in columns: {{{name}: {example}}}, or choose another format"
        )
    return record[name]


def _checked_text(value: object, name: str, source: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{source}: {name!r} holds {kind_of(value)}, where text is needed")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: {name!r} holds half a character (a lone surrogate, {error}): remove it") from error
    return value


def _checked_turns(value: Sequence[object], name: str, source: str) -> tuple[Message, ...]:
    """Check a chat: an optional system turn, then user and assistant by turns."""
    turns: list[Message] = []
    for number, turn in enumerate(value, start=1):
        where = f"turn {number} of {name!r}"
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise DataError(f'{source}: {where} must be an object {{"role": ..., "content": ...}}')
        if turn["role"] not in ROLES:
            raise DataError(f"{source}: {where} has the role {turn['role']!r}, which is none of {', '.join(ROLES)}")
        if turn["role"] == "system" and number > 1:
            raise DataError(f"{source}: {where} is from the system, which may only speak first")
        if turns and turn["role"] == turns[-1]["role"]:
            raise DataError(f"{source}: {where} is from the {turn['role']} again: join the two turns into one")
        turns.append({"role": turn["role"], "content": _checked_text(turn["content"], where, source)})
    speakers = [turn["role"] for turn in turns if turn["role"] != "system"]
    if not speakers or speakers[0] != "user":
        raise DataError(f"{source}: {name!r} must begin with a turn of the user (after an optional system turn)")
    return tuple(turns)


def _prompt(record: Record, source: str, name: str = "prompt") -> Text:
    """A prompt as text, or as chat turns that end with the user's."""
    value = _column(record, name, source)
    if not isinstance(value, list):
        return _checked_text(value, name, source)
    turns = _checked_turns(value, name, source)
    if turns[-1]["role"] != "user":
        raise DataError(f"{source}: the last turn of {name!r} is from the {turns[-1]['role']}, not from the user")
    return turns


def _response(record: Record, source: str, name: str = "response") -> str:
    return _checked_text(_column(record, name, source), name, source)


def _split_chat(turns: tuple[Message, ...], name: str, source: str) -> tuple[tuple[Message, ...], str]:
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{source}: the last turn of {name!r} is from the {turns[-1]['role']}, not from the assistant")
    return turns[:-1], turns[-1]["content"]


def _parse_prompt(record: Record, source: str) -> Prompt:
    return Prompt(_prompt(record, source), source, record)


def _parse_prompt_response(record: Record, source: str) -> Demonstration:
    return Demonstration(_prompt(record, source), _response(record, source), source)


def _parse_text(record: Record, source: str) -> Demonstration:
    return Demonstration("", _response(record, source, "text"), source)


def _parse_instruction(record: Record, source: str) -> Demonstration:
    prompt = _checked_text(_column(record, "instruction", source), "instruction", source)
    context = _checked_text(record.get("input") or "", "input", source)
    return Demonstration(f"{prompt}\n\n{context}" if context else prompt, _response(record, source, "output"), source)


def _parse_messages(record: Record, source: str) -> Demonstration:
    value = _column(record, "messages", source)
    if not isinstance(value, list):
        raise DataError(f"{source}: 'messages' holds {kind_of(value)}, where a list of turns is needed")
    prompt, response = _split_chat(_checked_turns(value, "messages", source), "messages", source)
    return Demonstration(prompt, response, source)


def _parse_chosen_rejected(record: Record, source: str) -> Preference:
    margin = _margin(record.get("margin"), source)
    if isinstance(_column(record, "chosen", source), list) or isinstance(_column(record, "rejected", source), list):
        prompt, chosen = _split_continued_chat(record, "chosen", source)
        rejected_prompt, rejected = _split_continued_chat(record, "rejected", source)
        if prompt != rejected_prompt:
            raise DataError(
                f"{source}: 'chosen' and 'rejected' differ before their last turn: they must answer the same prompt"
            )
        return Preference(prompt, (chosen, rejected), margin, source)
    has_prompt = record.get("prompt") is not None
    responses = (_response(record, source, "chosen"), _response(record, source, "rejected"))
    return Preference(_prompt(record, source) if has_prompt else "", responses, margin, source)


def _split_continued_chat(record: Record, name: str, source: str) -> tuple[tuple[Message, ...], str]:
    """Chat turns that hold the prompt themselves, or only an assistant turn that answers the column "prompt"."""
    value = record[name]
    if not isinstance(value, list):
        raise DataError(
            f"{source}: {name!r} holds {kind_of(value)}, but the other response a list of turns: use the same kind"
        )
    if value and isinstance(value[0], dict) and value[0].get("role") == "assistant":
        prompt = _prompt(record, source)
        value = [*({"role": "user", "content": prompt},), *value] if isinstance(prompt, str) else [*prompt, *value]
    return _split_chat(_checked_turns(value, name, source), name, source)


def _margin(value: object, source: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        margin = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise DataError(f"{source}: 'margin' is {value!r}, where a finite number is needed")
    return margin


def _parse_ranking(record: Record, source: str) -> Preference:
    value = _column(record, "responses", source)
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"{source}: 'responses' must be a list of two or more texts, best first")
    responses = tuple(_checked_text(text, f"response {rank}", source) for rank, text in enumerate(value, start=1))
    return Preference(_prompt(record, source), responses, None, source)


@dataclass(frozen=True)
class Format:
    """How a row becomes an example of a kind. The file needs all `columns`, by these names or by option `columns`."""

    parse: Callable[[Record, str], Example]
    kind: Kind
    columns: tuple[str, ...]
    description: str


FORMATS: dict[str, Format] = {
    "prompt_response": Format(
        _parse_prompt_response, "demonstration", ("prompt", "response"), "a prompt (text or turns) and its response"
    ),
    "text": Format(_parse_text, "demonstration", ("text",), "plain text to continue from nothing"),
    "instruction": Format(
        _parse_instruction,
        "demonstration",
        ("instruction", "output"),
        "an instruction, an optional `input` it speaks of, an output",
    ),
    "messages": Format(_parse_messages, "demonstration", ("messages",), "a chat that ends with the assistant"),
    "chosen_rejected": Format(
        _parse_chosen_rejected,
        "preference",
        ("chosen", "rejected"),
        "two responses (texts or chats), optional `prompt` and `margin`",
    ),
    "ranking": Format(_parse_ranking, "preference", ("prompt", "responses"), "a prompt and its responses, best first"),
    "prompt": Format(_parse_prompt, "prompt", ("prompt",), "a prompt alone (text or turns)"),
}


def check_format(format: str, kind: Kind) -> None:
    """Refuse a format that does not hold what a stage needs; demonstrations also serve as prompts."""
    fitting = [
        name
        for name, entry in FORMATS.items()
        if entry.kind == kind or (kind, entry.kind) == ("prompt", "demonstration")
    ]
    if format not in fitting:
        raise ValueError(f"format is {format!r}, but this stage needs a {kind}: choose one of {', '.join(fitting)}")


def load_examples(
    paths: Sequence[str], format: str, kind: Kind, split: str = "train", columns: Mapping[str, str] | None = None
) -> tuple[list[Example], SkipCounts]:
    """Read all files into examples of one kind, and count by reason the records that were left out.

    A demonstration also serves as a prompt: its response is dropped. Examples and counts add up to the records read.
    """
    check_format(format, kind)
    if not paths:
        raise ValueError("paths names no data file: give at least one")
    examples: list[Example] = []
    skipped: SkipCounts = Counter()
    for path in paths:
        for source, record in read_records(path, split, columns):
            example = FORMATS[format].parse(record, source)
            if kind == "prompt":
                example = Prompt(example.prompt, source, record)
            reason = _reason_to_skip(example)
            if reason is None:
                examples.append(example)
            else:
                skipped[reason] += 1
    return examples, skipped


def _reason_to_skip(example: Example) -> str | None:
    if isinstance(example, Prompt):
        return "skipped_empty_prompt" if is_blank(example.prompt) else None
    responses = example.responses if isinstance(example, Preference) else (example.response,)
    if any(is_blank(response) for response in responses):
        return "skipped_empty_response"
    return "skipped_equal_responses" if len(set(responses)) < len(responses) else None


def is_blank(text: Text) -> bool:
    """Whether a text, or the last turn of a chat, has nothing in it but space."""
    return not (text if isinstance(text, str) else text[-1]["content"]).strip()
