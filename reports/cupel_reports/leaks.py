"""A leak report goes in; one HTML page with a curve for every series that moved comes out."""

from __future__ import annotations

from dataclasses import dataclass

import jinja2

from cupel_harness.leaks.report import Judged, PathReport, Report, Verdict, amount
from cupel_reports.text import one_line

WIDTH, HEIGHT = 720, 180
LEFT, TOP, RIGHT, BOTTOM = 64, 10, 8, 22  # room for the axes' figures
MARKS = {"leak": "failed", "broken": "failed", "clean": "passed", "inconclusive": "inconclusive"}


@dataclass(frozen=True)
class Curve:
    """Readings as the points of a polyline, and the Theil-Sen line with its interval as shapes beside it."""

    judged: Judged
    points: str
    line: tuple[float, float, float, float]
    band: str
    borders: tuple[float, ...]
    top: str
    bottom: str
    first: int
    last: int


def render(report: Report) -> str:
    """The page of a report; it needs no network and no JavaScript."""
    loader = jinja2.PackageLoader("cupel_reports", "templates")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: one_line(v) if isinstance(v, str) and not hasattr(v, "__html__") else v,
    )
    return environment.get_template("leaks.html.jinja").render(
        report=report,
        mark=MARKS[report.verdict.value],
        marks=MARKS,
        paths=[(path, curves(path)) for path in report.paths],
        amount=amount,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        top=TOP,
        floor=HEIGHT - BOTTOM,
        right=WIDTH - RIGHT,
    )


def curves(path: PathReport) -> list[Curve]:
    """Curves of the series that moved or did not come out clean, the worst first."""
    order = list(Verdict)
    shown = [j for j in path.seen if j.values and (j.verdict is not Verdict.CLEAN or len(set(j.values)) > 1)]
    return [curve(j, path.first) for j in sorted(shown, key=lambda j: order.index(j.verdict))]


def curve(judged: Judged, first: int) -> Curve:
    """One series, its first reading drawn as 0."""
    moved = [value - judged.values[0] for value in judged.values]
    n = len(moved) - 1
    middle = sorted(moved[i] - judged.slope * i for i in range(n + 1))[n // 2]
    ends = [middle + slope * n for slope in (judged.slope, judged.low, judged.high)]
    low, high = min(*moved, middle, *ends), max(*moved, middle, *ends)
    span = (high - low) or 1

    def x(call: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * call / max(n, 1), 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / span, 1)

    band = f"{x(0)},{y(middle)} {x(n)},{y(ends[1])} {x(n)},{y(ends[2])}"
    return Curve(
        judged=judged,
        points=" ".join(f"{x(i)},{y(value)}" for i, value in enumerate(moved)),
        line=(x(0), y(middle), x(n), y(ends[0])),
        band=band,
        borders=tuple(x(n * k / judged.of) for k in range(1, judged.of)) if judged.of else (),
        top=_signed(high, judged.unit),
        bottom=_signed(low, judged.unit),
        first=first,
        last=first + n - 1,
    )


def _signed(value: float, unit: str) -> str:
    return ("+" if value > 0 else "") + amount(value, unit)
