"""What a run must survive: kills, a full disk, flipped bits, a dead rank; and many iterations."""

import contextlib
import os
import random
import resource
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from scripts.torture.ranks import POLL_SECONDS, Ranks, start
from scripts.torture.runs import WAIT_SECONDS, Run, Workshop
from training import storage
from training.manifest import DamagedCheckpoint, verify
from training.supervision import EXIT_PEER_GONE, EXIT_STOPPED

SAVING_SHARE = 0.4
"""Share of the kills that are aimed at a save."""
STARTED_SHARE = 0.7
"""Share of the other kills that come after the first step of a start."""
SAVING_SECONDS = 0.05
GONE_SECONDS = 20.0
"""How long the other ranks may take to end after one has died."""


@dataclass
class Outcome:
    """What became of one stage."""

    stage: str
    faults: int = 0
    resumes: int = 0
    rounds: int = 0
    """Runs that came to their end."""
    lost_steps: list[int] = field(default_factory=list)
    """Steps that were logged but lay after the checkpoint that the run went on from; one number for each fault."""
    bitwise: bool | None = True
    """Whether all runs that ended were equal to the undisturbed one; None where `worst` tells how far they were."""
    worst: float = 0.0
    slowest_end: float = 0.0
    """Most seconds that ranks took to end by themselves after a fault."""
    seconds: float = 0.0

    def line(self) -> str:
        lost = max(self.lost_steps, default=0)
        ended = f"all gone within {self.slowest_end:.1f} s, " if self.slowest_end else ""
        equal = f"differs by {self.worst:.0e}" if self.bitwise is None else f"bitwise {'yes' if self.bitwise else 'NO'}"
        return (
            f"{self.stage}: {self.faults} faults, {self.resumes} resumes from a checkpoint, {self.rounds} runs ended, "
            f"steps lost {sum(self.lost_steps)} (at most {lost} at once), {ended}{equal}, {self.seconds:.0f} s"
        )


def kills(workshop: Workshop, stage: str, count: int, draw: random.Random) -> Outcome:
    """Kill the whole process group at random moments, 4 in 10 while a checkpoint is written, and go on each time."""

    def kill(processes: Ranks, run: Run, outcome: Outcome) -> None:
        processes.kill()

    return _harm_and_go_on(workshop, stage, count, draw, kill)


def rank_deaths(workshop: Workshop, stage: str, count: int, draw: random.Random) -> Outcome:
    """Kill one rank alone: the other ends by itself, with an error, and the run goes on from its last checkpoint."""

    def kill_one(processes: Ranks, run: Run, outcome: Outcome) -> None:
        os.kill(draw.choice(processes.running()), signal.SIGKILL)
        codes = _end(processes, run, GONE_SECONDS, outcome)
        # Both may have been through when the signal came.
        assert 0 not in codes or set(codes) <= {0, -signal.SIGKILL}, (codes, run.log.read_text()[-3000:])

    return _harm_and_go_on(workshop, stage, count, draw, kill_one)


def stops(workshop: Workshop, stage: str, count: int, draw: random.Random) -> Outcome:
    """Ask one rank or both to stop: they save and end together, and no step is lost."""

    def stop(processes: Ranks, run: Run, outcome: Outcome) -> None:
        asked = draw.choice([[pid] for pid in processes.pids] + [processes.pids])
        for pid in asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, draw.choice([signal.SIGTERM, signal.SIGUSR1]))
        codes = _end(processes, run, GONE_SECONDS, outcome)
        if set(codes) == {EXIT_STOPPED}:
            assert run.steps_logged() == run.newest(), (run.steps_logged(), run.newest(), run.log.read_text()[-3000:])
        else:  # it came before the first step, or after the last
            early = {-signal.SIGTERM, -signal.SIGUSR1, EXIT_STOPPED, EXIT_PEER_GONE}
            assert set(codes) == {0} or set(codes) <= early, (codes, run.log.read_text()[-3000:])

    return _harm_and_go_on(workshop, stage, count, draw, stop)


