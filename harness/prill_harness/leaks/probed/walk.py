"""Fail each allocation of a load in turn, and see what each failure leaves behind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import walk_tb
from types import CodeType

import numpy as np

from prill_harness.leaks.ledgers.native import LEARN, Interposer
from prill_harness.leaks.ledgers.settle import settled
from prill_harness.leaks.probed.paths import opened
from prill_harness.leaks.probed.protocol import Failing, Message
from prill_harness.leaks.reports.report import JudgedSeries, LeakVerdict, LoadWalk, Probe
from prill_harness.leaks.reports.verdict import CLEAR_FACTOR, WINDOWS, shape
from prill_runtime.errors import Inconclusive

SUSPECT = (
    4  # loads failed at the same allocation that each left something, from which it is looked at for long
)
LONG = (
    4 * WINDOWS
)  # further ones that tell a leak from a store that fills: a library's of what was freed, mostly
# In the C control library every allocation is failed in turn. If Python allocates in the loading thread,
# allocations below a page are mostly the interpreter's own (frames, dicts, errors); failing them would test
# CPython and take minutes. Those of a page or more, which hold tensors, are failed: all of them if the time
# below allows, else some, spread over the whole load. How many of how many is reported.
PYTHON_LEAST = 4096  # bytes
WALK_SHARE = 0.25  # of a probe's time limit, for its walk
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

Tell = Callable[[Message], None]


def walked(probe: Probe, model: str, tell: Tell) -> tuple[list[JudgedSeries], LoadWalk | None]:
    """What the walk found, as a series of the host ledger; `model`: the file, not its name."""
    try:
        interposer = Interposer()
    except Inconclusive:
        return [], None

    if probe.engine.startswith("control:"):
        from prill_harness.leaks.controls.host import loader

        found, walk = walk_over(loader(probe.engine), interposer, tell=tell)
        return [found], walk

    def load() -> None:
        opened(probe.engine, model).close()

    budget_s = min(probe.walk_s, WALK_SHARE * probe.timeout_s)
    found, walk = walk_over(load, interposer, PYTHON_LEAST, budget_s, tell)
    return [found], walk


def walk_over(
    load: Callable[[], None],
    interposer: Interposer,
    least: int = 0,
    budget_s: float = math.inf,
    tell: Tell = lambda message: None,
) -> tuple[JudgedSeries, LoadWalk]:
    """Fail each allocation of `load` in turn: after each nothing may remain, and the next load must work.

    Args:
        least: bytes; smaller allocations are not failed. budget_s: none but the first is begun after it.
    """
    began = time.monotonic()
    with interposer.failing(0) as every:
        load()
    interposer.attribute()  # libraries are loaded by now
    with interposer.failing(LEARN, least=least):
        arrays(2 * least)
    with interposer.failing(0, least=least) as seen:
        load()
    interposer.last_word()
    total, begins = seen[0], time.monotonic()
    failed = swallowed = filled = 0

    def told(verdict: LeakVerdict, sentence: str = "", growth: int = 0) -> tuple[JudgedSeries, LoadWalk]:
        seconds = round(time.monotonic() - began, 3)
        smaller = max(0, every[0] - total - seen[2])
        walk = LoadWalk(failed, total, swallowed, least, smaller, seen[2], filled, seconds)
        words = f"host: {sentence or walk.sentence}"
        return JudgedSeries("host", "failed allocations", "B", verdict, words, growth=growth), walk

    for nth in spread(total):
        if time.monotonic() - begins > budget_s and failed:
            break
        tell(Failing(nth, total))
        fails = Failed(load, interposer, least, nth)
        left = fails.growth()
        if not fails.hits:
            continue
        failed += 1
        swallowed += not fails.refused
        filled += fails.filled
        which = f"allocation {nth} of {total}, {fails.where},"
        if left:
            return told(
                LeakVerdict.LEAK, f"a load whose {which} fails leaves {left} B behind each time", left
            )
        try:
            load()
        except Exception as error:
            return told(
                LeakVerdict.BROKEN, f"after a load whose {which} failed the next load breaks: {error}"
            )
    if not failed:
        return told(LeakVerdict.INCONCLUSIVE, "the load makes no allocation that could be failed")
    return told(LeakVerdict.CLEAN)


def arrays(size: int) -> None:
    """Ask NumPy for arrays of `size` bytes: requests that it is supposed to refuse with a MemoryError.

    Its internal buffers are different: it allocates some without the lock that raising needs, and crashes.
    """
    np.empty(size, np.uint8)
    np.zeros(size, np.uint8)


class Failed:
    """Loads of which the nth allocation is failed.

    Attributes:
        hits: failures made. refused: the load said so. filled: growth came to an end. where: who allocated.
    """

    def __init__(self, load: Callable[[], None], interposer: Interposer, least: int, nth: int) -> None:
        self._load, self._interposer, self._least, self._nth = load, interposer, least, nth
        self.hits, self.refused, self.filled, self.where = 0, False, False, ""
        self._held = 0

    def growth(self) -> int:
        """Bytes that every such load leaves; 0 if it leaves none, or only filled a free list."""
        held = [self._once()]  # the first load fills caches of its own: error texts, tracebacks
        while len(held) <= SUSPECT:
            held.append(self._once())
            if held[-1] <= held[-2]:
                return 0
        held = [held[-1], *(self._once() for _ in range(LONG))]
        seen = shape(held)
        self.filled = not seen.every_window or seen.growth < CLEAR_FACTOR * seen.fall
        return 0 if self.filled else max(1, round(seen.slope))

    def _once(self) -> int:
        """Load once; the bytes held afterwards."""
        with self._interposer.failing(self._nth, least=self._least) as seen:
            try:
                self._load()
            except Exception as error:
                self.refused = True
                if seen_at := asked_by(error):
                    self.where = seen_at
        self.hits += seen[1]
        if not self.hits:
            return 0
        native = self._interposer.failed_at
        if native and native not in self.where:
            self.where = ", ".join(filter(None, (self.where, native)))
        self.where = self.where or "the interpreter's"
        settled()
        _, held, mapped = self._interposer.totals()
        return held + mapped


def asked_by(error: BaseException | None) -> str:
    """The Python line that raised a MemoryError, as `function (file:line)`; empty if there was none."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    if error is None or error.__traceback__ is None:
        return ""
    frame, line = list(walk_tb(error.__traceback__))[-1]
    code: CodeType = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{line})"


def spread(total: int) -> Iterator[int]:
    """1 to `total`, each once, ordered so that any first part is spread evenly over the whole."""
    step = max(1, round(total * GOLDEN_RATIO))
    while math.gcd(step, max(1, total)) > 1:
        step += 1
    return (1 + number * step % total for number in range(total))
