"""A probe comes in; the report of the first run that could tell goes out, or that of the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from prill_harness.leaks.reports.report import LeakVerdict, PathReport

P = TypeVar("P")
RUNS = 3


def settled(run: Callable[[P], PathReport], wanted: P, runs: int = RUNS) -> PathReport:
    """Run a probe anew, in a fresh process, while noise keeps it from telling; a leak is not asked again."""
    report = run(wanted)
    for _ in range(runs - 1):
        if report.verdict is not LeakVerdict.INCONCLUSIVE:
            break
        report = run(wanted)
    return report
