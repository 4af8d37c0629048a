"""Markdown that says exactly the text it is given: no markup, no HTML, no mention gets out of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from prill_reports.text import one_line

LONGEST = 400  # characters of one sentence
# An underscore inside a word is not emphasis; a dash, plus, hash or equals sign matters only at the start.
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|^[-+#=]")
# What a forge would turn into a mention of a person or an issue: @name, owner/repo#2, #2, GH-2.
_LINKED = re.compile(r"@|#(?=\d)|\bGH-(?=\d)", re.IGNORECASE)


def text(value: str, longest: int = LONGEST) -> str:
    """Text shown literally: no markup, no HTML, no mention, on one line, safe in a table."""
    short = one_line(value)
    short = short if len(short) <= longest else f"{short[:longest]}…"
    short = short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _LINKED.sub("\\g<0>\u2060", _SPECIAL.sub(r"\\\g<0>", short))


def code(value: str, longest: int = LONGEST) -> str:
    """Text as a code span, safe in a table: the fence is longer than any run of backticks inside."""
    short = one_line(value)[:longest]
    if "\\|" in short:  # inside a code span this pipe cannot be escaped, and would end the cell
        return text(short)
    runs = [len(run) for run in re.findall("`+", short)]
    fence = "`" * (max(runs, default=0) + 1)
    pad = " " if runs or short != short.strip() or not short else ""
    return f"{fence}{pad}{short}{pad}{fence}".replace("|", r"\|")


def block(value: str) -> list[str]:
    """Text as a fenced block."""
    lines = [one_line(line) for line in value.split("\n")]
    fence = "`" * max(3, *(len(run) + 1 for line in lines for run in ["", *re.findall("`+", line)]))
    return [f"{fence}sh", *lines, fence]


def row(cells: Sequence[str]) -> str:
    """A row of a table; the cells are Markdown already."""
    return f"| {' | '.join(cells)} |"


def head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [row(columns), f"|{'---|' * len(columns)}"]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A whole table, and an empty line."""
    yield from head(columns)
    yield from map(row, rows)
    yield ""
