"""Reading data files: what each format makes of a row, and what is said about every kind of bad input."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.formats import (
    FORMATS,
    DataError,
    Demonstration,
    Kind,
    Preference,
    Prompt,
    is_blank,
    load_examples,
)
from training.records import read_records

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}


def write(folder: Path, content: str | bytes, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def parse(format: str, record: Any) -> Any:
    return FORMATS[format].parse(record, "f:7")


def read_error(path: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path, **options))
    return str(caught.value)


def parse_error(format: str, record: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(format, record)
    assert str(caught.value).startswith("f:7: ")
    return str(caught.value)


# What the formats make of a row


def test_prompt_response_takes_text_or_turns_as_the_prompt() -> None:
    assert parse("prompt_response", {"prompt": "2+2=", "response": "4"}) == Demonstration("2+2=", "4", "f:7")
    assert parse("prompt_response", {"prompt": [USER], "response": "4"}) == Demonstration((USER,), "4", "f:7")  # type: ignore[arg-type]


def test_text_is_a_response_to_the_empty_prompt() -> None:
    assert parse("text", {"text": "Once"}) == Demonstration("", "Once", "f:7")


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [({"input": "cat"}, "Spell\n\ncat"), ({"input": ""}, "Spell"), ({"input": None}, "Spell"), ({}, "Spell")],
)
def test_instruction_joins_its_input_when_there_is_one(extra: dict[str, Any], prompt: str) -> None:
    record = {"instruction": "Spell", "output": "c-a-t"} | extra
    assert parse("instruction", record) == Demonstration(prompt, "c-a-t", "f:7")


def test_messages_are_split_before_the_last_turn_of_the_assistant() -> None:
    example = parse("messages", {"messages": [SYSTEM, USER, ASSISTANT, USER, {"role": "assistant", "content": "Bye"}]})
    assert example == Demonstration((SYSTEM, USER, ASSISTANT, USER), "Bye", "f:7")  # type: ignore[arg-type]


def test_chosen_rejected_takes_texts_with_an_optional_prompt_and_margin() -> None:
    record = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.5}
    assert parse("chosen_rejected", record) == Preference("p", ("a", "b"), 1.5, "f:7")
    assert parse("chosen_rejected", {"chosen": "a", "rejected": "b"}) == Preference("", ("a", "b"), None, "f:7")
    # A CSV file knows only text.
    record = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "0.5"}
    assert parse("chosen_rejected", record) == Preference("p", ("a", "b"), 0.5, "f:7")
    assert parse("chosen_rejected", record | {"margin": ""}).margin is None


def test_chosen_rejected_chats_have_their_common_turns_as_the_prompt() -> None:
    worse = {"role": "assistant", "content": "Go away"}
    example = parse(
        "chosen_rejected", {"prompt": "Hi", "chosen": [SYSTEM, USER, ASSISTANT], "rejected": [SYSTEM, USER, worse]}
    )
    assert example == Preference((SYSTEM, USER), ("Hello", "Go away"), None, "f:7")  # type: ignore[arg-type]


def test_chosen_rejected_chats_of_one_turn_continue_the_prompt_column() -> None:
    worse = {"role": "assistant", "content": "Go away"}
    expected = Preference((USER,), ("Hello", "Go away"), None, "f:7")  # type: ignore[arg-type]
    for prompt in ("Hi", [USER]):
        assert parse("chosen_rejected", {"prompt": prompt, "chosen": [ASSISTANT], "rejected": [worse]}) == expected


def test_ranking_keeps_the_order_of_its_responses() -> None:
    assert parse("ranking", {"prompt": "p", "responses": ["a", "b", "c"]}) == Preference(
        "p", ("a", "b", "c"), None, "f:7"
    )


def test_prompt_keeps_the_whole_record() -> None:
    record = {"prompt": "2+2=", "answer": 4}
    assert parse("prompt", record) == Prompt("2+2=", "f:7", record)


def test_a_demonstration_serves_as_a_prompt_and_keeps_its_record(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "2+2=", "response": "", "answer": 4}\n')
    examples, skipped = load_examples([path], "prompt_response", "prompt")
    assert examples == [Prompt("2+2=", f"{path}:1", {"prompt": "2+2=", "response": "", "answer": 4})]
    assert skipped.total() == 0


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_refuses_a_row_without_each_column_it_needs(name: str) -> None:
    full = {
        "prompt": "p", "response": "r", "text": "t", "instruction": "i", "output": "o", "messages": [USER, ASSISTANT],
        "chosen": "c", "rejected": "r", "responses": ["a", "b"],
    }  # fmt: skip
    assert parse(name, full).source == "f:7"
    for column in FORMATS[name].columns:
        record = {key: value for key, value in full.items() if key != column}
        assert f"no column '{column}'" in parse_error(name, record)


# Reading files


LINES = '{"text": "a"}\n{"text": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n', [1, 2]),
        ("no_newline_at_end.jsonl", '{"text": "a"}\n{"text": "b"}', [1, 2]),
        ("bom_crlf_blank.jsonl", '\ufeff\r\n{"text": "a"}\r\n  \r\n\r\n{"text": "b"}\r\n', [2, 5]),
        ("UPPER.JSONL", '{"text": "a"}\n{"text": "b"}\n', [1, 2]),
        ("list.json", '\ufeff\n[\n  {"text":\n "a"},\n\n {"text": "b"}\n]\n', [3, 6]),
        ("one_line.json", '[{"text": "a"}, {"text": "b"}]', [1, 1]),
        ("lines.json", '{"text": "a"}\n{"text": "b"}\n', [1, 2]),
        ("a.csv", "text\na\nb\n", [2, 3]),
        ("bom_crlf_blank.csv", "\ufefftext\r\n\r\na\r\n\r\nb\r\n", [3, 5]),
    ],
)
def test_records_have_their_physical_line(tmp_path: Path, name: str, content: str, lines: list[int]) -> None:
    path = write(tmp_path, content, name)
    first, second = lines
    assert list(read_records(path)) == [(f"{path}:{first}", {"text": "a"}), (f"{path}:{second}", {"text": "b"})]


def test_a_line_separator_inside_json_text_is_not_a_new_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a\u2028\u0085b"}\n{"text": "c"}\n')
    assert list(read_records(path)) == [(f"{path}:1", {"text": "a\u2028\u0085b"}), (f"{path}:2", {"text": "c"})]


def test_a_quoted_csv_field_may_hold_commas_quotes_and_newlines(tmp_path: Path) -> None:
    path = write(tmp_path, 'prompt,response\n"a,\n""b""",c\nd,e\n', "a.csv")
    assert list(read_records(path)) == [
        (f"{path}:2", {"prompt": 'a,\n"b"', "response": "c"}),
        (f"{path}:4", {"prompt": "d", "response": "e"}),
    ]


