"""How a run is asked to stop: by a signal to one of its ranks, or by the end of its launcher. Linux only.

What a signal to anything else does depends on the launcher:

- `deepspeed` on one machine dies of SIGTERM and SIGUSR1 and tells nobody: `launch.py` and the ranks go on. A rank looks
  for its launchers every second and takes the end of one for SIGTERM; `launch.py` then ends with the ranks' code.
- Ctrl-C, or a signal to the whole process group, also reaches `launch.py`. It sends SIGTERM to its first rank, kills it
  after 30 s, turns to the next one, and ends with code 1. Signals that come together therefore count as one.
- `torchrun` passes SIGTERM and SIGINT on to its ranks, kills them after 30 s, and ends with code 1.
- SIGUSR1, as Slurm's `--signal=USR1@120` sends it, ends every launcher that it reaches. A batch script that catches it
  (`--signal=B:USR1@120`) should pass it on to a rank.

So a run whose step takes longer than 30 s is best stopped by a signal to one of its ranks, or to `deepspeed` alone.
"""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 5.0
LAUNCHERS = {"deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}
LAUNCHERS |= {"torchrun", "torch.distributed.run", "torch.distributed.launch"}


class StopRequest:
    """Whether this process was asked to stop, by the signal `number` (0: it was not).

    A second SIGTERM or SIGINT, more than SAME_REQUEST_SECONDS after the first, ends the process at once. Python calls a
    handler when the main thread is back from C, where a rank that waits for the others can stay for ever. So a thread
    reads the numbers that the interpreter writes into a socket as the signals come.
    """

    def __init__(self) -> None:
        self.number = 0
        self._first_at: float | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _leave_to_thread) for number in STOP_SIGNALS}
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._writer.close()

    def _listen(self) -> None:
        while numbers := self._reader.recv(64):
            for number in filter(STOP_SIGNALS.__contains__, numbers):
                self.number = self.number or number
                if number == signal.SIGUSR1:
                    continue
                if self._first_at is None:
                    self._first_at = time.monotonic()
                elif time.monotonic() - self._first_at > SAME_REQUEST_SECONDS:
                    say(f"error: a second {signal.Signals(number).name} ends process {os.getpid()} before it has saved")
                    os._exit(128 + number)
        self._reader.close()


class Process(NamedTuple):
    """A process of this machine; the time of its start tells it from a later one with the same pid."""

    pid: int
    started: str

    def is_alive(self) -> bool:
        state, _, started = _status(self.pid)
        return started == self.started and state not in "ZX"


def this_process() -> Process:
    return Process(os.getpid(), _status(os.getpid())[2])


def launchers() -> list[Process]:
    """The processes that this rank was started by, from its parent up, as far as they are launchers."""
    found = []
    pid = os.getppid()
    while LAUNCHERS & {Path(word).name for word in _command(pid)[:4]}:
        _, parent, started = _status(pid)
        found.append(Process(pid, started))
        pid = parent
    return found


def machine() -> str:
    """Equal on two ranks if each can look up the other's pid."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8") + os.readlink("/proc/self/ns/pid")


def say(sentence: str) -> None:
    """One line on the console, in one piece among those of other ranks."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    pass


def _forget_signals() -> None:
    """Lets a process that a reward function forks die of a signal, which it would else pass on to this rank."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _leave_to_thread:
            signal.set_wakeup_fd(-1)
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_signals)


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def _status(pid: int) -> tuple[str, int, str]:
    """State, parent and time of start of a process, as in proc(5); state X if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "X", 0, ""
    return fields[0], int(fields[1]), fields[19]
