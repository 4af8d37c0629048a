"""Show a probe's readings live, one line per ledger, if the output is a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from prill_harness.leaks.probed.protocol import Call
from prill_harness.leaks.reports.report import Probe, amount

if TYPE_CHECKING:
    from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"
BAR_COLUMNS = 40
FIGURE_COLUMNS = 44  # columns of names and figures before the bars
LEAST_BARS = 8  # fewer bars show no slope
SHOWN_SERIES = ("host bytes", "host blocks", "host mapped", "python blocks", "process descriptors",
         "process threads", "process unattributed")  # fmt: skip


def sparkline(values: list[int], width: int = BAR_COLUMNS) -> str:
    """The last `width` values as bars scaled from their minimum to their maximum."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    steps = len(BARS) - 1
    return "".join(BARS[(v - low) * steps // (high - low) if high > low else 0] for v in shown)


class Live:
    """A context manager whose `watch` is the callback of `probe`."""

    def __init__(self) -> None:
        self._live: Any = None
        self._path, self._began = "", 0.0
        self._seen: dict[str, list[int]] = {}

    def watch(self, wanted: Probe, call: Call) -> None:
        """Show the readings after one call."""
        if self._live is None:
            return
        if wanted.path != self._path or call.done == 1:
            self._path, self._began, self._seen = wanted.path, time.monotonic(), {}
        for name, value in call.values.items():
            if name in SHOWN_SERIES or name.startswith(("engine", "device", "pinned", "managed")):
                self._seen.setdefault(name, []).append(value)
        self._live.update(self._table(wanted, call))

    def _table(self, wanted: Probe, call: Call) -> Table:
        from rich.table import Table

        spent = time.monotonic() - self._began
        left = spent / call.done * (call.total - call.done)
        phase = "warm-up" if call.done <= wanted.warmup else "measured"
        title = f"{wanted.path}: call {call.done} of {call.total} ({phase}), {left:.0f} s left"
        table = Table(title=title, box=None, title_justify="left", pad_edge=False)
        room = min(BAR_COLUMNS, self._live.console.width - FIGURE_COLUMNS)
        for column in ("ledger", "now", "per call", "")[: 4 if room >= LEAST_BARS else 3]:
            table.add_column(column, justify="right" if column in ("now", "per call") else "left")
        for name, values in self._seen.items():
            measured = values[wanted.warmup - 1 :]
            per_call = (measured[-1] - measured[0]) / max(1, len(measured) - 1) if measured else 0.0
            unit = "B" if name.endswith(("bytes", "mapped", "unattributed")) else ""
            now, rate = amount(values[-1], unit or "B"), amount(per_call, unit or "B")
            shown = (now, rate) if unit else (str(values[-1]), f"{per_call:.3g}")
            bars = [sparkline(measured or values, room)] if room >= LEAST_BARS else []
            table.add_row(name, *shown, *bars)
        return table

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live as RichLive

            self._live = RichLive(console=Console(file=sys.stderr), transient=True, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
