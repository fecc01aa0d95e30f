"""Memory of a run on a CPU."""

import ctypes
import os
import subprocess
import sys

import pytest

from tests.launching import ROOT, environment

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"

# Page faults: each is a page of memory that the system gives.
PROGRAM = """
import resource, sys, torch
from training.cpu_memory import reuse_memory
if sys.argv[1] == "reuses":
    reuse_memory()
def faults():
    torch.ones(2**26)  # 256 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):  # glibc leaves some gaps before it comes back to the same place
    before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.parametrize("how", ["reuses", "by itself"])
def test_large_tensors_are_made_of_memory_that_was_freed(how: str) -> None:
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    ).stdout
    pages_of_one = 2**28 // os.sysconf("SC_PAGE_SIZE")
    # By itself it would be new memory each time; were it not, this test would show nothing.
    assert int(printed) < pages_of_one / 100 if how == "reuses" else int(printed) >= pages_of_one


@pytest.mark.parametrize(("told", "kept"), [({}, "128"), ({CAPACITY: "7"}, "7")])
def test_few_compiled_products_are_kept_unless_told_otherwise(told: dict[str, str], kept: str) -> None:
    program = f"import os; from training import distributed; distributed.start(1); print(os.environ[{CAPACITY!r}])"
    untold = {name: value for name, value in environment().items() if name != CAPACITY}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, cwd=ROOT, env=untold | told, capture_output=True, text=True, check=True).stdout
    assert printed.split()[-1] == kept