def test_columns_add_the_wanted_names_and_keep_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, '{"question": "q", "answer": "a", "prompt": "x"}\n')
    columns = {"prompt": "question", "response": "answer"}
    expected = {"question": "q", "answer": "a", "prompt": "q", "response": "a"}
    assert list(read_records(path, columns=columns)) == [(f"{path}:1", expected)]


def test_columns_can_be_swapped(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "a", "response": "b"}\n')
    (record,) = read_records(path, columns={"prompt": "response", "response": "prompt"})
    assert record[1] == {"prompt": "b", "response": "a"}


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    paths = [write(tmp_path, '{"text": "a"}\n', "1.jsonl"), write(tmp_path, "text\nb\n", "2.csv")]
    examples, _ = load_examples(paths, "text", "demonstration")
    assert [example.source for example in examples] == [f"{paths[0]}:1", f"{paths[1]}:2"]


# Bad input: each message has file and line


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "missing.jsonl")
    assert read_error(path).startswith(f"{path}:1: there is no such file")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path, "" if name == "a.csv" and content.strip("\n") else content, name)
    assert read_error(path).startswith(f"{path}:1: the file is empty")


@pytest.mark.parametrize(("name", "content"), [("a.json", "[ ]"), ("a.csv", "text\n")])
def test_a_file_without_records_is_refused(tmp_path: Path, name: str, content: str) -> None:
    assert "it needs at least one record" in read_error(write(tmp_path, content, name))