def resizes(workshop: Workshop, stage: str, count: int, draw: random.Random) -> Outcome:
    """Ask a run to stop and go on with another number of ranks and another ZeRO stage, to 1e-4."""
    outcome = Outcome(stage)
    right = workshop.right[stage].numbers()
    for number in range(count):
        run, ranks, zero_stage = workshop.copy(stage, f"resized-{number}"), 2, workshop.zero_stage
        while not (run.output / "results.json").exists():
            processes = start(stage, run.file, run.log, ranks)
            while processes.running() and "eta" not in run.log.read_text():
                time.sleep(POLL_SECONDS)
            processes.wait(draw.uniform(0, workshop.seconds[stage] / 4))
            for pid in processes.running()[:1]:
                os.kill(pid, signal.SIGTERM)
            codes = _end(processes, run, GONE_SECONDS * ranks, outcome)
            # A signal that comes after the results is too late to stop anything.
            ended = (run.output / "results.json").exists()
            assert ended or set(codes) <= {0, EXIT_STOPPED}, (codes, run.log.read_text()[-3000:])
            outcome.faults += 1
            outcome.resumes += "resumed from" in run.log.read_text()
            ranks, zero_stage = draw.choice([1, 2, 4]), draw.choice([1, 2, 3])
            run.write(engine={**workshop.options[stage]["engine"], "zero_stage": zero_stage})
        outcome.rounds += 1
        worst = max(abs(a - b) / max(abs(b), 1.0) for a, b in zip(run.numbers(), right, strict=True))
        assert worst < 1e-4, f"{stage} differs by {worst} once it went on with {ranks} ranks at ZeRO {zero_stage}"
        outcome.worst = max(outcome.worst, worst)
    outcome.bitwise = None
    return outcome


def _harm_and_go_on(
    workshop: Workshop, stage: str, count: int, draw: random.Random, harm: Callable[[Ranks, Run, Outcome], None]
) -> Outcome:
    """Harm a run at `count` random moments and start it again each time; a new one when it has come to its end."""
    outcome, run = Outcome(stage), workshop.copy(stage, harm.__name__)
    right = workshop.right[stage].digest()
    while outcome.faults < count:
        before = run.newest()
        processes = start(stage, run.file, run.log)
        if _wait_for_moment(processes, run, draw, workshop.seconds[stage]):
            harm(processes, run, outcome)
            outcome.faults += 1
            outcome.lost_steps.append(max(0, run.steps_logged() - run.newest()))
            _check_where_it_began(run, before, outcome)
            if set(processes.codes.values()) != {0}:
                continue
        codes = list(processes.codes.values())
        assert set(codes) == {0}, f"{run.stage} ended with {codes}:\n{run.log.read_text()[-3000:]}"
        _compare(run, right, outcome)
        run.forget()
    before = run.newest()
    run.finish()
    _check_where_it_began(run, before, outcome)
    _compare(run, right, outcome)
    return outcome


def full_disks(workshop: Workshop, stage: str, count: int, draw: random.Random) -> Outcome:
    """Let one rank write no file longer than a random length: the run ends with an error, goes on with room."""
    outcome, run = Outcome(stage), workshop.copy(stage, "full")
    right = workshop.right[stage].digest()
    checkpoints = workshop.right[stage].checkpoints
    for _ in range(count):
        victim = draw.randrange(2)
        # Ranks have more or less to write: the limit is one that this one meets.
        files = checkpoints.rglob(f"rank-{victim:05d}.safetensors")
        limit = draw.randrange(1, max(file.stat().st_size for file in files))
        before = run.newest()
        processes = start(stage, run.file, run.log, in_rank=partial(_limit_files, victim, limit))
        ended = processes.wait(WAIT_SECONDS)
        processes.kill()
        codes = list(processes.codes.values())
        assert ended and 0 not in codes, f"a full disk ended with {codes}:\n{run.log.read_text()[-3000:]}"
        assert "untouched" in run.log.read_text() or run.newest() == before, run.log.read_text()[-3000:]
        for name in storage.checkpoint_names(run.checkpoints):
            verify(run.checkpoints / name)
        outcome.faults += 1
        outcome.lost_steps.append(max(0, run.steps_logged() - run.newest()))
        if draw.random() < 0.3:
            run.finish()
            _compare(run, right, outcome)
            run.forget()
    run.finish()
    _compare(run, right, outcome)
    return outcome


