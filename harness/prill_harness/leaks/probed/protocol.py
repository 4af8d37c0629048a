"""The messages (JSON lines) and commands (one byte) between the probed process and the judging one."""

from __future__ import annotations

import base64

import msgspec
import numpy as np
from numpy.typing import NDArray

from prill_harness.leaks.ledgers.ledgers import Book, Series
from prill_harness.leaks.reports.report import JudgedSeries, LoadWalk, Site

# Commands: as many calls again; as many with distinct prompts; end, with the walk, with the kinds of call
# that leave something, or with neither.
AGAIN, DISTINCT, WALK, LOCATE, END = b"a", b"d", b"w", b"l", b"e"


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The ledgers' columns; missing ledgers and why; whether distinct prompts make a difference; how many
    calls of which kinds one call of this path consists of."""

    series: tuple[Series, ...]
    missing: dict[str, str]
    varies: bool
    kinds: dict[str, int] = {}


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Progress: calls done and planned, and the newest readings."""

    done: int
    total: int
    values: dict[str, int]


class Rows(msgspec.Struct, frozen=True, tag="rows"):
    """Every reading so far, and the first call to judge; the process then waits for a command."""

    first: int
    calls: int
    rows: bytes
    planted: bytes

    @classmethod
    def of(cls, book: Book, first: int) -> Rows:
        used = book.rows[: book.calls], book.planted[: book.calls]
        return cls(first, book.calls, *(base64.b64encode(a.tobytes()) for a in used))

    def book(self, series: tuple[Series, ...]) -> Book:
        return Book(series, _array(self.rows, len(series)), _array(self.planted, len(series)), self.calls)


class ControlRows(msgspec.Struct, frozen=True, tag="control"):
    """Readings of the control calls."""

    rows: Rows


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The end.

    Attributes:
        extra: what the walk found; walk: how far it went.
        constant: counters of the engine that nothing moves. left: by kind of call, what grew by how much.
    """

    extra: tuple[JudgedSeries, ...] = ()
    constant: tuple[str, ...] | None = None
    walk: LoadWalk | None = None
    left: dict[str, dict[str, int]] = {}


class Failing(msgspec.Struct, frozen=True, tag="failing"):
    """Repeated loads begin whose allocation `nth` of `of` is failed."""

    nth: int
    of: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The path cannot be measured; `broken`: because the engine failed, not because something is missing."""

    sentence: str
    broken: bool


class LeakSites(msgspec.Struct, frozen=True, tag="traced"):
    """The call sites that a run under memray found, the worst first."""

    sites: tuple[Site, ...]


Message = Opened | Call | ControlRows | Rows | Failing | Finished | Refused | LeakSites


def _array(packed: bytes, width: int) -> NDArray[np.int64]:
    return np.frombuffer(base64.b64decode(packed), np.int64).reshape(-1, width)