@pytest.mark.parametrize("bad", ['{"text": ', '{"text": "a"} {"text": "b"}', "text", '{"text": "a}', "[" * 100_000])
def test_bad_json_is_refused_with_its_physical_line(tmp_path: Path, bad: str) -> None:
    path = write(tmp_path, '\ufeff{"text": "a"}\r\n\r\n   \r\n' + bad + "\r\n")
    assert read_error(path).startswith(f"{path}:4: not JSON (")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[\n{"text": "a"},\n{"text": }\n]', 3),
        ('[\n{"text": "a"}\n{"text": "b"}\n]', 3),
        ('[\n{"text": "a"},\n', 3),
        ('[\n{"text": "a"}\n', 3),
        ('[\n{"text": "a"}\n]\n[]', 4),
        ('[\n{"text": "a"},\n]', 3),
    ],
)
def test_a_bad_json_list_is_refused_with_its_line(tmp_path: Path, content: str, line: int) -> None:
    path = write(tmp_path, content, "a.json")
    assert read_error(path).startswith(f"{path}:{line}: not JSON")


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ("a,b\n1,2\n\n3\n", 4, "1 fields, but the header has 2"),
        ("a,b\n1,2,3\n", 2, "3 fields, but the header has 2"),
        ('a,b\n1,2\n"3,4\n', 3, "not CSV"),
        ("a,a\n1,2\n", 1, "stands twice"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path: Path, content: str, line: int, what: str) -> None:
    path = write(tmp_path, content, "a.csv")
    message = read_error(path)
    assert message.startswith(f"{path}:{line}: ")
    assert what in message


@pytest.mark.parametrize(
    ("value", "kind"), [("[1]", "a list"), ('"a"', "text"), ("3", "a number"), ("null", "nothing (null)")]
)
def test_a_row_that_is_not_an_object_is_refused(tmp_path: Path, value: str, kind: str) -> None:
    path = write(tmp_path, '{"text": "a"}\n' + value + "\n")
    assert read_error(path).startswith(f"{path}:2: holds {kind}, not an object")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, b"[\n\xff\n" if name == "a.json" else b'{"text": 1}\n\xff\n', name)
    assert read_error(path).startswith(f"{path}:2: not UTF-8 text")


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a\\ud800"}\n')
    with pytest.raises(DataError, match=r":1: 'text' holds half a character"):
        load_examples([path], "text", "demonstration")


def test_a_missing_column_lists_those_found_and_how_to_map() -> None:
    message = parse_error("prompt_response", {"question": "q", "answer": "a"})
    assert "no column 'prompt'; found 'question', 'answer'." in message
    assert "columns: {prompt: question}" in message


