"""Ends a run in good order: when it is asked to stop, when one of its ranks is gone, and when nothing moves any more.

Each rank tells the others where it is through the store of the process group, and looks for them.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed

from training import distributed
from training.signals import Process, StopRequest, launchers, machine, say, this_process

EXIT_STOPPED = 143
"""Exit code of a run that was asked to stop and has saved: 128 + SIGTERM, by which schedulers know it."""
EXIT_HUNG = 75
"""Exit code of a run in which nothing moved any more and which has not saved: EX_TEMPFAIL, worth another try."""
EXIT_PEER_GONE = 1
"""Exit code of a rank that stops because another one has failed or is gone."""

POLL_SECONDS = 1.0
EXCHANGE_SECONDS = 2.0
PEER_GRACE_SECONDS = 5.0
"""How long the main thread of a rank has, once another rank is gone, to end by an error of its own."""
KEY = "supervision/{}"
_watching: "Supervisor | None" = None
LIBRARIES = ("torch", "deepspeed", distributed.__name__, __name__)


@contextlib.contextmanager
def watch(*, watchdog_minutes: float, orphan_minutes: float = 30.0) -> Iterator["Supervisor"]:
    """Supervises a run from the start of its process group until the block is left; all ranks enter it together.

    To stop early, a run saves and raises SystemExit(EXIT_STOPPED) in the block, on all ranks at the same step.

    Args:
        watchdog_minutes: how long no rank may report progress before the run ends with EXIT_HUNG.
        orphan_minutes: how long a run whose launcher is gone may take until its next step is done and saved.
    """
    global _watching
    supervisor = _watching = Supervisor(60 * watchdog_minutes, 60 * orphan_minutes)
    try:
        yield supervisor
    except (Exception, SystemExit) as end:
        if not (isinstance(end, SystemExit) and end.code == EXIT_STOPPED):
            supervisor.fail(end)
            raise
        supervisor.close()
        distributed.stop()
        raise
    supervisor.close()


def alive() -> None:
    """Tells that this process moves, from within a phase: one that takes hours, as a rollout may, is then no hang."""
    if _watching is not None:
        _watching.alive()


class Peer:
    """What this rank knows of a rank: who it is, what it told last, and when it moved, in seconds of its own clock."""

    def __init__(self, host: str, machine: str, process: Process) -> None:
        self.host = host
        self.machine = machine
        self.process = process
        self.told: dict[str, Any] = {"progress": (0, "", 0), "failure": None, "left": False}
        self.told_at = self.moved_at = 0.0

    def tell(self, told: dict[str, Any], clock: float) -> None:
        if told.get("time") != self.told.get("time"):
            self.told_at = clock
        if told["progress"][0] > self.told["progress"][0]:
            self.moved_at = clock
        self.told = told


class Supervisor:
    """Where this rank is, told by the main thread; two more threads watch it, its launcher and the other ranks."""

    def __init__(self, watchdog_seconds: float, orphan_seconds: float) -> None:
        self._watchdog_seconds = watchdog_seconds
        self._orphan_seconds = orphan_seconds
        self._exchange_seconds = min(EXCHANGE_SECONDS, watchdog_seconds / 5)
        self._rank = distributed.rank()
        self._progress = (0, "the start", 0)
        self._failure: tuple[int, str] | None = None
        self._left = self._stopping = self._store_lost = False
        self._clock = self._exchanged_at = 0.0
        self._closed, self._wake, self._exchanged = threading.Event(), threading.Event(), threading.Event()
        self._request = StopRequest()
        self._launchers = launchers()
        # A store is for one thread: this clone, with a connection of its own, is the exchange's.
        default_store: Any = torch.distributed.distributed_c10d._get_default_store()
        self._store = default_store.clone()
        self._publish()  # before anyone reads, as whoever reads a key that is not there waits for it
        self._peers = [
            Peer(*me) for me in distributed.gather_objects((socket.gethostname(), machine(), this_process()))
        ]
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._exchange_loop, self._judge_loop)]
        for thread in self._threads:
            thread.start()

    def progress(self, phase: str, step: int) -> None:
        """Tells that this rank moves and where it is; costs nothing, so that every phase of a step can call it."""
        self._progress = (self._progress[0] + 1, phase, step)

    def alive(self) -> None:
        """Tells that this rank moves, and is where it was."""
        number, phase, step = self._progress
        self._progress = (number + 1, phase, step)

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop: the same on all ranks, which all ask, after each optimizer step."""
        if not self._stopping:
            number = int(distributed.max_over_ranks(torch.tensor(self._request.number)))
            self._stopping = number > 0
            if self._stopping and distributed.is_main():
                say(f"{signal.Signals(number).name}: this run saves and stops")
        return self._stopping

    def close(self) -> None:
        """Leaves the other ranks alone, at the end of a run that went well."""
        self._left = True
        self._end_threads()
        # As the first rank ends, the launcher signals the others: a run that stops does not give its signals back.
        if not self._stopping:
            self._request.close()

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks of the exception that ends this one, and who is to blame.

        Raises: SystemExit, after one line, in place of an exception that only follows from the end of another rank.
        """
        place, in_collective = _place(reversed(list(traceback.walk_tb(error.__traceback__))))
        summary = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
        if in_collective:
            _wait_for(lambda: any(map(self._is_gone, self._peers)), 1.0)  # which is a moment after its connections are
            self._exchange_now()  # a rank that is gone may have told why
            _wait_for(lambda: self._culprit() is not None, PEER_GRACE_SECONDS)
        culprit = self._culprit()
        if culprit is None:
            self._failure = (0, f"{summary}, at {place}")
            self._exchange_now()
            culprit = self._culprit()
            if culprit is None and self._rank == 0 and len(self._peers) > 1:
                time.sleep(self._exchange_seconds + POLL_SECONDS)  # with this rank goes the store: let the others read
            _, phase, step = self._progress
            error.add_note(f"rank {self._rank} failed in {phase} of step {step}, at {place}")
            if in_collective:
                error.add_note(self._report())
        self._end_threads()
        self._request.close()
        if culprit is not None and not isinstance(error, ValueError):  # distributed.run tells that to the user once
            say(f"error: rank {self._rank} stops ({summary}): {culprit}")
            raise SystemExit(EXIT_PEER_GONE) from error

    def _exchange_loop(self) -> None:
        """Tells the others where this rank is, and reads where they are."""
        while True:
            last = self._closed.is_set()
            if self._is_gone(self._peers[0]):  # and the store with it, of which torch would print a long warning
                self._store_lost = True
                return
            try:
                self._publish()
                values = self._store.multi_get([KEY.format(rank) for rank in range(len(self._peers))])
            except torch.distributed.DistNetworkError:
                self._store_lost = True
                return
            for peer, value in zip(self._peers, values, strict=True):
                if peer is not self._peers[self._rank]:
                    peer.tell(json.loads(value), self._clock)
            self._exchanged_at = self._clock
            self._exchanged.set()
            if last:
                return
            self._wake.wait(self._exchange_seconds)
            self._wake.clear()

    def _publish(self) -> None:
        if self._failure is not None and self._failure[0] == 0:
            self._failure = (self._store.add("supervision/failures", 1), self._failure[1])
        self._store.set(KEY.format(self._rank), json.dumps(self._told()))

    def _told(self) -> dict[str, Any]:
        main_thread = sys._current_frames()[threading.main_thread().ident or 0]
        return {
            "time": time.monotonic(),
            "progress": self._progress,
            "place": _place(traceback.walk_stack(main_thread)),
            "failure": self._failure,
            "left": self._left,
        }

    def _exchange_now(self) -> None:
        """Waits until the others can read what this rank has to tell, and this rank has read what they had told."""
        for _ in range(2):  # one under way may have begun before
            self._exchanged.clear()
            self._wake.set()
            _wait_for(lambda: self._exchanged.is_set() or self._store_lost, POLL_SECONDS)

    def _judge_loop(self) -> None:
        """Ends this process, from outside its main thread, where that cannot."""
        gone_at = orphan_at = None
        ticked_at = time.monotonic()
        while not self._closed.wait(POLL_SECONDS):
            # While this process is suspended its clock stands still: else it would blame the others when it goes on.
            now = time.monotonic()
            self._clock += min(now - ticked_at, 2 * POLL_SECONDS)
            ticked_at = now
            self._peers[self._rank].tell(self._told(), self._clock)
            if orphan_at is None and not all(launcher.is_alive() for launcher in self._launchers):
                orphan_at = self._clock
                self._request.number = self._request.number or signal.SIGTERM
                if distributed.local_rank() == 0:
                    say("the launcher is gone: this run saves at its next step and stops")
            if orphan_at is not None and self._clock - orphan_at > self._orphan_seconds:
                self._end(
                    EXIT_HUNG, f"no step has ended in the {self._orphan_seconds:.0f} s since the launcher is gone"
                )
            culprit = self._culprit()
            if culprit is not None:
                gone_at = self._clock if gone_at is None else gone_at
                if self._clock - gone_at >= PEER_GRACE_SECONDS:
                    self._end(EXIT_PEER_GONE, f"rank {self._rank} stops: {culprit}")
            elif self._clock - max(peer.moved_at for peer in self._peers) > self._watchdog_seconds:
                report = f"no rank has moved for {self._watchdog_seconds:.0f} s (run.timeout_minutes): {self._report()}"
                self._end(EXIT_HUNG, report, wait_seconds=self._exchange_seconds + POLL_SECONDS)

    def _culprit(self) -> str | None:
        """The rank that failed before this one or is gone, in words."""
        others = {rank: peer for rank, peer in enumerate(self._peers) if rank != self._rank}
        failures = [(*peer.told["failure"], rank) for rank, peer in others.items() if peer.told["failure"]]
        if failures:
            order, summary, rank = min(failures)
            if self._failure is None or order < self._failure[0]:
                return f"rank {rank} failed first, {summary}"
        if self._failure is not None:
            return None
        for rank, peer in others.items():
            if self._is_gone(peer):
                return f"rank {rank} (process {peer.process.pid} on {peer.host}) is gone"
        return None

    def _is_gone(self, peer: Peer) -> bool:
        dead = peer.machine == self._peers[self._rank].machine and not peer.process.is_alive()
        return (dead or (self._store_lost and peer is self._peers[0])) and not peer.told["left"]

    def _report(self) -> str:
        """The rank that is furthest behind, in words."""
        silent_before = self._clock - 3 * self._exchange_seconds

        def order(rank: int) -> tuple[Any, ...]:
            told = self._peers[rank].told
            return told["left"], self._peers[rank].told_at > silent_before, told["progress"][0], told["place"][1]

        behind = min(range(len(self._peers)), key=order)
        if self._exchanged_at < silent_before and self._rank != 0:
            behind = 0  # it keeps the store: as that does not answer, nothing new is known of the others
        peer = self._peers[behind]
        _, phase, step = peer.told["progress"]
        place, in_collective = peer.told["place"]
        details = ", waiting for other ranks" * in_collective
        details += ", and its process does not answer" * (peer.told_at < silent_before)
        return (
            f"furthest behind is rank {behind} (process {peer.process.pid} on {peer.host}): in {phase} of step {step} "
            f"for {self._clock - peer.moved_at:.0f} s, last seen at {place}{details}"
        )

    def _end_threads(self) -> None:
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(PEER_GRACE_SECONDS)  # not for ever: a store whose process is stopped does not answer

    def _end(self, code: int, sentence: str, wait_seconds: float = 0.0) -> NoReturn:
        faulthandler.dump_traceback()
        say(f"error: {sentence}")
        time.sleep(wait_seconds)  # the others' watchdogs run out a little later: let them show their stacks
        os._exit(code)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _place(frames: Iterable[tuple[FrameType, int]]) -> tuple[str, bool]:
    """The innermost line that is no library's, and whether it waits in torch.distributed; `frames` from the inside."""
    in_collective = False
    for frame, line in frames:
        module = frame.f_globals.get("__name__", "")
        in_collective |= module.startswith("torch.distributed")
        if not module.startswith(LIBRARIES):
            file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
            return f"{file}:{line} in {frame.f_code.co_name}", in_collective
    return "an unknown line", in_collective
