"""The list of mistakes fits the sources, and the tool tells a mistake that is noticed from one that is not."""

import subprocess
from pathlib import Path

import pytest

from scripts.benchmark import mutants
from scripts.benchmark.mutants import LAST_TESTS, ROOT, Mutant, all_mutants, mutated, run_tests, survey
from scripts.benchmark.mutations import MUTATIONS, TESTS

MUTANTS = all_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_has_its_place_and_still_compiles(mutant: Mutant) -> None:
    broken = mutated((ROOT / mutant.file).read_text(encoding="utf-8"), mutant)
    assert mutant.new != mutant.old
    compile(broken, mutant.file, "exec")


def test_there_are_many_mistakes_and_no_two_of_one_name() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 40


def test_every_file_with_mistakes_names_tests_that_exist() -> None:
    assert MUTATIONS.keys() == TESTS.keys()
    named = {test for tests in TESTS.values() for test in tests}
    assert all((ROOT / "tests" / test).is_file() for test in named | set(LAST_TESTS))


# The tool, on a repository of one function


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    root = tmp_path / "toy"
    (root / "tests").mkdir(parents=True)
    (root / ".gitignore").write_text("ignored.py\n")
    (root / "ignored.py").write_text("raise AssertionError\n")
    (root / "sums.py").write_text("def add(a, b):\n    return a + b\n\n\ndef half(a):\n    return a / 2\n")
    (root / "tests" / "test_sums.py").write_text(
        "import sums\n\n\ndef test_add():\n    assert sums.add(2, 3) == 5\n\n\n"
        "def test_half_of_0():\n    assert sums.half(0) == 0\n"
    )
    (root / "tests" / "test_where.py").write_text(
        f"import pathlib\n\n\ndef test_a_copy_runs():\n    here = pathlib.Path(__file__).parents[1]\n"
        f"    assert here != pathlib.Path({str(root)!r}) and not (here / 'ignored.py').exists()\n"
    )
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


def toy_mutant(name: str, old: str, new: str, tests: tuple[str, ...] = ("tests/test_sums.py",)) -> Mutant:
    return Mutant(name, "sums.py", old, new, tests)


CAUGHT = toy_mutant("takes away", "a + b", "a - b")
SURVIVES = toy_mutant("takes a third", "a / 2", "a / 3", tests=())


def test_a_caught_mistake_is_shown_with_its_test(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert survey(toy, [CAUGHT]) == 0
    sound, row, total = capsys.readouterr().out.splitlines()
    assert sound.startswith("without a mistake: the tests passed in ")
    assert row.startswith("caught  ")
    assert row.endswith(" s  sums.py: takes away  [test_sums.py::test_add]")
    assert total.startswith("of 1: 1 caught, in ")


def test_a_mistake_that_survives_ends_the_tool_with_1(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (toy / "sums.py").read_text()
    assert survey(toy, [SURVIVES, CAUGHT], jobs=2) == 1
    _, *rows, total = capsys.readouterr().out.splitlines()
    verdicts = {row.partition("sums.py: ")[2].partition("  [")[0]: row.split()[0] for row in rows}
    assert verdicts == {"takes a third": "SURVIVED", "takes away": "caught"}
    assert "1 caught" in total and "1 SURVIVED" in total
    assert (toy / "sums.py").read_text() == source
    assert not list(toy.rglob("__pycache__"))


def test_a_file_that_cannot_be_imported_is_not_taken_for_a_test_that_fails(toy: Path) -> None:
    (toy / "sums.py").write_text("import nothing_of_this_name\n")
    outcome = run_tests(toy, ["tests/test_sums.py"], timeout_seconds=60)
    assert outcome.verdict == "broken"
    assert "nothing_of_this_name" in outcome.detail


def test_tests_that_fail_without_a_mistake_prove_nothing(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "tests" / "test_sums.py").write_text("def test_wrong():\n    assert False\n")
    assert survey(toy, [CAUGHT]) == 2
    assert "the tests failed" in capsys.readouterr().out


def test_tests_that_hang_are_ended(toy: Path) -> None:
    (toy / "tests" / "test_sums.py").write_text("import time\n\n\ndef test_waits():\n    time.sleep(600)\n")
    assert run_tests(toy, ["tests/test_sums.py"], timeout_seconds=2).verdict == "timed out"


def test_time_out_counts_as_caught_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.print_outcomes([CAUGHT], lambda mutant: mutants.Outcome("timed out", "after 2 s", 2.0), 1) == 0
    assert capsys.readouterr().out.startswith("caught (time-out)     2.0 s  sums.py: takes away  [after 2 s]\n")


@pytest.mark.parametrize("old", ["a - b", "def"], ids=["nowhere", "twice"])
def test_a_mistake_without_its_place_is_refused_before_a_test_runs(toy: Path, old: str) -> None:
    with pytest.raises(ValueError, match=r"takes away: its text stands [02] times in sums\.py, not once"):
        survey(toy, [toy_mutant("takes away", old, "")])
