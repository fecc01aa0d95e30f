"""A run ends in good order: by a signal, with its launcher, with one of its ranks, and when nothing moves."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests import supervised_rank
from tests.launching import ROOT, alone, environment, under_deepspeed, under_torchrun
from training.distributed import free_port
from training.signals import Process, launchers, this_process
from training.supervision import EXIT_HUNG, EXIT_PEER_GONE, EXIT_STOPPED

# A machine at work on other things needs long to start two ranks; what is stated in seconds counts from then on.
START_SECONDS = 120.0
# Each takes below 10 s where nothing else runs; only a launcher that kills its ranks takes 30.
END_SECONDS = 25.0
LONG_WATCHDOG = "300"
WATCHDOG_SECONDS = 5


class Run:
    """Two ranks forked from a process that has imported all they need, so that they start in a second."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        folder.mkdir()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.supervised_rank", "deepspeed"])
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks: list[BaseProcess] = []
        for rank in range(2):
            variables = {**environment(), **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks.append(
                context.Process(
                    target=supervised_rank.as_rank,
                    args=(variables, [str(folder), *arguments], folder / f"console.{rank}"),
                    daemon=True,
                )
            )
            self.ranks[-1].start()

    def wait_until_started(self) -> "Run":
        assert wait_for(lambda: started(self.folder)), self.console(0) + self.console(1)
        return self

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.ranks[rank].pid or 0, number)

    def code(self, rank: int, seconds: float) -> int | None:
        """Exit code of a rank that has these seconds to end."""
        self.ranks[rank].join(seconds)
        return self.ranks[rank].exitcode

    def console(self, rank: int) -> str:
        return (self.folder / f"console.{rank}").read_text()

    def last_line(self, rank: int) -> str:
        return self.console(rank).splitlines()[-1]

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(*arguments: str) -> Run:
        runs.append(Run(tmp_path / "run", *arguments))
        return runs[-1].wait_until_started()

    try:
        yield start
    finally:
        for run in runs:
            run.kill()


def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_step(start: Callable[..., Run]) -> None:
    run = start(LONG_WATCHDOG)
    run.signal(1, signal.SIGUSR1)
    assert [run.code(0, END_SECONDS), run.code(1, END_SECONDS)] == [EXIT_STOPPED, EXIT_STOPPED]
    assert saved(run.folder, 0) == saved(run.folder, 1)
    assert run.console(0) == "SIGUSR1: this run saves and stops\n"
    assert run.console(1) == ""


def test_signals_that_come_together_are_one_and_a_later_one_ends_a_rank_that_waits_for_others(
    start: Callable[..., Run],
) -> None:
    run = start(LONG_WATCHDOG)
    run.signal(1, signal.SIGSTOP)
    run.signal(0, signal.SIGINT)
    time.sleep(0.2)
    run.signal(0, signal.SIGTERM)
    assert run.code(0, 5.5) is None
    run.signal(0, signal.SIGINT)
    assert run.code(0, 2) == 128 + signal.SIGINT
    assert run.last_line(0) == f"error: a second SIGINT ends process {run.ranks[0].pid} before it has saved"
    assert not list(run.folder.glob("saved.*"))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_by_the_other_in_one_line(start: Callable[..., Run], killed: int) -> None:
    run = start(LONG_WATCHDOG)
    run.signal(killed, signal.SIGKILL)
    assert run.code(1 - killed, END_SECONDS) == EXIT_PEER_GONE
    line = run.last_line(1 - killed)
    assert re.match(rf"error: rank {1 - killed} stops .*: rank {killed} \(process {run.ranks[killed].pid} on ", line)
    assert line.endswith("is gone")
    assert run.console(1 - killed) == f"{line}\n"


def test_a_rank_that_waits_for_no_other_ends_with_a_killed_one(start: Callable[..., Run]) -> None:
    run = start(LONG_WATCHDOG, "finds_no_boundary", "0", "3")
    run.signal(1, signal.SIGKILL)
    assert run.code(0, END_SECONDS) == EXIT_PEER_GONE
    assert re.match(rf"error: rank 0 stops: rank 1 \(process {run.ranks[1].pid} on .*\) is gone$", run.last_line(0))


@pytest.mark.parametrize("failed", [0, 1])
def test_the_exception_of_a_rank_is_the_last_line_of_the_other(start: Callable[..., Run], failed: int) -> None:
    run = start(LONG_WATCHDOG, "fails", str(failed), "5")
    assert [run.code(1 - failed, END_SECONDS), run.code(failed, END_SECONDS)] == [EXIT_PEER_GONE, 1]
    line = run.last_line(1 - failed)
    assert f"rank {failed} failed first, RuntimeError: no such reward, at tests/supervised_rank.py:" in line
    assert run.console(1 - failed) == f"{line}\n"
    assert f"RuntimeError: no such reward\nrank {failed} failed in update of step 5, at tests/" in run.console(failed)


