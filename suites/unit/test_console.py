"""Tables on a terminal: whatever they hold, they fit its width and lose nothing; pipes keep whole lines."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from prill_harness.console import Console, printable

SENTENCE = "blk.0.q_rope is the first wrong stage: NMSE 1.53 at positions 0-63, at most 1.8e-11 in lane exact"
COLUMNS = ("status", "check", "model", "engine", "sentence")
ROWS = [
    ("failed", "stages.early", "fixture:llama-tiny", "numpy+fault:rope_pairing", SENTENCE),
    ("passed", "tokens.golden_is_current", "fixture:llama-tiny:q4_k", "numpy", "all of it agrees"),
]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def drawn(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, stream: io.StringIO | None = None
) -> str:
    """What a terminal of so many columns shows of a table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setenv("TERM", "xterm")
        patch.setenv("NO_COLOR", "1")
        patch.setattr(sys, "stdout", stream := stream or Terminal())
        Console().table(columns, rows, status=0)
    return stream.getvalue()


def lines(text: str) -> list[str]:
    """The lines without what colours them."""
    return re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()


def plain(text: str) -> str:
    """All of it without blanks."""
    return "".join("".join(lines(text)).split())


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_of_checks_fits(width: int) -> None:
    """No line is longer than the terminal is wide, and no word of any cell is lost."""
    text = drawn(COLUMNS, ROWS, width)
    assert max(map(cell_len, lines(text))) <= width
    for cell in (cell for row in ROWS for cell in row):
        assert all(part in plain(text) for part in cell.split() if len(part) < 12), cell


def test_columns_stand_side_by_side_where_they_fit() -> None:
    """200 columns are enough for one line a row; 40 are not, and each cell then has its name beside it."""
    wide, narrow = drawn(COLUMNS, ROWS, 240), drawn(COLUMNS, ROWS, 40)
    assert sum(SENTENCE in line for line in lines(wide)) == 1
    assert narrow.count("check") >= len(ROWS)
    assert "sentence" in narrow


@settings(max_examples=60)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.lists(st.sampled_from(["", "a", "status", "95 % interval", "item"]), min_size=n, max_size=n),
            st.lists(st.lists(st.text(max_size=60), min_size=n, max_size=n), max_size=4),
        )
    ),
    st.sampled_from([40, 80]),
)
def test_any_table_fits(table: tuple[list[str], list[list[str]]], width: int) -> None:
    """Whatever the cells hold: no line is too long, and each character of each cell is shown."""
    columns, rows = table
    text = drawn(columns, rows, width)
    assert all(cell_len(line) <= width for line in lines(text))
    shown = plain(text)
    for cell in (cell for row in rows for cell in row):
        for character in "".join(printable(cell).split()):
            assert character in shown


def test_a_pipe_keeps_whole_lines() -> None:
    """COLUMNS speaks of terminals: a program that reads the table gets each row on one line."""
    text = drawn(COLUMNS, ROWS, 40, io.StringIO())
    assert [line for line in text.splitlines() if SENTENCE in line and "stages.early" in line]
    assert len(text.splitlines()) == 1 + len(ROWS)


@pytest.mark.parametrize(("width", "bars"), [(40, 0), (80, 36), (200, 40)])
def test_the_live_view_of_a_probe_fits(width: int, bars: int) -> None:
    """Its bars take what names and figures leave, whole; where that shows no slope, there are none."""
    from types import SimpleNamespace

    from rich.console import Console as RichConsole

    from prill_harness.leaks.judge.live import BARS, Live
    from prill_harness.leaks.probed.protocol import Call
    from prill_harness.leaks.reports.report import Probe

    terminal = Terminal()
    console = RichConsole(file=terminal, width=width)
    live, shown = Live(), []
    live._live = SimpleNamespace(console=console, update=shown.append)
    wanted = Probe("numpy", "fixture:llama-tiny", "success")
    for done in range(1, 51):
        values = {"process unattributed": 1_000_000 * done, "host bytes": 123_456_789 + 16 * done}
        live.watch(wanted, Call(done, 50, values))
    console.print(shown[-1])
    rows = lines(terminal.getvalue())
    assert all(cell_len(line) <= width for line in rows)
    assert max(sum(line.count(bar) for bar in BARS) for line in rows) == bars
