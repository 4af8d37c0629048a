"""What `gate` and `run` share: progress of cells, and the exit code of a set of records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from prill_harness.console import Progress, lasting
from prill_harness.plan.estimate import Ahead
from prill_harness.plan.plan import Plan
from prill_harness.records.evidence import (
    EXIT_CODES,
    CellEnded,
    CellStarted,
    Evidence,
    Record,
    Status,
    badness,
    checks,
)
from prill_harness.run.pool import Event

FAILURES = (Status.FAILED, Status.ERROR)
LONG_S = 10.0  # a cell that is expected to take longer is said when it begins


class Outcome(msgspec.Struct, frozen=True):
    """The outcome of a set of cells.

    Attributes:
        lost: each planned (cell id, check or "") that left no evidence.
        exit_code: of the worst status; 0 only when something passed and nothing else happened.
    """

    evidence: tuple[Evidence, ...]
    lost: tuple[tuple[str, str], ...]
    counts: dict[str, int]
    exit_code: int


def outcome(plan: Plan, records: Iterable[Record]) -> Outcome:
    """Count the evidence of the plan's cells, the worst of a check's attempts, and what is missing."""
    records = tuple(records)
    counted = checks(records)
    seen, reported = tuple(counted.values()), counted.keys()
    planned = {r.cell.id: r.planned for r in records if isinstance(r, CellStarted) and r.attempt == 1}
    ended = {r.cell.id for r in records if isinstance(r, CellEnded)}
    lost = [
        (c.id, check) for c in plan.cells for check in planned.get(c.id, ()) if (c.id, check) not in reported
    ]
    broken = {cell for cell, _ in lost} | {r.cell.id for r in seen if r.status is Status.ERROR}
    lost += [(c.id, "") for c in plan.cells if c.id not in ended and c.id not in broken]
    counts = Counter(r.status.value for r in seen)
    if lost:
        counts["missing"] = len(lost)
    worst = min(counts, key=badness, default="inconclusive")
    return Outcome(seen, tuple(lost), dict(sorted(counts.items())), EXIT_CODES[worst])


def teller(bar: Progress, ahead: Ahead | None = None) -> Callable[[Event], None]:
    """A progress callback that shows running cells, the results of finished ones, and what failed so far.

    Args:
        ahead: what is expected of the cells; a long one, and one that nobody knows, is said when it begins.
    """
    failed = dict.fromkeys(FAILURES, 0)

    def tell(event: Event) -> None:
        lasts = ahead.lasts(event.cell) if ahead else 0.0
        if event.kind == "started":
            about = "" if not lasts else f", about {lasting(lasts)}"
            bar.now(f"{event.cell.id} has begun{about}", aloud=lasts is None or lasts > LONG_S)
            return
        if ahead is not None:
            ahead.over(event.cell)
            bar.left = ahead.left
        counts = ", ".join(f"{n} {status}" for status, n in sorted(event.counts.items())) or "no evidence"
        kept = " (kept)" if event.kind == "resumed" else ""
        kept += f" (attempt {event.attempt})" if event.attempt > 1 else ""
        for status in failed:
            failed[status] += event.counts.get(status, 0)
        so_far = ", ".join(f"{n} {status}" for status, n in failed.items() if n)
        bar.at(event.done, f"{event.cell.id}: {counts}{kept}{f'; so far {so_far}' if so_far else ''}")

    return tell
