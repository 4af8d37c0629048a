"""Estimate how long cells will take, from the ledgers of earlier runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from prill_harness.numbers.compare import largest
from prill_harness.records import ledger
from prill_harness.records.evidence import Cell, CellEnded
from prill_runtime.errors import PrillError

TYPICAL = {
    "blocks": 0.2, "boundary": 9.0, "cache": 0.8, "contract": 13.0, "cost": 2.0, "errors": 0.2, "file": 0.6,
    "harness": 4.2, "memory": 14.8, "ops": 4.1, "options": 0.5, "process": 9.0, "properties": 2.0,
    "requests": 0.9, "sampler": 0.9, "stages": 0.4, "tokenizer": 0.5, "tokens": 3.2, "witness": 0.5,
}  # fmt: skip
"""Seconds of one cell of each suite, engine numpy on a packaged model, on two cores of 2026."""

BEFORE, ALIKE, PACKAGED, NEVER = "its last run", "its suite on other models", "a packaged model", "nothing"


@dataclass(frozen=True)
class Estimate:
    """Wall-clock seconds for the cells about which something is known, how many of these never ran here, and
    how many cells nothing is known about."""

    seconds: float
    unknown: int
    typical: int = 0

    def __str__(self) -> str:
        if not self.seconds:
            return "how long that takes was never recorded here"
        told = f"{self.seconds:.0f} s" if self.seconds < 100 else f"{self.seconds / 60:.0f} min"
        more = f", and {self.unknown} cells of which nothing is recorded" if self.unknown else ""
        whose = "what earlier runs took"
        if self.typical:
            whose = f"what {self.typical} of the cells take on a packaged model"
        return f"about {told} by {whose}{more}"


class Expected(NamedTuple):
    """Seconds of one cell, None where nobody knows, and what that is known by."""

    seconds: float | None
    by: str


def recorded(ledgers: Iterable[Path]) -> dict[Cell, float]:
    """Seconds of each finished cell, from the first ledger that has it; unreadable ledgers are skipped."""
    times: dict[Cell, float] = {}
    for path in ledgers:
        try:
            records = ledger.read(path) if path.is_file() else ()
        except (PrillError, OSError):
            continue
        for record in records:
            if isinstance(record, CellEnded):
                times.setdefault(record.cell, record.duration_s)
    return times


def recorded_in(out: Path) -> dict[Cell, float]:
    """Seconds of each cell that ended in an output folder, also in a run that was not gathered."""
    return recorded((out / "ledger.jsonl", *sorted((out / "cells").glob("*.jsonl"))))


def each(cells: Sequence[Cell], times: Mapping[Cell, float]) -> dict[Cell, Expected]:
    """A cell is expected to take what it took; if it never ran, what its suite took on that engine with other
    models, or what is typical of the suite."""
    alike: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for cell, seconds in times.items():
        alike[_kind(cell)].append(seconds)
    usual = {kind: fmean(several) for kind, several in alike.items()}

    def expected(cell: Cell) -> Expected:
        if cell in times:
            return Expected(times[cell], BEFORE)
        if _kind(cell) in usual:
            return Expected(usual[_kind(cell)], ALIKE)
        if cell.engine == "numpy" and cell.suite in TYPICAL:
            return Expected(TYPICAL[cell.suite], PACKAGED)
        return Expected(None, NEVER)

    return {cell: expected(cell) for cell in cells}


def estimate(cells: Sequence[Cell], times: Mapping[Cell, float], jobs: int) -> Estimate:
    """How long the cells take together."""
    found = each(cells, times).values()
    known = [one.seconds for one in found if one.seconds is not None]
    # In parallel, all cells take at least as long as the longest.
    wall = largest(0.0, sum(known) / max(1, min(jobs, len(cells))), *known)
    return Estimate(wall, len(cells) - len(known), sum(one.by == PACKAGED for one in found))


class Ahead:
    """How long a run still takes, as its cells end.

    Args:
        times: recorded seconds of cells; what is known by nothing counts for nothing, and makes it unknown.
    """

    def __init__(self, cells: Sequence[Cell], times: Mapping[Cell, float], jobs: int) -> None:
        self._expected = each(cells, times)
        self._jobs = max(1, min(jobs, len(cells)))
        known = [one.seconds for one in self._expected.values() if one.seconds is not None]
        self._sum, self._unknown = sum(known), len(self._expected) - len(known)

    def over(self, cell: Cell) -> None:
        """The cell has ended; a second time changes nothing."""
        one = self._expected.pop(cell, None)
        if one is not None:
            self._sum -= one.seconds or 0.0
            self._unknown -= one.seconds is None

    def lasts(self, cell: Cell) -> float | None:
        """The seconds that a cell which has not ended is expected to take."""
        return self._expected[cell].seconds if cell in self._expected else None

    @property
    def left(self) -> float | None:
        """Seconds, None while there are cells of which nobody knows."""
        return None if self._unknown else largest(0.0, self._sum) / self._jobs


def _kind(cell: Cell) -> tuple[str, str, str]:
    return cell.engine, cell.suite, cell.device
