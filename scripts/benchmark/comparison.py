"""Rows that set a number of this project beside a peer's, and the table that they make."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Row:
    """One quantity, computed by both sides from the same input.

    quantity, ours, theirs: what is compared, and where each side computes it. measure: from the group's input to (ours,
    theirs), where the two should agree; or to (ours, theirs, corrected), where they should not. because: for a row that
    should not agree, what the peer does otherwise; `corrected` is our number with just that changed, and must equal
    theirs.
    """

    quantity: str
    ours: str
    theirs: str
    measure: Callable[[Any], tuple[Any, ...]]
    because: str = ""


@dataclass(frozen=True)
class Group:
    """Rows that share an input.

    title: with the peer and its version. prepare: makes the input.
    """

    title: str
    prepare: Callable[[], Any]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Result:
    """What a row measured. corrected: the difference that is left after the correction; None in a row without one."""

    row: Row
    difference: float
    corrected: float | None

    @property
    def as_expected(self) -> bool:
        """Both agree; or they differ, as the row says, and its correction accounts for all of the difference."""
        if self.corrected is None:
            return self.difference <= TOLERANCE
        return self.difference > TOLERANCE >= self.corrected

    def __str__(self) -> str:
        numbers, verdict = f"{self.difference:.0e}", "agrees"
        if self.corrected is not None:
            numbers, verdict = f"{self.difference:.0e}, corrected {self.corrected:.0e}", f"differs: {self.row.because}"
        if not self.as_expected:
            verdict = f"**NOT AS EXPECTED** ({verdict})"
        return f"| {self.row.quantity} | {self.row.ours} | {self.row.theirs} | {numbers} | {verdict} |"


HEADER = "| quantity | ours | theirs | largest relative difference | verdict |\n|---|---|---|---|---|"


def largest_difference(ours: Any, theirs: Any) -> float:
    """max |ours - theirs| / max |theirs|; infinite where shapes differ or a number is not finite.

    Args:
        ours, theirs: tensors or numbers of one shape; or dictionaries of them with the same keys.
    """
    if isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return math.inf
        ours, theirs = (torch.cat([torch.as_tensor(d[k]).flatten() for k in sorted(theirs)]) for d in (ours, theirs))
    ours, theirs = (torch.as_tensor(side).detach().double() for side in (ours, theirs))
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return math.inf
    difference, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    return difference / scale if scale > 0 else difference


def measured(group: Group) -> Iterable[Result]:
    """Prepare the input of a group and measure its rows."""
    prepared = group.prepare()
    for row in group.rows:
        ours, theirs, *corrected = row.measure(prepared)
        assert bool(corrected) == bool(row.because), row.quantity
        yield Result(
            row,
            largest_difference(ours, theirs),
            largest_difference(corrected[0], theirs) if corrected else None,
        )
