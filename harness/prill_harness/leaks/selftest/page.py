"""Render an examination: its tables, and docs/LEAKS.md with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prill_harness.leaks.selftest.examination import Examination, Tried

Rows = list[Sequence[str]]
WORDS = {True: "holds", False: "**broken**", None: "not measured"}
MARK = "<!-- the tables below are written by `prill leak --selftest --docs docs/LEAKS.md` -->\n"


def tables(found: Examination) -> list[tuple[str, Rows]]:
    """(title, head and rows) of each table."""
    made = [("Cases", _cases(found.tried))]
    if found.psleak:
        made.append((f"Beside psleak {found.psleak[0].version}, same library, same run", _peer(found)))
    return made


def _cases(tried: Sequence[Tried]) -> Rows:
    rows: Rows = [("case", "path", "expected", "right", "calls", "median s", "function named")]
    for t in tried:
        expected = " or ".join(v.value for v in t.case.verdicts)
        expected += f" in {', '.join(t.case.ledgers)}" if t.case.ledgers else ""
        right = f"{t.right} of {t.runs}"
        rows.append((t.case.name, t.case.path, expected, right, str(t.calls), f"{t.seconds:.1f}", t.named))
    return rows


def _peer(found: Examination) -> Rows:
    rows: Rows = [("the library does", "prill right", "calls", "s", "psleak right", "calls", "s")]
    for c in found.psleak:
        late = f" ({c.psleak_late} without a verdict in time)" if c.psleak_late else ""
        rows.append(
            (c.name, f"{c.prill_right} of {c.runs}", str(c.prill_calls), f"{c.prill_s:.1f}",
             f"{c.psleak_right} of {c.runs}{late}", str(c.psleak_calls), f"{c.psleak_s:.1f}")
        )  # fmt: skip
    return rows


def render(found: Examination) -> str:
    """The page: the fixed part, then the measurements."""
    fixed = Path(__file__).with_name("guide.md").read_text("utf-8")
    claims: Rows = [("bar", "asked", "measured", "")]
    claims += [
        (
            bar.claim,
            bar.asked,
            bar.measured,
            {True: "holds", False: "**broken**", None: "not measured"}[bar.holds],
        )
        for bar in found.bars
    ]
    kind = "quick" if found.quick else "full"
    text = [
        fixed.rstrip(),
        "",
        MARK,
        f"## Figures of a {kind} examination, {found.seconds:.0f} s\n",
        _table(claims),
    ]
    for title, rows in tables(found):
        text += [f"\n### {title}\n", _table(rows)]
    return "\n".join(text) + "\n"


def _table(rows: Rows) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
