"""Runs that are killed, stopped and damaged end as those that are not: short forms of `scripts.torture`."""

import re

import pytest

from tests.launching import alone, run_well


@pytest.mark.parametrize(
    ("options", "outcomes"),
    [
        (("--kills", "6", "--bit-flips", "60", "--disk-full", "3", "--resizes", "3"), 4 * 3),
        (("--stops", "3", "--rank-deaths", "3", "--zero-stage", "3", "--lora", "--precision", "bf16"), 2 * 3),
    ],
    ids=["ZeRO 2, all weights, fp32", "ZeRO 3, adapters, bf16"],
)
def test_whatever_happens_to_a_run_it_ends_as_if_nothing_had(options: tuple[str, ...], outcomes: int) -> None:
    """O1, O2, O3"""
    printed = run_well(alone("scripts.torture", *options), timeout_seconds=400)
    lines = [line for line in printed.splitlines() if "faults" in line]
    assert len(lines) == outcomes  # one for each harm to each of the stages that have a share in it
    for line in lines:
        found = re.search(r"(\d+) faults, (\d+) resumes from a checkpoint, (\d+) runs ended", line)
        assert found and int(found[1]) >= 1 and int(found[3]) >= 1, line
        difference = re.search(r"differs by (\S+),", line)
        assert "bitwise yes" in line or (difference and float(difference[1]) < 1e-4), line
