"""The ledgers of this process, read into one row of integers per call; each column is a series."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from prill_harness.leaks.ledgers import settle
from prill_harness.leaks.ledgers.native import Interposer
from prill_harness.leaks.reports.verdict import Rule
from prill_runtime.errors import PrillError

PLANT_BYTES, PLANT_EVERY = 16, 8
SETTLE_S, SETTLE_TRIES = 0.001, 50
PROCESS_KEYS = ("process", "rss")  # of engine.memory(): the process ledger reads these itself
LIMIT_SUFFIX = "_limit"  # engine.memory() may give a counter's limit: "cache" and "cache_limit"


class Series(msgspec.Struct, frozen=True):
    """One column. A `part` series locates a leak but does not decide; `readings` only inform."""

    ledger: str
    name: str
    unit: str
    rule: Rule | None
    part: bool = False


class LeakLedger(ABC):
    """A few counters that are read together; reading must leave no memory behind."""

    series: tuple[Series, ...]

    @abstractmethod
    def read(self) -> Sequence[int]:
        """One value for each series."""

    def plant(self) -> Mapping[str, int]:
        """Leak a known amount; by how much each series (by name) must grow."""
        return {}

    def unplant(self) -> None:
        """Free what was planted."""


class Host(LeakLedger):
    """Live blocks and bytes of all allocation functions, in total and by size class, and mapped bytes."""

    def __init__(self, interposer: Interposer) -> None:
        self._interposer = interposer
        names = [
            f"blocks of {size} B" if size <= 1032 else f"blocks up to {size} B" for size in interposer.sizes
        ]
        names[-1] = "larger blocks"
        self.series = (
            Series("host", "blocks", "blocks", Rule.EXACT),
            Series("host", "bytes", "B", Rule.EXACT),
            Series("host", "mapped", "B", Rule.EXACT),
            *(Series("host", name, "blocks", Rule.EXACT, part=True) for name in names),
        )

    def read(self) -> Sequence[int]:
        blocks, sizes, mapped = self._interposer.read()
        return sum(blocks), sum(sizes), mapped, *blocks

    def plant(self) -> Mapping[str, int]:
        usable = self._interposer.plant(PLANT_BYTES)
        at = self._interposer.sizes.index(usable)
        return {"blocks": 1, "bytes": usable, self.series[3 + at].name: 1} if usable else {}

    def unplant(self) -> None:
        self._interposer.unplant()


class PythonBlocks(LeakLedger):
    """Blocks that Python's own allocator has handed out."""

    def __init__(self, room: int) -> None:
        self.series = (Series("python", "blocks", "blocks", Rule.EXACT),)
        self._kept: list[object] = [None] * room
        self._planted = 0

    def read(self) -> Sequence[int]:
        return (sys.getallocatedblocks(),)

    def plant(self) -> Mapping[str, int]:
        self._kept[self._planted] = object()
        self._planted += 1
        return {"blocks": 1}

    def unplant(self) -> None:
        self._kept[: self._planted] = [None] * self._planted


class Process(LeakLedger):
    """Descriptors and threads, which must never grow, and resident memory that no exact ledger explains."""

    def __init__(self, interposer: Interposer) -> None:
        self._interposer, self._threads = interposer, sys.maxsize
        self.series = (
            Series("process", "descriptors", "descriptors", Rule.NEVER),
            Series("process", "threads", "threads", Rule.NEVER),
            Series("process", "unattributed", "B", Rule.RESIDENT),
            Series("process", "resident", "B", None),
        )

    def read(self) -> Sequence[int]:
        for _ in range(SETTLE_TRIES):  # a joined thread counts until the kernel has removed it
            about = self._interposer.process()
            if about["threads"] <= self._threads:
                break
            time.sleep(SETTLE_S)
        self._threads = about["threads"]
        resident = about["rss_anon"] + about["swap"]
        _, held, mapped = self._interposer.totals()
        return about["descriptors"], about["threads"], resident - held - mapped, resident


