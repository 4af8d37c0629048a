"""Output of commands: coloured on a terminal, plain lines in a pipe, pure JSON with --json."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import msgspec

from prill_harness.records.evidence import builtin
from prill_harness.version import version
from prill_runtime.errors import OutputError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.table import Table as RichTable

COLOURS = {
    "passed": "green",
    "proven": "green",
    "ok": "green",
    "failed": "red",
    "error": "red",
    "broken": "red",
    "inconclusive": "yellow",
    "unproven": "yellow",
    "waived": "yellow",
    "missing": "yellow",
}
SCHEMA = 1
"""Version of what --json prints; another one when a key goes or means something else."""
LEAST_TEXT = 24  # fewest columns in which a sentence can still be read
COLUMN_GAP = 2  # blanks between two columns
# Control characters, marks that reverse or hide text, line separators, lone surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def printable(text: object) -> str:
    """One line of text that cannot move the cursor: control characters become escapes."""
    return _CONTROL.sub(lambda m: m.group().encode("unicode_escape").decode("ascii"), str(text))


def _harmless(line: str) -> str:
    """A line of JSON with every raw control character written as \\u, which JSON reads back."""
    return _CONTROL.sub(lambda m: f"\\u{ord(m.group()):04x}", line)


def write(stream: TextIO, text: str) -> None:
    """Write and flush; once nobody reads the pipe any more, further output is dropped silently.

    Raises:
        OutputError: it cannot be written, for example to a full disk.
    """
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        nowhere(stream)
    except OSError as error:
        nowhere(stream)  # flushing the rest of its buffer at exit would fail again
        name = {1: "standard output", 2: "standard error"}.get(stream.fileno(), "the output")
        raise OutputError("cannot write", where=name, got=error.strerror) from None


def nowhere(stream: TextIO) -> None:
    """Discard whatever is still written to a stream."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


class Console:
    """A command's output: results on stdout, progress and remarks on stderr.

    Args:
        json: print one JSON document on stdout and nothing else; `line` and `table` print nothing.
        command: words of the command, `golden compare`, which the document names.
    """

    def __init__(self, *, json: bool = False, command: str = "", quiet: bool = False) -> None:
        self.json = json
        self.command = command
        self.quiet = quiet

    def line(self, text: str = "", *, status: str = "") -> None:
        """Print one line of the result, coloured by status on a terminal."""
        if not self.json:
            self._say(sys.stdout, printable(text), COLOURS.get(status))

    def remark(self, text: str, *, status: str = "") -> None:
        """Print a line that is not part of the result, to stderr."""
        self._say(sys.stderr, printable(text), COLOURS.get(status))

    def emit(self, value: object) -> None:
        """Print the result for machines, one indented JSON document; only under --json.

        The result is `data`, beside the version of prill, the command, and the schema of the whole, which
        docs/schemas publishes.
        """
        if self.json:
            schema = f"{self.command.replace(' ', '-')}/{SCHEMA}"
            document = {"prill": version(), "schema": schema, "command": self.command, "data": value}
            try:
                encoded = msgspec.json.encode(document)
            except UnicodeEncodeError:  # a file name that is not UTF-8
                encoded = msgspec.json.encode(builtin(msgspec.to_builtins(document)))
            text = msgspec.json.format(encoded, indent=2).decode("utf-8")
            write(sys.stdout, "\n".join(map(_harmless, text.split("\n"))) + "\n")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, status: int = -1) -> None:
        """Print rows under column heads; `status` is the index of the column that gives a row its colour.

        If a terminal is too narrow, a row's cells are printed below one another. A pipe gets whole lines.
        """
        if self.json:
            return
        cells = [[printable(value) for value in row] for row in rows]
        if sys.stdout.isatty():
            self._rich_table(columns, cells, status)
            return
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for row in [list(columns), *cells]:
            padded = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            write(sys.stdout, padded.rstrip() + "\n")

    def progress(self, total: int, what: str) -> Progress:
        """A context manager whose `step` reports each finished part on stderr."""
        return Progress(total, what, quiet=self.quiet)

    def _say(self, stream: TextIO, text: str, colour: str | None) -> None:
        if colour and stream.isatty() and "NO_COLOR" not in os.environ:
            from rich.console import Console as RichConsole
            from rich.text import Text

            RichConsole(file=stream, soft_wrap=True).print(Text(text, style=colour))
        else:
            write(stream, text + "\n")

    def _rich_table(self, columns: Sequence[str], cells: list[list[str]], status: int) -> None:
        from rich.console import Console as RichConsole

        console = RichConsole(file=sys.stdout)
        colours = [COLOURS.get(row[status], "") if status >= 0 else "" for row in cells]
        wide = _widest_that_fits(columns, cells, console.width)
        if wide is None:
            for row, colour in zip(cells, colours, strict=True):
                console.print(_stacked(columns, row, status, colour, console.width))
        else:
            console.print(_side_by_side(columns, cells, status, colours, wide))


