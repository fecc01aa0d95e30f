"""Breaks the arithmetic on purpose, one mistake at a time, and tells which the tests notice:
`python -m scripts.benchmark.mutants [--only TEXT] [--jobs N] [--all_tests]`.

Mistakes and the tests to ask stand in `mutations.py`. Works on copies of the repository's files, never on the files
themselves. Ends with code 1 if a mistake survives, and with 2 if the tests fail without one.
"""

import argparse
import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmark.mutations import MUTATIONS, TESTS

ROOT = Path(__file__).resolve().parents[2]
# Runs of minutes: asked where no other test has noticed.
LAST_TESTS = ("test_invariance.py", "test_reference_runs.py")
# One thread, and no bytecode: Python takes a source of the same size and second for the one that it has compiled.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}


@dataclass(frozen=True)
class Mutant:
    """One mistake: `old`, which stands exactly once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Test files to ask, in this order; none for all of them."""


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended."""

    verdict: str
    """passed; failed; timed out; or broken, where the tests did not run."""
    detail: str
    """The first test that failed; else the end of what was printed."""
    seconds: float


def all_mutants(all_tests: bool = False) -> list[Mutant]:
    """The mistakes of `mutations.py`."""
    return [
        Mutant(
            name, file, old, new, () if all_tests else tuple(f"tests/{test}" for test in (*TESTS[file], *LAST_TESTS))
        )
        for file, mistakes in MUTATIONS.items()
        for name, (old, new) in mistakes.items()
    ]


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the mistake in it."""
    count = source.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: its text stands {count} times in {mutant.file}, not once: {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)


def copy_repository(root: Path, folder: Path) -> None:
    """Copies what git tracks, or would track, as it stands in the working tree."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in sorted(set(filter(None, listed.split("\0")))):
        if (root / name).is_file():  # a file that was deleted is still listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)


@contextlib.contextmanager
def applied(mutant: Mutant, folder: Path) -> Iterator[None]:
    """The copy in `folder` with the mistake in it."""
    path = folder / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(mutated(original, mutant), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")


def run_tests(folder: Path, tests: Sequence[str], timeout_seconds: float | None) -> Outcome:
    """Runs test files of a copy up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    started = time.monotonic()
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        return Outcome("timed out", f"after {timeout_seconds:.0f} s", time.monotonic() - started)
    seconds = time.monotonic() - started
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", result.stdout, flags=re.MULTILINE)
    if result.returncode == 0:
        return Outcome("passed", "", seconds)
    # A mistake is noticed by a test. Where files cannot even be imported, there is none that could.
    if result.returncode == 1 and failed:
        return Outcome("failed", failed[1].removeprefix("tests/"), seconds)
    return Outcome("broken", result.stdout[-2000:], seconds)


def survey(root: Path, mutants: Sequence[Mutant], jobs: int = 1) -> int:
    """Prints for each mistake whether the tests of a copy of `root` notice it. Returns the exit code."""
    for mutant in mutants:
        mutated((root / mutant.file).read_text(encoding="utf-8"), mutant)
    every_file = any(not mutant.tests for mutant in mutants)
    tests = [] if every_file else list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    with tempfile.TemporaryDirectory() as temporary:
        folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(jobs):
            folder = Path(temporary) / f"copy{job}"
            copy_repository(root, folder)
            folders.put(folder)
        sound = run_tests(folder, tests, timeout_seconds=None)
        print(f"without a mistake: the tests {sound.verdict} in {sound.seconds:.0f} s", flush=True)
        if sound.verdict != "passed":
            print(sound.detail)
            return 2
        # Tests of one mistake are a part of those; one that waits for ever must end, and one of two jobs is slower.
        timeout_seconds = 3 * sound.seconds + 60

        def assess(mutant: Mutant) -> Outcome:
            folder = folders.get()
            try:
                with applied(mutant, folder):
                    return run_tests(folder, mutant.tests, timeout_seconds)
            finally:
                folders.put(folder)

        return print_outcomes(mutants, assess, jobs)


def print_outcomes(mutants: Sequence[Mutant], assess: Callable[[Mutant], Outcome], jobs: int) -> int:
    """A line for each mistake as it is assessed, and a count of the verdicts. Returns the exit code."""
    words = {"failed": "caught", "timed out": "caught (time-out)", "passed": "SURVIVED", "broken": "BROKEN"}
    verdicts: Counter[str] = Counter()
    started = time.monotonic()
    pool = ThreadPoolExecutor(jobs)
    try:
        pending = {pool.submit(assess, mutant): mutant for mutant in mutants}
        for future in as_completed(pending):
            mutant, outcome = pending[future], future.result()
            verdicts[words[outcome.verdict]] += 1
            line = f"{words[outcome.verdict]:<17}  {outcome.seconds:6.1f} s  {mutant.file}: {mutant.name}"
            print(f"{line}  [{outcome.detail.strip()}]" if outcome.detail else line, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    print(f"of {len(mutants)}: {counts}, in {time.monotonic() - started:.0f} s")
    return int(verdicts["SURVIVED"] + verdicts["BROKEN"] > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="mistakes whose name or file contains this")
    parser.add_argument("--jobs", type=int, default=1, help="mistakes assessed at once, each with a processor or two")
    parser.add_argument("--all_tests", action="store_true", help="ask the whole suite, not the tests of the file")
    parser.add_argument("--list", action="store_true", help="print the mistakes, and run nothing")
    arguments = parser.parse_args()
    mutants = [m for m in all_mutants(arguments.all_tests) if arguments.only in f"{m.file}: {m.name}"]
    if not mutants:
        parser.error(f"no mistake has {arguments.only!r} in its name or file: --list shows all")
    if arguments.list:
        print(*(f"{mutant.file}: {mutant.name}" for mutant in mutants), sep="\n")
        return
    try:
        sys.exit(survey(ROOT, mutants, arguments.jobs))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
