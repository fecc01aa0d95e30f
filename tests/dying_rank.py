"""A run whose rank 1 comes to an end while rank 0 waits for it: `python -m tests.dying_rank raises|is_killed`."""

import os
import signal
import sys

import torch

from training import distributed


def main() -> None:
    distributed.start(timeout_minutes=30)
    if distributed.rank() == 1:
        if sys.argv[1] == "raises":
            raise RuntimeError("rank 1 has met something")
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.sum_over_ranks(torch.ones(1))


if __name__ == "__main__":
    distributed.run(main)
