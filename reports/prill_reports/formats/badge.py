"""A verdict as an SVG badge, for a page that shows pictures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import Verdict
from prill_reports.formats import shields

COLOUR = {Status.PASSED: "#2da44e", Status.FAILED: "#cf222e", Status.INCONCLUSIVE: "#bc4c00"}
WIDTH, PADDING = 6.6, 10  # pixels of a character in 11 px sans-serif, and around a text
HEIGHT = 20
TEXT = '<text x="{x}" y="14" textLength="{length}">{said}</text>'
BADGE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img" aria-label="{title}">
<title>{title}</title>
<rect width="{left}" height="{height}" fill="#444"/>
<rect x="{left}" width="{right}" height="{height}" fill="{colour}"/>
<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
{label}
{message}
</g>
</svg>
"""


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """Gate on the left; status, and the rule that broke or the number of checks, on the right."""
    label, message = shields.words(verdict)
    left, right = _width(label), _width(message)
    return BADGE.format(
        width=left + right,
        height=HEIGHT,
        left=left,
        right=right,
        colour=COLOUR.get(verdict.status, COLOUR[Status.FAILED]),
        title=escape(f"{label}: {message}"),
        label=_text(label, left / 2),
        message=_text(message, left + right / 2),
    )


def _width(said: str) -> int:
    return round(len(said) * WIDTH) + PADDING


def _text(said: str, middle: float) -> str:
    return TEXT.format(x=f"{middle:g}", length=_width(said) - PADDING, said=escape(said))
