"""Runs stages one after the other in one process: `python -m tests.run_stages MODULE CONFIG [MODULE CONFIG ...]`."""

import importlib
import sys

from training import distributed


def main() -> None:
    arguments = sys.argv[1:]
    distributed.start(timeout_minutes=2)
    # The port of a launcher serves one process group, so the stages share it.
    distributed.stop, stop = distributed.barrier, distributed.stop
    for module, config in zip(arguments[::2], arguments[1::2], strict=True):
        sys.argv = [module, "--config", config]
        importlib.import_module(module).main()
    stop()


if __name__ == "__main__":
    main()
