"""A path that leaks in; the same path again under memray with native traces, and who allocated what stayed, out."""

from __future__ import annotations

from cupel_harness.leaks.report import PathReport, Probe


def located(wanted: Probe, report: PathReport) -> PathReport:
    return report