def test_a_rank_that_leaves_early_ends_the_run(start: Callable[..., Run]) -> None:
    run = start(LONG_WATCHDOG, "leaves", "1", "5")
    assert [run.code(0, END_SECONDS), run.code(1, END_SECONDS)] == [EXIT_PEER_GONE, 0]
    assert "rank 1 failed first, SystemExit: 0" in run.last_line(0)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """Runs whose ranks do nothing for longer than the watchdog waits, all at the same time; and have then ended."""
    folder = tmp_path_factory.mktemp("idle")
    events = {"stopped 0": (), "stopped 1": (), "loops": ("loops", "1", "5"), "suspended": ("rests", "1", "3")}
    events["slow"] = ("takes_its_time", "1", "4")
    runs: dict[str, Run] = {}
    try:
        for name, event in events.items():
            runs[name] = Run(folder / name, str(WATCHDOG_SECONDS), *event)
            runs[name].wait_until_started()
        for name, rank in (("suspended", 0), ("suspended", 1), ("stopped 0", 0), ("stopped 1", 1)):
            runs[name].signal(rank, signal.SIGSTOP)
        time.sleep(WATCHDOG_SECONDS + 1)
        for rank in range(2):
            runs["suspended"].signal(rank, signal.SIGCONT)
        time.sleep(3)
        yield runs
    finally:
        for run in runs.values():
            run.kill()


@pytest.mark.parametrize("stopped", [0, 1])
def test_the_watchdog_names_a_rank_that_is_stopped(idle: dict[str, Run], stopped: int) -> None:
    run = idle[f"stopped {stopped}"]
    assert run.code(1 - stopped, END_SECONDS) == EXIT_HUNG
    line = run.last_line(1 - stopped)
    assert line.startswith("error: no rank has moved for 5 s (run.timeout_minutes): ")
    assert f"furthest behind is rank {stopped} (process {run.ranks[stopped].pid} on " in line
    assert re.search(r"in update of step \d+ for \d+ s, last seen at tests/supervised_rank.py:\d+ in main", line)
    assert line.endswith("and its process does not answer")
    assert "in _reduce_over_ranks" in run.console(1 - stopped)  # its own stack


def test_the_watchdog_names_a_rank_that_loops_and_not_those_that_wait_for_it(idle: dict[str, Run]) -> None:
    run = idle["loops"]
    assert [run.code(0, END_SECONDS), run.code(1, END_SECONDS)] == [EXIT_HUNG, EXIT_HUNG]
    for rank in range(2):
        assert "furthest behind is rank 1 " in run.last_line(rank)
        assert re.search(r"step 5 for \d s, last seen at tests/supervised_rank.py:\d+ in loops$", run.last_line(rank))
    assert " in loops" in run.console(1)


def test_a_long_phase_that_tells_that_it_moves_is_no_hang(idle: dict[str, Run]) -> None:
    run = idle["slow"]
    run.signal(1, signal.SIGTERM)
    assert [run.code(0, END_SECONDS), run.code(1, END_SECONDS)] == [EXIT_STOPPED, EXIT_STOPPED]


def test_ranks_that_were_suspended_blame_nobody(idle: dict[str, Run]) -> None:
    run = idle["suspended"]
    run.signal(0, signal.SIGTERM)
    assert [run.code(0, END_SECONDS), run.code(1, END_SECONDS)] == [EXIT_STOPPED, EXIT_STOPPED]


def test_sigterm_to_deepspeed_leaves_no_orphans_and_a_saved_run(tmp_path: Path) -> None:
    with launched(under_deepspeed("tests.supervised_rank", str(tmp_path), LONG_WATCHDOG), tmp_path, 2) as runner:
        runner.terminate()
        assert wait_for(lambda: not group_is_alive(runner), END_SECONDS)
        assert saved(tmp_path, 0) == saved(tmp_path, 1)


@pytest.mark.parametrize("launcher", [under_deepspeed, under_torchrun])
def test_ctrl_c_saves_the_run_and_ends_its_launcher(launcher: Callable[..., list[str]], tmp_path: Path) -> None:
    with launched(launcher("tests.supervised_rank", str(tmp_path), LONG_WATCHDOG), tmp_path, 2) as runner:
        os.killpg(runner.pid, signal.SIGINT)  # as a terminal does
        assert wait_for(lambda: not group_is_alive(runner), END_SECONDS)
        assert runner.returncode != 0
        assert saved(tmp_path, 0) == saved(tmp_path, 1)


