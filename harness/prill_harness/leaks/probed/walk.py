"""A load in; its 1st, 2nd, 3rd ... allocation failed, until it succeeds; what each failure left, out."""

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
# In the C control library every allocation fails in turn. Where Python itself allocates in the loading thread
# those below a page are mostly the interpreter's own (frames, dicts, errors); failing them tests CPython, and
# takes minutes. Those of a page and more, which hold tensors, are failed there: all of them when the time
# below is enough, else some, spread over the whole load. How many of how many is part of what is reported.
PYTHON_LEAST = 4096  # bytes
WALK_SHARE = 0.25  # of a probe's time limit that its walk may take
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

Tell = Callable[[Message], None]


def walked(probe: Probe, model: str, tell: Tell) -> tuple[list[JudgedSeries], LoadWalk | None]:
    """What the walk found, as a series of the host ledger; `model`: the file, where the probe's is a name."""
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
    """Fail each allocation of `load` in turn; after each failure nothing remains and the next load works.

    Args:
        least: bytes; smaller allocations are not failed. budget_s: after it no further one than the first is
            begun.
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
    """Ask NumPy for arrays of `size` bytes: the requests that it promises to refuse with a MemoryError.

    Its buffers are another matter: it asks for some without the lock that raising needs, and dies.
    """
    np.empty(size, np.uint8)
    np.zeros(size, np.uint8)


class Failed:
    """Loads whose nth allocation fails.

    Attributes:
        hits: failures made. refused: the load said so. filled: growth came to an end. where: who asked.
    """

    def __init__(self, load: Callable[[], None], interposer: Interposer, least: int, nth: int) -> None:
        self._load, self._interposer, self._least, self._nth = load, interposer, least, nth
        self.hits, self.refused, self.filled, self.where = 0, False, False, ""
        self._held = 0

    def growth(self) -> int:
        """Bytes that stay for good after every such load; 0 when nothing does, or a store was filled."""
        held = [self._once()]  # the first one fills stores of its own: error texts, tracebacks
        while len(held) <= SUSPECT:
            held.append(self._once())
            if held[-1] <= held[-2]:
                return 0
        held = [held[-1], *(self._once() for _ in range(LONG))]
        seen = shape(held)
        self.filled = not seen.every_window or seen.growth < CLEAR_FACTOR * seen.fall
        return 0 if self.filled else max(1, round(seen.slope))

    def _once(self) -> int:
        """Load once; the bytes that are held then."""
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
    """The line of Python that a MemoryError began at, as `function (file:line)`; empty: none is behind it."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    if error is None or error.__traceback__ is None:
        return ""
    frame, line = list(walk_tb(error.__traceback__))[-1]
    code: CodeType = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{line})"


def spread(total: int) -> Iterator[int]:
    """1 to `total`, each once, in an order in which any first part is spread over the whole."""
    step = max(1, round(total * GOLDEN_RATIO))
    while math.gcd(step, max(1, total)) > 1:
        step += 1
    return (1 + number * step % total for number in range(total))
