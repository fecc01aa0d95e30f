"""Rows of data files (.jsonl, .json, .csv, .parquet) and of hub datasets, each with the place it came from."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

JSON_SPACE = re.compile(r"[ \t\r\n]*")


class DataError(ValueError):
    """Something is wrong with a data file; the message starts with `path:line: ` and says what to do."""


def read_records(
    path: str, split: str = "train", columns: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield ("path:line", row) for every row of a file or of a hub dataset.

    Args:
        path: a .jsonl, .json, .csv or .parquet file, or a hub dataset as "owner/name" or "owner/name:config".
        split: the split of a hub dataset; a file is read whole.
        columns: wanted name -> name in the file. The row gets the wanted names and keeps its own.
    """
    empty = True
    for line, row in _read_rows(path, split):
        empty = False
        source = f"{path}:{line}"
        if not isinstance(row, dict):
            raise DataError(f"{source}: holds {kind_of(row)}, not an object with named columns like {{...}}")
        for wanted, actual in (columns or {}).items():
            if actual not in row:
                raise DataError(
                    f"{source}: no column {actual!r}, which `columns` names for {wanted!r}; {found_columns(row)}"
                )
        yield source, row | {wanted: row[actual] for wanted, actual in (columns or {}).items()}
    if empty:
        raise DataError(f"{path}:1: the file is empty: it needs at least one record")


def _read_rows(path: str, split: str) -> Iterator[tuple[int, Any]]:
    reader = READERS.get(Path(path).suffix.lower())
    if reader is None:
        if Path(path).exists():
            raise DataError(f"{path}:1: not a data file: give a file that ends in {', '.join(READERS)}")
        name, _, config = path.partition(":")
        return _load_with_datasets(path, split, name, config or None)
    if not Path(path).is_file():
        raise DataError(f"{path}:1: there is no such file (looked from {Path.cwd()})")
    return reader(path)


def _read_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, number)
            if text.strip():
                try:
                    yield number, json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{path}:{number}: not JSON ({error}): a line must hold one whole object"
                    ) from error


def _read_json(path: str) -> Iterator[tuple[int, Any]]:
    """Read a list of objects one by one, to know the line of each. Without a list the file is read as JSON lines."""
    text = _decode(Path(path).read_bytes(), path, 1)
    position = _skip_space(text, 0)
    if not text.startswith("[", position):
        yield from _read_jsonl(path)
        return
    position = _skip_space(text, position + 1)
    line, counted = 1, 0
    more = not text.startswith("]", position)
    while more:
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = json.JSONDecoder().raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            raise DataError(f"{path}:{line}: not JSON ({error}): the file must be a list of objects") from error
        yield line, row
        position = _skip_space(text, end)
        more = text.startswith(",", position)
        if more:
            position = _skip_space(text, position + 1)
    closed = text.startswith("]", position)
    position = _skip_space(text, position + 1) if closed else position
    if not closed or position < len(text):
        line = text.count("\n", 0, position) + 1
        raise DataError(f"{path}:{line}: not JSON: objects need ',' between them and nothing after the last ']'")


def _read_csv(path: str) -> Iterator[tuple[int, Any]]:
    text = _decode(Path(path).read_bytes(), path, 1)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in reader:
            if not row:
                pass
            elif header is None:
                header = row
                if len(set(header)) < len(header):
                    raise DataError(f"{path}:{line}: a column name stands twice in the header: {', '.join(header)}")
            elif len(row) != len(header):
                raise DataError(f"{path}:{line}: {len(row)} fields, but the header has {len(header)}: quote the commas")
            else:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV ({error}): check the quotes of this record") from error


def _read_parquet(path: str) -> Iterator[tuple[int, Any]]:
    return _load_with_datasets(path, "train", "parquet", None, data_files=path)


def _load_with_datasets(
    path: str, split: str, name: str, config: str | None, **files: str
) -> Iterator[tuple[int, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path}:1: neither .jsonl, .json nor .csv, and Parquet files and hub datasets need the datasets package: "
            "pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(name, config, split=split, **files)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path}:1: no such file, and not a dataset that could be loaded (split {split}): {error}"
        ) from error
    return enumerate(rows, start=1)


READERS: dict[str, Callable[[str], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _skip_space(text: str, position: int) -> int:
    match = JSON_SPACE.match(text, position)
    assert match is not None
    return match.end()


def _decode(data: bytes, path: str, first_line: int) -> str:
    """Decode UTF-8, with or without a byte order mark at the start of the file."""
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason}): convert the file to UTF-8") from error


def kind_of(value: object) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)


def found_columns(record: Record) -> str:
    return f"found {', '.join(repr(name) for name in record) or 'none'}"