@pytest.mark.parametrize(
    ("number", "codes", "errors"),
    [
        (signal.SIGTERM, {EXIT_STOPPED}, []),
        # The launcher looks once a second: it finds the rank that was killed, or the one that has noticed it.
        (signal.SIGKILL, {256 - signal.SIGKILL, EXIT_PEER_GONE}, ["error: rank 1 stops ("]),
    ],
)
def test_how_a_rank_ends_is_the_exit_code_of_deepspeed(
    number: int, codes: set[int], errors: list[str], tmp_path: Path
) -> None:
    with launched(under_deepspeed("tests.supervised_rank", str(tmp_path), LONG_WATCHDOG), tmp_path, 2) as runner:
        os.kill(int((tmp_path / "started.0").read_text()), number)
        assert wait_for(lambda: not group_is_alive(runner), END_SECONDS)
        assert runner.returncode in codes
    console = (tmp_path / "console").read_text()
    assert re.findall(r"error: rank \d stops \(", console) == errors


def test_a_run_without_launcher_that_finds_no_boundary_ends_after_its_time(tmp_path: Path) -> None:
    launcher = tmp_path / "torchrun"
    launcher.write_text("import subprocess, sys\nsubprocess.run(sys.argv[1:])\n")
    command = alone("tests.supervised_rank", str(tmp_path), LONG_WATCHDOG, "finds_no_boundary", "0", "3")
    with launched([sys.executable, str(launcher), *command], tmp_path, 1) as runner:
        runner.kill()
        assert wait_for(lambda: not group_is_alive(runner), END_SECONDS)
    assert (tmp_path / "console").read_text().splitlines()[-1] == (
        "error: no step has ended in the 3 s since the launcher is gone"
    )
    assert not (tmp_path / "saved.0").exists()


def test_a_start_after_kills_waits_for_no_lock(tmp_path: Path) -> None:
    """Kills at any time of the start, and even a lock that lies there, leave nothing that a later start waits for."""
    operators = tmp_path / "operators"
    lock = operators / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    variables = {**environment(), "TORCH_EXTENSIONS_DIR": str(operators)}
    command = alone("tests.supervised_rank", str(tmp_path), LONG_WATCHDOG)
    for seconds in (0.3, 1.1, 2.3, None):
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.DEVNULL)
        try:
            if seconds is None:
                assert wait_for((tmp_path / "started.0").exists)
                process.terminate()
                assert process.wait(END_SECONDS) == EXIT_STOPPED
            else:
                time.sleep(seconds)
        finally:
            process.kill()
            process.wait()
    assert [path for path in operators.rglob("*") if path.is_file()] == [lock]  # nothing is ever built


FORKS = """
import os, signal, time
from training.signals import StopRequest

request = StopRequest()
child = os.fork()
if child == 0:
    time.sleep(5)
    os._exit(0)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
assert os.WTERMSIG(status) == signal.SIGTERM
assert request.number == 0
os.kill(os.getpid(), signal.SIGTERM)
deadline = time.monotonic() + 2
while request.number != signal.SIGTERM:
    assert time.monotonic() < deadline
    time.sleep(0.01)
request.close()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""


def test_a_process_that_a_rank_forks_keeps_its_signals_to_itself() -> None:
    # In a small process: this one may be too large to be forked.
    subprocess.run([sys.executable, "-c", FORKS], check=True, cwd=ROOT, timeout=60)


def test_a_later_process_with_the_same_pid_is_another_one() -> None:
    assert this_process().is_alive()
    assert not Process(os.getpid(), "1").is_alive()


def test_a_test_runner_is_no_launcher() -> None:
    assert launchers() == []


class launched:
    """A launcher in a session of its own, whose ranks have begun; all that is left of it is killed in the end."""

    def __init__(self, command: list[str], folder: Path, ranks: int) -> None:
        self.started = lambda: started(folder, ranks)
        with (folder / "console").open("w") as console:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )

    def __enter__(self) -> subprocess.Popen[bytes]:
        wait_for(lambda: self.started() or self.process.poll() is not None)
        return self.process

    def __exit__(self, *error: object) -> None:
        if group_is_alive(self.process):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def started(folder: Path, ranks: int = 2) -> bool:
    return all((folder / f"started.{rank}").exists() for rank in range(ranks))


def saved(folder: Path, rank: int) -> int:
    return int((folder / f"saved.{rank}").read_text())


def group_is_alive(leader: subprocess.Popen[bytes]) -> bool:
    leader.poll()
    try:
        os.killpg(leader.pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float = START_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()