def test_a_mapped_column_that_is_missing_is_named_with_those_found(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a"}\n')
    message = read_error(path, columns={"prompt": "question"})
    assert message == f"{path}:1: no column 'question', which `columns` names for 'prompt'; found 'text'"


@pytest.mark.parametrize(
    ("value", "kind"),
    [(3, "a number"), (True, "true or false"), (None, "nothing (null)"), (["a"], "a list"), ({}, "an object")],
)
def test_a_response_of_a_wrong_type_is_refused(value: Any, kind: str) -> None:
    assert f"'response' holds {kind}, where text is needed" in parse_error(
        "prompt_response", {"prompt": "p", "response": value}
    )


@pytest.mark.parametrize("margin", ["much", True, float("nan"), float("inf"), [1]])
def test_a_margin_that_is_not_a_finite_number_is_refused(margin: Any) -> None:
    assert "where a finite number is needed" in parse_error(
        "chosen_rejected", {"chosen": "a", "rejected": "b", "margin": margin}
    )


@pytest.mark.parametrize("responses", ["ab", [], ["a"], None])
def test_a_ranking_of_fewer_than_two_is_refused(responses: Any) -> None:
    assert "two or more texts" in parse_error("ranking", {"prompt": "p", "responses": responses})


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([USER, ASSISTANT, USER], "the last turn of 'messages' is from the user, not from the assistant"),
        (
            [USER, {"role": "bot", "content": "a"}],
            "turn 2 of 'messages' has the role 'bot', which is none of system, user",
        ),
        ([USER, USER, ASSISTANT], "turn 2 of 'messages' is from the user again"),
        ([USER, ASSISTANT, ASSISTANT], "turn 3 of 'messages' is from the assistant again"),
        ([USER, SYSTEM, ASSISTANT], "turn 2 of 'messages' is from the system, which may only speak first"),
        ([ASSISTANT], "must begin with a turn of the user"),
        ([SYSTEM, ASSISTANT], "must begin with a turn of the user"),
        ([], "must begin with a turn of the user"),
        (["Hi"], "turn 1 of 'messages' must be an object"),
        ([{"from": "human", "value": "Hi"}], "turn 1 of 'messages' must be an object"),
        ([{"role": "user", "content": ["Hi"]}], "holds a list, where text is needed"),
        ("Hi", "'messages' holds text, where a list of turns is needed"),
    ],
)
def test_wrong_turns_are_refused(turns: Any, what: str) -> None:
    assert what in parse_error("messages", {"messages": turns})


def test_a_prompt_that_ends_with_the_assistant_is_refused() -> None:
    assert "is from the assistant, not from the user" in parse_error("prompt", {"prompt": [USER, ASSISTANT]})


def test_chosen_and_rejected_chats_with_other_prompts_are_refused() -> None:
    other = [{"role": "user", "content": "Bye"}, ASSISTANT]
    assert "differ before their last turn" in parse_error(
        "chosen_rejected", {"chosen": [USER, ASSISTANT], "rejected": other}
    )


def test_a_chosen_chat_with_a_rejected_text_is_refused() -> None:
    for chosen, rejected in (([USER, ASSISTANT], "no"), ("no", [USER, ASSISTANT])):
        assert "use the same kind" in parse_error("chosen_rejected", {"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize("path", ["owner/name", "data.parquet"])
def test_without_the_datasets_package_hub_and_parquet_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, b"PAR1", "data.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = read_error(path)
    assert message.startswith(f"{path}:1: ")
    assert message.endswith("pip install datasets")


def test_local_text_files_are_read_without_the_datasets_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(list(read_records(write(tmp_path, LINES)))) == 2


def test_a_hub_name_loads_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = list(read_records("owner/name:main", split="test"))
    assert rows == [("owner/name:main:1", {"text": "a"}), ("owner/name:main:2", {"text": "b"})]
    assert calls == [(("owner/name", "main"), {"split": "test"})]


def test_a_hub_name_that_cannot_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **options: Any) -> None:
        raise FileNotFoundError("not on the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_error("data/train").startswith(
        "data/train:1: no such file, and not a dataset that could be loaded (split train)"
    )


def test_parquet_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")

    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"messages": [[USER, ASSISTANT]]}), path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    examples, _ = load_examples([path], "messages", "demonstration", split="test")
    assert examples == [Demonstration((USER,), "Hello", f"{path}:1")]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["data.txt", "folder"])
def test_other_files_and_folders_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path, "a", "data.txt")
    path = str(tmp_path / name)
    assert read_error(path) == f"{path}:1: not a data file: give a file that ends in .jsonl, .json, .csv, .parquet"


