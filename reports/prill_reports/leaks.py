"""A leak report as one HTML page, with a curve for every series that moved."""

from __future__ import annotations

from prill_harness.leaks.reports.curves import curves
from prill_harness.leaks.reports.report import LeakReport, amount
from prill_reports.curves import drawn
from prill_reports.templating import page


def render(report: LeakReport) -> str:
    """The page of a report; it needs no network and no JavaScript."""
    return page(
        "leaks.html.jinja",
        report=report,
        mark=report.verdict.status,
        paths=[(path, [drawn(curve) for curve in curves(path)]) for path in report.paths],
        amount=amount,
    )
