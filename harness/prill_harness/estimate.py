"""Ledgers of earlier runs and cells in; how long the cells will take, as far as that is known, out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from prill_harness import ledger
from prill_harness.evidence import Cell, CellEnded
from prill_runtime.errors import PrillError


@dataclass(frozen=True)
class Estimate:
    """Seconds of wall time for the cells of which something is known, and how many the others are."""

    seconds: float
    unknown: int

    def __str__(self) -> str:
        if not self.seconds:
            return "how long that takes was never recorded here"
        told = f"{self.seconds:.0f} s" if self.seconds < 100 else f"{self.seconds / 60:.0f} min"
        more = f", and {self.unknown} cells of which nothing is recorded" if self.unknown else ""
        return f"about {told} by what earlier runs took{more}"


def recorded(ledgers: Iterable[Path]) -> dict[Cell, float]:
    """Seconds of each cell that ended, by the first ledger that has it; what cannot be read is left out."""
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


def estimate(cells: Sequence[Cell], times: Mapping[Cell, float], jobs: int) -> Estimate:
    """A cell takes what it took; one that never ran, what its suite took on that engine with other models."""
    alike: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for cell, seconds in times.items():
        alike[_kind(cell)].append(seconds)
    known = [
        times.get(cell, fmean(alike[_kind(cell)])) for cell in cells if cell in times or _kind(cell) in alike
    ]
    # All cells side by side take no less than the longest of them.
    wall = max(sum(known) / max(1, min(jobs, len(cells))), max(known, default=0.0))
    return Estimate(wall, len(cells) - len(known))


def _kind(cell: Cell) -> tuple[str, str, str]:
    return cell.engine, cell.suite, cell.device