def test_an_unknown_or_unfit_format_lists_those_that_fit(tmp_path: Path) -> None:
    cases: list[tuple[str, Kind, str]] = [
        ("alpaca", "demonstration", "prompt_response, text, instruction, messages"),
        ("messages", "preference", "chosen_rejected, ranking"),
        ("ranking", "prompt", "prompt_response, text, instruction, messages, prompt"),
    ]
    for format, kind, choices in cases:
        with pytest.raises(ValueError, match=f"format is '{format}', but this stage needs a {kind}: .*{choices}$"):
            load_examples(["a.jsonl"], format, kind)


# Skips are counted


def test_empty_responses_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": ""}\n{"text": " \\n"}\n{"text": "a"}\n')
    examples, skipped = load_examples([path], "text", "demonstration")
    assert examples == [Demonstration("", "a", f"{path}:3")]
    assert skipped == {"skipped_empty_response": 2}


def test_an_empty_last_turn_is_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"messages": [USER, {"role": "assistant", "content": ""}]}))
    assert load_examples([path], "messages", "demonstration") == ([], {"skipped_empty_response": 1})


def test_empty_and_equal_responses_of_preferences_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [("a", "b"), ("a", "a"), ("a", ""), ("", "b"), ("", "")]
    path = write(tmp_path, "".join(json.dumps({"chosen": c, "rejected": r}) + "\n" for c, r in rows))
    examples, skipped = load_examples([path], "chosen_rejected", "preference")
    assert examples == [Preference("", ("a", "b"), None, f"{path}:1")]
    assert skipped == {"skipped_equal_responses": 1, "skipped_empty_response": 3}


def test_equal_chats_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}))
    assert load_examples([path], "chosen_rejected", "preference") == ([], {"skipped_equal_responses": 1})


def test_empty_prompts_are_skipped_only_where_prompts_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": " ", "response": "a"}\n')
    assert load_examples([path], "prompt_response", "prompt") == ([], {"skipped_empty_prompt": 1})
    assert len(load_examples([path], "prompt_response", "demonstration")[0]) == 1


def test_a_chat_is_blank_when_its_last_turn_is() -> None:
    assert is_blank(" \n")
    assert is_blank(({"role": "system", "content": "S"}, {"role": "user", "content": " "}))
    assert not is_blank(({"role": "user", "content": "a"},))


# The same cases on every machine, however slow it is.
REPEATABLE = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=6,
)
COLUMNS = st.sampled_from(
    ["prompt", "response", "chosen", "rejected", "margin", "messages", "responses", "text", "input"]
)


@REPEATABLE
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8))
def test_kept_and_skipped_add_up_to_the_records(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("data")
    path = write(folder, "".join(json.dumps({"prompt": "p", "chosen": c, "rejected": r}) + "\n" for c, r in pairs))
    examples, skipped = load_examples([path], "chosen_rejected", "preference")
    assert len(examples) + skipped.total() == len(pairs)
    assert len(examples) == sum(bool(c.strip() and r.strip()) and c != r for c, r in pairs)


@pytest.mark.parametrize("format", FORMATS)
@REPEATABLE
@given(st.dictionaries(COLUMNS, JSON_VALUES))
def test_any_record_is_parsed_or_refused_with_its_source(format: str, record: dict[str, Any]) -> None:
    try:
        example = parse(format, record)
    except DataError as error:
        assert str(error).startswith("f:7: ")
    else:
        assert example.source == "f:7"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@REPEATABLE
@given(st.binary(max_size=40) | st.text('[]{},"\n\r\ufeff:1a', max_size=40).map(str.encode))
def test_any_file_is_read_or_refused_with_a_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes
) -> None:
    path = write(tmp_path_factory.mktemp("data"), content, name)
    try:
        rows = list(read_records(path))
    except DataError as error:
        number = str(error).removeprefix(f"{path}:").split(":")[0]
        assert 1 <= int(number) <= content.count(b"\n") + content.count(b"\r") + 1
    else:
        assert rows