def _widest_that_fits(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> int | None:
    """The column to wrap so that all columns fit side by side; None if they do not."""
    from rich.cells import cell_len

    heads = [max(map(cell_len, name.split()), default=0) for name in columns]
    needs = [max([heads[at], *(cell_len(row[at]) for row in cells)]) for at in range(len(columns))]
    widest = max(range(len(columns)), key=lambda at: needs[at])
    least = max(heads[widest], min(needs[widest], LEAST_TEXT))
    taken = sum(needs) - needs[widest] + least + COLUMN_GAP * len(columns)
    return widest if taken <= width else None


def _side_by_side(
    columns: Sequence[str], cells: Sequence[Sequence[str]], status: int, colours: Sequence[str], wide: int
) -> RichTable:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for at, name in enumerate(columns):
        longest = max([len(word) for word in name.split()] + [len(row[at]) for row in cells], default=0)
        table.add_column(Text(name), overflow="fold", min_width=None if at == wide else longest)
    for row, colour in zip(cells, colours, strict=True):
        table.add_row(*(Text(cell, style=colour if at == status else "") for at, cell in enumerate(row)))
    return table


def _stacked(columns: Sequence[str], row: Sequence[str], status: int, colour: str, width: int) -> RichTable:
    """One row for a narrow terminal: every cell on its own lines, next to the name of its column."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, COLUMN_GAP, 0, 0))
    grid.add_column(overflow="fold", max_width=width // 3)
    grid.add_column(overflow="fold")
    for at, (name, cell) in enumerate(zip(columns, row, strict=True)):
        if cell:
            grid.add_row(Text(name, style="dim"), Text(cell, style=colour if at == status else ""))
    grid.add_row("")
    return grid


def lasting(seconds: float) -> str:
    """A time that is only about right."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Progress:
    """Progress of long work: a bar on a terminal, one plain line per step elsewhere.

    Attributes:
        left: seconds that are expected to be left; None where nobody knows.
    """

    def __init__(self, total: int, what: str, *, quiet: bool = False) -> None:
        self.total, self.what, self.done, self.quiet = total, what, 0, quiet
        self.left: float | None = None
        self._began = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not self.quiet:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            console = RichConsole(file=sys.stderr)
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24 if console.width >= 80 else 8),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(self.what, total=self.total, left="")
            self._bar.start()
        return self

    def step(self, sentence: str, *, advance: int = 1) -> None:
        """Show what has just been done; `advance` more parts are finished."""
        self.done += advance
        text = printable(sentence)
        if self._bar is not None:
            self._bar.update(self._task, description=text, advance=advance, left=self._left())
            return
        if not self.quiet:
            width, took = len(str(self.total)), time.monotonic() - self._began
            left = f", {told}" if (told := self._left()) else ""
            write(sys.stderr, f"[{self.done:>{width}}/{self.total}] {took:6.1f} s{left}  {text}\n")

    def _left(self) -> str:
        return "" if self.left is None else f"about {lasting(self.left)} left"

    def now(self, sentence: str, *, aloud: bool = False) -> None:
        """Show on a terminal what is being worked on; elsewhere only if it is said aloud."""
        if self._bar is not None:
            self._bar.update(self._task, description=printable(sentence), left=self._left())
        elif aloud:
            self.step(sentence, advance=0)

    def at(self, done: int, sentence: str) -> None:
        """Show that `done` parts are finished by now."""
        self.step(sentence, advance=done - self.done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