class Counters(LeakLedger):
    """What the engine says it holds; every counter must be back at its idle value after a call."""

    def __init__(self, memory: Callable[[], Mapping[str, int]], names: Sequence[str]) -> None:
        self._memory = memory
        self._names = tuple(names)
        self.series = tuple(
            Series("engine", n, "B", None if n.endswith(LIMIT_SUFFIX) else Rule.COUNTER) for n in self._names
        )

    def read(self) -> Sequence[int]:
        said = self._memory()
        return [int(said.get(name, 0)) for name in self._names]


def counter_names(said: Mapping[str, int]) -> list[str]:
    """The counters of engine.memory() that are about the engine, not its process."""
    return [name for name in said if name not in PROCESS_KEYS]


class Book:
    """The readings after each call.

    Attributes:
        rows: (call, series), int64. planted: (call, series), what the plants add so far. calls: rows in use.
    """

    def __init__(
        self, series: Sequence[Series], rows: NDArray[np.int64], planted: NDArray[np.int64], calls: int
    ) -> None:
        self.series, self.rows, self.planted, self.calls = tuple(series), rows, planted, calls
        self._column = {(s.ledger, s.name): i for i, s in enumerate(self.series)}

    def last(self) -> dict[str, int]:
        """The newest readings for display, without the plants."""
        row = self.rows[self.calls - 1] - self.planted[self.calls - 1]
        shown = (s for s in self.series if not s.part)
        return {f"{s.ledger} {s.name}": int(row[self._column[s.ledger, s.name]]) for s in shown}

    def values(self, series: Series, first: int, *, planted: bool = False) -> tuple[int, ...]:
        """Readings from the one before call `first` on, with or without the plants."""
        column = self._column[series.ledger, series.name]
        read = self.rows[first - 2 : self.calls, column]
        off = 0 if planted else self.planted[first - 2 : self.calls, column]
        return tuple(int(value) for value in read - off)


class Measured(Book):
    """A book being written; its memory is allocated before the first call."""

    def __init__(self, ledgers: Sequence[LeakLedger], calls: int) -> None:
        self._ledgers = tuple(ledgers)
        series = tuple(s for ledger in self._ledgers for s in ledger.series)
        shape = calls, len(series)
        # Filled with ones to touch every page now, so that writing later takes none.
        super().__init__(series, np.ones(shape, np.int64), np.ones(shape, np.int64), 0)
        self._sum: NDArray[np.int64] = np.zeros(len(series), np.int64)

    def close_call(self) -> None:
        """Plant if it is time to, and read every ledger."""
        if (self.calls + 1) % PLANT_EVERY == 0:
            self._plant()
        settle.settled()
        at = 0
        for ledger in self._ledgers:
            for value in ledger.read():
                self.rows[self.calls, at] = value
                at += 1
        self.planted[self.calls] = self._sum
        self.calls += 1

    def beside(self, calls: int) -> Measured:
        """An empty book of the same ledgers, for control calls."""
        return Measured(self._ledgers, calls)

    def _plant(self) -> None:
        for ledger in self._ledgers:
            for name, size in ledger.plant().items():
                self._sum[self._column[ledger.series[0].ledger, name]] += size

    def unplant(self) -> None:
        for ledger in self._ledgers:
            ledger.unplant()


def opened(
    calls: int, engine_memory: Callable[[], Mapping[str, int]] | None, device: Sequence[LeakLedger] = ()
) -> tuple[Measured, dict[str, str]]:
    """The book of every ledger that can be attached here, and why the others cannot.

    Ledgers of a device are read without the host's: CUPTI allocates host memory at every call.
    """
    missing: dict[str, str] = {}
    if device:
        return Measured(device, calls), missing
    found: list[LeakLedger] = []
    try:
        interposer = Interposer()
        found += [Host(interposer), PythonBlocks(calls), Process(interposer)]
    except PrillError as error:
        missing["host"] = str(error)
    if engine_memory is not None:
        found.append(Counters(engine_memory, counter_names(engine_memory())))
    return Measured(found, calls), missing
