"""The table of claims in tests/README.md and the tests that it names agree.

`python -m tests.test_claims L5 K1` prints the tests that name one of the claims.
"""

import ast
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
COUNTS = {"F": 9, "R": 8, "K": 8, "A": 7, "L": 15, "G": 7, "O": 6}
NUMBERS = [f"{letter}{number}" for letter, count in COUNTS.items() for number in range(1, count + 1)]
# What a docstring begins with: one number or several with commas between them.
LEADING = re.compile(r"[FRKALGO]\d+(?:, [FRKALGO]\d+)*(?![\w-])")
ClaimsByTest = Mapping[str, set[str]]
"""The claims that each test names, by `file.py::function`."""


def claims_of(text: str) -> list[str]:
    """The numbers that a docstring or a case's id begins with."""
    found = LEADING.match(text)
    return found[0].split(", ") if found else []


def claims_by_test(source: str) -> dict[str, set[str]]:
    """The test functions of a file, with the claims that their docstring or the ids of their cases begin with."""
    tests = {}
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
            inside = [node for decorator in function.decorator_list for node in ast.walk(decorator)]
            ids = [node.value for node in inside if isinstance(node, ast.keyword) and node.arg in ("id", "ids")]
            constants = [node for value in ids for node in ast.walk(value) if isinstance(node, ast.Constant)]
            texts = [ast.get_docstring(function) or "", *(str(constant.value) for constant in constants)]
            tests[function.name] = {claim for text in texts for claim in claims_of(text)}
    return tests


def all_tests() -> ClaimsByTest:
    files = sorted(FOLDER.glob("test_*.py"))
    return {
        f"{file.name}::{name}": claims
        for file in files
        for name, claims in claims_by_test(file.read_text(encoding="utf-8")).items()
    }


def rows_of(table: str) -> list[list[str]]:
    """The cells of every row of the tables of a text that begins with a claim's number or what looks like one."""
    lines = [line.strip() for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "number" and set(row[0]) != {"-"}]


def problems(table: str, tests: ClaimsByTest, numbers: Sequence[str] = NUMBERS) -> list[str]:
    """What is wrong with a table, given the tests that exist."""
    rows, found, held = rows_of(table), [], set()
    if [row[0] for row in rows] != list(numbers):
        found.append(f"the rows are {[row[0] for row in rows]}, not {list(numbers)}")
    for row in rows:
        if len(row) != 4 or not all(row):
            found.append(f"{row[0]} needs 4 cells with something in them")
            continue
        number, _, cell, state = row
        named = re.findall(r"`([^`]+)`", cell)
        if state == "holds":
            held.add(number)
            if not named:
                found.append(f"{number} holds, but names no test")
        elif not re.fullmatch(r"(not applicable|waits for): \S.*", state):
            found.append(f"{number} gives no reason why it does not hold")
        elif named:
            found.append(f"{number} does not hold, but names a test")
        for name in named:
            if name not in tests:
                found.append(f"{number} names {name}, which does not exist")
            elif number not in tests[name]:
                found.append(f"{number} names {name}, which does not name it")
    for name, claims in tests.items():
        found += [f"{name} names {claim}, which no row says holds" for claim in sorted(claims - held)]
    return found


def test_the_table_and_the_tests_agree() -> None:
    assert problems((FOLDER / "README.md").read_text(encoding="utf-8"), all_tests()) == []


GOOD_TABLE = """
Words before the table.

| number | claim | tests | state |
|---|---|---|---|
| F1 | padding changes nothing | `test_a.py::test_one`, `test_b.py::test_three` | holds |

| number | claim | tests | state |
|---|---|---|---|
| F2 | a run goes on where it stopped | none | waits for: checkpoints |
"""
GOOD_TESTS = {"test_a.py::test_one": {"F1"}, "test_a.py::test_two": set(), "test_b.py::test_three": {"F1"}}


def test_a_good_table_has_no_problem() -> None:
    assert problems(GOOD_TABLE, GOOD_TESTS, ["F1", "F2"]) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("| F2 | a run goes on where it stopped | none | waits for: checkpoints |", "", "the rows are ['F1'], not"),
        ("| F2 |", "| F3 |", "the rows are ['F1', 'F3'], not"),
        ("| F1 |", "| F2 |", "the rows are ['F2', 'F2'], not"),
        ("padding changes nothing", "", "F1 needs 4 cells"),
        ("| none |", "| none | more |", "F2 needs 4 cells"),
        ("test_a.py::test_one", "test_a.py::test_on", "F1 names test_a.py::test_on, which does not exist"),
        ("test_a.py::test_one", "test_a.py::test_two", "F1 names test_a.py::test_two, which does not name it"),
        ("`test_a.py::test_one`, `test_b.py::test_three`", "many", "F1 holds, but names no test"),
        ("waits for: checkpoints", "waits for:", "F2 gives no reason"),
        ("waits for: checkpoints", "mostly", "F2 gives no reason"),
        ("| none |", "| `test_a.py::test_one` |", "F2 does not hold, but names a test"),
        ("| holds |", "| not applicable: no padding |", "test_a.py::test_one names F1, which no row says holds"),
    ],
)
def test_a_bad_table_is_found(old: str, new: str, problem: str) -> None:
    assert old in GOOD_TABLE
    assert any(found.startswith(problem) for found in problems(GOOD_TABLE.replace(old, new), GOOD_TESTS, ["F1", "F2"]))


@pytest.mark.parametrize("claim", ["F2", "F9"], ids=["one that waits", "one that is not there"])
def test_a_test_that_names_a_claim_of_no_holding_row_is_found(claim: str) -> None:
    tests = {**GOOD_TESTS, "test_c.py::test_four": {claim}}
    assert problems(GOOD_TABLE, tests, ["F1", "F2"]) == [f"test_c.py::test_four names {claim}, which no row says holds"]


def test_claims_are_read_where_a_docstring_or_an_id_begins_with_them() -> None:
    source = '''
@pytest.mark.parametrize("check", [pytest.param("R1", id="L5: two ranks"), pytest.param("b", id="K1 in the middle")])
def test_one(check):
    """F1, A12: and not F2."""

@pytest.mark.parametrize("name", ["G1"], ids=["O6"])
def test_two(name):
    """What F3 says."""

def test_three():
    """F1-like, L1b."""

def other():
    """F4: no test."""
'''
    assert claims_by_test(source) == {"test_one": {"F1", "A12", "L5", "K1"}, "test_two": {"O6"}, "test_three": set()}


if __name__ == "__main__":
    wanted = set(sys.argv[1:])
    print(*(f"tests/{name}" for name, claims in all_tests().items() if claims & wanted), sep="\n")
