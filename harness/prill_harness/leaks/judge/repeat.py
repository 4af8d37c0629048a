"""Repeat a probe until a run is conclusive."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from prill_harness.leaks.reports.report import LeakVerdict, PathReport

P = TypeVar("P")
RUNS = 3


def settled(run: Callable[[P], PathReport], wanted: P, runs: int = RUNS) -> PathReport:
    """Run a probe in fresh processes until it is conclusive, at most `runs` times; a leak is final."""
    report = run(wanted)
    for _ in range(runs - 1):
        if report.verdict is not LeakVerdict.INCONCLUSIVE:
            break
        report = run(wanted)
    return report
