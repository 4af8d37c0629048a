"""A verdict as one HTML file that needs no network, and no JavaScript but for its search."""

from __future__ import annotations

from collections.abc import Mapping

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import ItemStatus, Verdict
from prill_reports import stages, view
from prill_reports.curves import SMALL, WHOLE
from prill_reports.templating import page
from prill_reports.text import bound, figure

FILE = "report.html"
FIGURES = 400  # rows of the table of figures, closest to their bounds (or beyond) first


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """The page of a verdict: what broke and why, stages, findings, waivers, item x cell matrix; what passed
    is folded."""
    figures = view.figures(verdict)
    rows = [(item, view.matrix_row(item, verdict)) for item in view.items(verdict)]
    return page(
        "report.html.jinja",
        verdict=verdict,
        broken=[rule for rule in verdict.rules if rule.status is not Status.PASSED],
        columns=view.groups(verdict),
        walk=stages.drawn(verdict.lead.stages) if verdict.lead else None,
        open_items=[row for row in rows if row[0].status is not ItemStatus.PROVEN],
        proven=[row for row in rows if row[0].status is ItemStatus.PROVEN],
        counts={status: sum(i.status is status for i in verdict.items) for status in ItemStatus},
        checks=[
            (r, view.severity(r, verdict), view.kept(r), view.pictures(r, WHOLE))
            for r in view.open_checks(verdict)
        ],
        quiet=[(r, found) for r in view.quiet_checks(verdict) if (found := view.pictures(r, SMALL))],
        lacking=view.lacking_checks(verdict),
        figures=figures[:FIGURES],
        hidden=len(figures) - len(figures[:FIGURES]),
        cells=sorted(verdict.cells, key=lambda c: (c.status == "complete", c.cell)),
        unfinished=sum(cell.status != "complete" for cell in verdict.cells),
        incidents=view.unsolved(verdict),
        waivers=view.waivers(verdict),
        told=view.standing,
        group=view.group,
        figure=figure,
        bound=bound,
    )
