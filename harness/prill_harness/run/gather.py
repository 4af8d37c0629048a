"""Put the ledgers of several cells or runs together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from prill_harness.engines.models import fixture_sha256
from prill_harness.plan.plan import Plan
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import CauseFound, Cell, CellStarted, Record
from prill_runtime.errors import LedgerError


def gather(paths: Iterable[Path], target: Path) -> tuple[Record, ...]:
    """Write the cells' ledgers as one file, atomically; its records."""
    records = tuple(r for path in paths if path.exists() for r in ledgers.read(path))
    partial = target.with_suffix(".partial")
    partial.write_bytes(ledgers.lines(records))
    partial.replace(target)
    return records


def _of_one_prill(cells: Mapping[Cell, tuple[Path, list[Record]]]) -> None:
    """Check that all ledgers come from one version of prill, with its committed fixtures.

    Raises:
        LedgerError: they do not.
    """
    first: tuple[Path, str] | None = None
    for cell, (path, records) in cells.items():
        for record in records:
            if not isinstance(record, CellStarted) or not record.versions:
                continue
            mine = path, record.versions.get("prill", "")
            first = first or mine
            if mine[1] != first[1]:
                raise LedgerError(
                    "the ledgers come from two versions of prill",
                    where=f"{first[0]} and {path}",
                    expected=first[1],
                    got=mine[1],
                    hint="run all shards with one",
                )
            digest, recorded = record.versions.get("model_sha256", ""), fixture_sha256(cell.model)
            if recorded and digest and digest != recorded:
                raise LedgerError(
                    "a cell ran on another file than the packaged fixture",
                    where=f"{path}, {cell.id}",
                    expected=f"sha256 {recorded[:16]}…",
                    got=f"{digest[:16]}…",
                )


def merge(paths: Sequence[Path], plan: Plan | None = None) -> tuple[Record, ...]:
    """One set of records from several ledgers; a ledger given twice counts once.

    The cause that a gate found in one of several is left out: it is looked for anew among all failures.

    Raises:
        LedgerError: two ledgers differ about one cell, or, with `plan`, a cell is missing or not planned.
    """
    cells: dict[Cell, tuple[Path, list[Record]]] = {}
    for path in paths:
        if not path.is_file():
            raise LedgerError("no such ledger", where=str(path))
        mine: dict[Cell, list[Record]] = {}
        for record in ledgers.audited(path):
            if len(paths) == 1 or not isinstance(record, CauseFound):
                mine.setdefault(record.cell, []).append(record)
        for cell, records in mine.items():
            first, known = cells.setdefault(cell, (path, records))
            if known != records:
                raise LedgerError("a cell was run twice", where=f"{first} and {path}", got=cell.id)
    _of_one_prill(cells)
    if plan is not None:
        missing = [cell.id for cell in plan.cells if cell not in cells]
        extra = sorted(cell.id for cell in cells.keys() - set(plan.cells))
        if missing or extra:
            what = "planned cells are missing" if missing else "cells are not in the plan"
            raise LedgerError(what, where=f"gate {plan.gate}", got=", ".join(missing or extra))
    return tuple(r for cell in sorted(cells) for r in cells[cell][1])
