"""Run a plan's cells and keep their ledgers in a folder from which a run can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prill_harness.plan import beside, provenance
from prill_harness.plan.plan import Plan
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Cell, CellEnded, CellStarted, Evidence, Record, Status
from prill_harness.run import gather, pool
from prill_harness.run.leases import Gpus, visible, wanted
from prill_harness.run.pool import TIMEOUT_S, CellAttempt, Event
from prill_runtime.errors import PrillError

LEAST_S, TIMES = 120.0, 20.0


def ledger_path(out: Path, cell: Cell, attempt: int = 1) -> Path:
    """Path of a cell's ledger: a readable name and a digest, so that no two cells share one; each attempt has
    its own."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", cell.id)[-80:].strip("-.")
    name = f"{readable}-{hashlib.sha256(cell.id.encode()).hexdigest()[:8]}"
    return out / "cells" / f"{name}{f'.attempt-{attempt}' * (attempt > 1)}.jsonl"


def run(
    plan: Plan,
    out: Path,
    jobs: int = 0,
    resume: bool = False,
    progress: Callable[[Event], None] = lambda event: None,
    *,
    timeout_s: float | None = None,
    rerun: int = 0,
) -> tuple[Record, ...]:
    """Run the cells, each in a fresh process; write out/cells/*.jsonl and out/ledger.jsonl; the records.

    Args:
        jobs: processes at a time; 0: one per core.
        resume: keep cells whose final record stands and whose code and model are unchanged.
        timeout_s: per cell; the check then in flight becomes an error. None: TIMES times what the cell took
            in this folder before, LEAST_S at least; TIMEOUT_S where it never ran.
        rerun: so many times at most, what failed is run again until it does not fail; every attempt stays.

    Raises:
        KeyboardInterrupt: the ledgers written so far are kept, the processes ended.
    """
    first = [CellAttempt(cell, plan.spec(cell), ledger_path(out, cell), plan.checks) for cell in plan.cells]
    (out / "cells").mkdir(parents=True, exist_ok=True)
    kept = [job for job in first if resume and resumable(job.ledger, job.cell, plan)]
    over = {job.cell for job in kept}
    todo = [job for job in first if job.cell not in over]
    took = {job.cell: _took(job.ledger) for job in first}
    for job in todo:  # leftovers of an earlier run must not pass for this one
        for path in (job.ledger, *_again(out, job.cell)):
            path.unlink(missing_ok=True)
    done = 0

    def tell(kind: str, job: CellAttempt) -> None:
        nonlocal done
        done += kind != "started" and job.attempt == 1
        over = kind != "started" and job.ledger.exists()
        records = ledgers.read(job.ledger) if over else ()
        counts = Counter(r.status.value for r in records if isinstance(r, Evidence))
        progress(Event(kind, job.cell, done, len(plan.cells), dict(counts), job.attempt))

    # Nobody is asked for GPUs where no cell needs one.
    gpus = Gpus(visible() if any(wanted(job.cell) is not None for job in todo) else (), plan.cells_per_gpu)

    def carry_out(several: Sequence[CellAttempt]) -> None:
        pool.run(
            several,
            jobs=jobs or os.cpu_count() or 2,
            folder=plan.folder,
            timeout_s={cell: timeout_s or patience(took[cell]) for cell in took},
            started=lambda job: tell("started", job),
            ended=lambda job: tell("ended", job),
            gpus=gpus,
        )

    for job in kept:
        tell("resumed", job)
    try:
        carry_out(todo)
        for attempt in range(2, rerun + 2):
            again = (_next(out, plan, cell, attempt) for cell in plan.cells)
            carry_out([job for job in again if job is not None])
    finally:
        paths = (path for job in first for path in (job.ledger, *_again(out, job.cell)))
        records = gather.gather(paths, out / "ledger.jsonl")
    return records


def _again(out: Path, cell: Cell) -> Iterator[Path]:
    """The ledgers of a cell's further attempts, in order."""
    for attempt in itertools.count(2):
        path = ledger_path(out, cell, attempt)
        if not path.exists():
            return
        yield path


def _next(out: Path, plan: Plan, cell: Cell, attempt: int) -> CellAttempt | None:
    """The job that runs again what failed in the attempt before; None where nothing did, or it was run."""
    before, path = ledger_path(out, cell, attempt - 1), ledger_path(out, cell, attempt)
    records = ledgers.read(before) if before.exists() else ()
    failed = [r.check for r in records if isinstance(r, Evidence) and r.status is Status.FAILED]
    over = path.exists() and any(isinstance(r, CellEnded) for r in ledgers.read(path))
    return None if over or not failed else CellAttempt(cell, plan.spec(cell), path, failed, attempt)


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
    suite = beside.suite_file(cell.suite, plan.folder)
    today = provenance.describe(plan.spec(cell), suite, plan.checks, cell.engine)
    return starts[0].versions == today
