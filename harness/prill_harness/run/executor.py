"""Run a plan's cells and keep their ledgers in a folder from which a run can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from prill_harness.plan import beside, provenance
from prill_harness.plan.plan import Plan
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Cell, CellEnded, CellStarted, Evidence, Record, Status
from prill_harness.run import gather, pool
from prill_harness.run.leases import Gpus, visible, wanted
from prill_harness.run.pool import TIMEOUT_S, Event
from prill_runtime.errors import PrillError

LEAST_S, TIMES = 120.0, 20.0


def ledger_path(out: Path, cell: Cell) -> Path:
    """Path of a cell's ledger: a readable name and a digest, so that no two cells share one."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", cell.id)[-80:].strip("-.")
    return out / "cells" / f"{readable}-{hashlib.sha256(cell.id.encode()).hexdigest()[:8]}.jsonl"


def run(
    plan: Plan,
    out: Path,
    jobs: int = 0,
    resume: bool = False,
    progress: Callable[[Event], None] = lambda event: None,
    *,
    timeout_s: float | None = None,
) -> tuple[Record, ...]:
    """Run the cells, each in a fresh process; write out/cells/*.jsonl and out/ledger.jsonl; the records.

    Args:
        jobs: processes at a time; 0: one per core.
        resume: keep cells whose final record stands and whose code and model are unchanged.
        timeout_s: per cell; the check then in flight becomes an error. None: TIMES times what the cell took
            in this folder before, LEAST_S at least; TIMEOUT_S where it never ran.

    Raises:
        KeyboardInterrupt: the ledgers written so far are kept, the processes ended.
    """
    jobs = jobs or os.cpu_count() or 2
    paths = {cell: ledger_path(out, cell) for cell in plan.cells}
    (out / "cells").mkdir(parents=True, exist_ok=True)
    kept = {cell: None for cell in plan.cells if resume and resumable(paths[cell], cell, plan)}
    todo = [(cell, plan.spec(cell), paths[cell]) for cell in plan.cells if cell not in kept]
    took = {cell: _took(path) for cell, _, path in todo}
    for *_, path in todo:  # leftovers of an earlier run must not pass for this one
        path.unlink(missing_ok=True)
    done = 0

    def tell(kind: str, cell: Cell) -> None:
        nonlocal done
        done += kind != "started"
        over = kind != "started" and paths[cell].exists()
        records = ledgers.read(paths[cell]) if over else ()
        counts = Counter(r.status.value for r in records if isinstance(r, Evidence))
        progress(Event(kind, cell, done, len(plan.cells), dict(counts)))

    for cell in kept:
        tell("resumed", cell)
    try:
        pool.run(
            todo,
            jobs=jobs,
            folder=plan.folder,
            checks=plan.checks,
            timeout_s={cell: timeout_s or patience(took[cell]) for cell in took},
            started=lambda cell: tell("started", cell),
            ended=lambda cell: tell("ended", cell),
            gpus=_gpus(plan, [cell for cell, *_ in todo]),
        )
    finally:
        records = gather.gather(paths.values(), out / "ledger.jsonl")
    return records


def _gpus(plan: Plan, todo: Sequence[Cell]) -> Gpus:
    """The GPUs that the cells take turns on; nobody is asked for any where no cell needs one."""
    return Gpus(visible() if any(wanted(cell) is not None for cell in todo) else (), plan.cells_per_gpu)


def patience(took_s: float | None) -> float:
    """The time limit of a cell that took so many seconds before, or (None) that never ran."""
    return TIMEOUT_S if took_s is None else max(LEAST_S, TIMES * took_s)


def _took(ledger: Path) -> float | None:
    """Seconds that a cell took by its ledger."""
    with contextlib.suppress(PrillError, OSError):
        return next((r.duration_s for r in ledgers.read(ledger) if isinstance(r, CellEnded)), None)
    return None


def resumable(path: Path, cell: Cell, plan: Plan) -> bool:
    """Whether the ledger has a final record, evidence of every planned check, and the current versions."""
    if not path.exists():
        return False
    try:
        records = ledgers.audited(path)
    except PrillError:
        return False
    starts = [r for r in records if isinstance(r, CellStarted)]
    ends = [r for r in records if isinstance(r, CellEnded)]
    if len(starts) != 1 or len(ends) != 1 or any(r.cell != cell for r in records):
        return False
    if any(isinstance(r, Evidence) and r.status is Status.ERROR for r in records):
        return False  # what was interrupted may succeed now
    reported = {r.check for r in records if isinstance(r, Evidence)}
    if not starts[0].planned or set(starts[0].planned) != reported:
        return False
    today = provenance.describe(plan.spec(cell), beside.suite_file(cell.suite, plan.folder), plan.checks)
    return starts[0].versions == today
