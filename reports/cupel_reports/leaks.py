"""A leak report goes in; one HTML page with a curve for every series that moved comes out."""

from __future__ import annotations

from cupel_harness.leaks.curves import curves
from cupel_harness.leaks.report import Report, amount
from cupel_reports.curves import MARKS, drawn
from cupel_reports.templating import page


def render(report: Report) -> str:
    """The page of a report; it needs no network and no JavaScript."""
    return page(
        "leaks.html.jinja",
        report=report,
        mark=MARKS[report.verdict.value],
        marks=MARKS,
        paths=[(path, [drawn(curve) for curve in curves(path)]) for path in report.paths],
        amount=amount,
    )