def bit_flips(workshop: Workshop, stage: str, count: int, draw: random.Random) -> Outcome:
    """Flip a bit of a random file of the newest checkpoint, or cut the file: it must be noticed each time.

    The last one is resumed from: the run takes the checkpoint before and ends as it would have.
    """
    outcome, run = Outcome(stage), workshop.copy(stage, "flipped")
    right = workshop.right[stage].digest()
    shutil.copytree(workshop.right[stage].output, run.output)
    for leftover in ("results.json", "final"):
        target = run.output / leftover
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    newest = run.checkpoints / storage.checkpoint_names(run.checkpoints)[-1]
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    for number in range(count):
        file = draw.choice(files)
        whole = file.read_bytes()
        file.write_bytes(_damaged(whole, draw))
        try:
            verify(newest)
        except DamagedCheckpoint:
            outcome.faults += 1
        else:
            raise AssertionError(f"damage number {number}, to {file}, was not noticed")
        if number < count - 1:
            file.write_bytes(whole)
    outcome.lost_steps.append(run.steps_logged())
    run.finish()
    assert "it is now called damaged-" in run.log.read_text(), run.log.read_text()
    _check_where_it_began(run, 0, outcome)
    _compare(run, right, outcome)
    return outcome


def soak(workshop: Workshop, iterations: int) -> Iterator[str]:
    """Many PPO iterations in one process; tells how its memory grows after the first fifth.

    Raises: AssertionError where that is more than 1 MiB in 100 iterations.
    """
    options = workshop.options["step3_ppo"]
    changes = {"save_every": 0, "save_minutes": 0.0, "eval_every": 0}
    longer = options | {"iterations": iterations, "ppo_epochs": 1, "run": options["run"] | changes}
    run = Run("step3_ppo", workshop.folder / "soaked", longer)
    processes = start("step3_ppo", run.file, run.log, ranks=1)
    points: list[tuple[int, float]] = []
    while processes.running():
        step = run.steps_logged()
        pages = Path(f"/proc/{processes.pids[0]}/statm").read_text().split()
        if step and (not points or step > points[-1][0]) and len(pages) > 1:
            points.append((step, int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20))
        time.sleep(0.2)
    assert processes.codes[processes.pids[0]] == 0, run.log.read_text()[-3000:]
    settled = [point for point in points if point[0] > iterations / 5]
    slope = 100 * statistics.linear_regression(*zip(*settled, strict=True)).slope
    yield f"soak: {iterations} iterations, {points[-1][1]:.0f} MiB, {slope:+.3f} MiB in 100 iterations"
    assert slope <= 1.0, f"memory grows by {slope:.2f} MiB in 100 iterations"


def _wait_for_moment(processes: Ranks, run: Run, draw: random.Random, typical_seconds: float) -> bool:
    """Wait for a moment to strike; False if the run has ended before it came."""
    if draw.random() < SAVING_SHARE:
        deadline = time.monotonic() + WAIT_SECONDS
        skip = draw.randrange(3)  # saves to let pass
        seen: set[str] = set()
        while processes.running() and time.monotonic() < deadline:
            found = set(os.listdir(run.checkpoints)) if run.checkpoints.is_dir() else set()
            seen |= {name for name in found if name.startswith(storage.SAVING)}
            if len(seen) > skip:
                time.sleep(draw.uniform(0, SAVING_SECONDS))
                break
            time.sleep(POLL_SECONDS)
    else:
        if draw.random() < STARTED_SHARE:
            while processes.running() and "eta" not in run.log.read_text():
                time.sleep(POLL_SECONDS)
        processes.wait(draw.uniform(0, typical_seconds / 2))
    return bool(processes.running())


def _check_where_it_began(run: Run, before: int, outcome: Outcome) -> None:
    """A run never goes on from less than the newest checkpoint that it found."""
    resumed = [line for line in run.log.read_text().splitlines() if line.startswith("resumed from")]
    if resumed:
        outcome.resumes += 1
        assert before == 0 or resumed[0].endswith(f"step-{before:06d}"), (before, resumed)


def _end(processes: Ranks, run: Run, seconds: float, outcome: Outcome) -> list[int]:
    """The exit codes of ranks that must end by themselves within so many seconds."""
    # Until all have met, and one prints, none can tell that another is missing: they wait run.timeout_minutes for it.
    have_met = run.log.stat().st_size > 0
    begun = time.monotonic()
    gone = processes.wait(seconds if have_met else WAIT_SECONDS)
    if have_met:
        outcome.slowest_end = max(outcome.slowest_end, time.monotonic() - begun)
    processes.kill()
    assert gone, f"{run.stage} was not gone within {seconds} s:\n{run.log.read_text()[-3000:]}"
    return list(processes.codes.values())


def _compare(run: Run, right: str, outcome: Outcome) -> None:
    outcome.rounds += 1
    outcome.bitwise = bool(outcome.bitwise) and run.digest() == right


def _limit_files(victim: int, num_bytes: int, rank: int) -> None:
    if rank == victim:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def _damaged(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    if draw.random() < 0.2:
        return data[:place]
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
