"""A load in; its 1st, 2nd, 3rd ... allocation failed, until it succeeds; what each failure left, out."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator

from prill_harness.leaks.native import Interposer
from prill_harness.leaks.paths import opened
from prill_harness.leaks.report import Judged, Probe, Verdict, Walk
from prill_runtime.errors import Inconclusive

REPEATS = 4  # loads failed at the same allocation when the first repetition grew; a leak grows with each
# In the C control library every allocation fails in turn. Where Python itself allocates in the loading thread
# those below a page are mostly the interpreter's own (frames, dicts, errors); failing them tests CPython, and
# takes minutes. Those of a page and more, which hold tensors, are failed there: all of them when the time
# below is enough, else some, spread over the whole load. How many of how many is part of what is reported.
PYTHON_LEAST = 4096  # bytes
# What a GPU's driver allocates is not failed: what it forgets then is its maker's to mend, not the engine's.
DRIVERS = ("libcuda.so", "libnvidia-")
SHARE = 0.25  # of a probe's time limit that its walk may take
GOLDEN = (math.sqrt(5) - 1) / 2


def walked(probe: Probe, model: str) -> tuple[list[Judged], Walk | None]:
    """What the walk found, as a series of the host ledger; `model`: the file, where the probe's is a name."""
    try:
        interposer = Interposer()
    except Inconclusive:
        return [], None

    if probe.engine.startswith("control:"):
        from prill_harness.leaks.controls import loader

        found, walk = walk_over(loader(probe.engine), interposer)
        return [found], walk

    def load() -> None:
        opened(probe.engine, model).close()

    found, walk = walk_over(load, interposer, PYTHON_LEAST, min(probe.walk_s, SHARE * probe.timeout_s))
    return [found], walk


def walk_over(
    load: Callable[[], None], interposer: Interposer, least: int = 0, budget_s: float = math.inf
) -> tuple[Judged, Walk]:
    """Fail each allocation of `load` in turn; after each failure nothing remains and the next load works.

    Args:
        least: bytes; smaller allocations are not failed. budget_s: no further one is begun after it.
    """
    began = time.monotonic()
    with interposer.failing(0) as every:
        load()
    interposer.spare(DRIVERS)  # loaded by now
    with interposer.failing(0, least=least) as seen:
        load()
    total, failed, swallowed = seen[0], 0, 0

    def told(verdict: Verdict, sentence: str, growth: int = 0) -> tuple[Judged, Walk]:
        smaller = max(0, every[0] - total - seen[2])
        walk = Walk(failed, total, swallowed, least, smaller, seen[2], round(time.monotonic() - began, 3))
        words = f"host: {sentence}" if sentence else f"host: {walk.sentence}"
        return Judged("host", "failed allocations", "B", verdict, words, growth=growth), walk

    for nth in spread(total):
        if time.monotonic() - began > budget_s:
            break
        fails = Failing(load, interposer, least, nth)
        fails.once()  # the first one fills caches of its own: error texts, tracebacks
        left = [fails.once()]
        while left[-1] > 0 and len(left) < REPEATS:
            left.append(fails.once())
        if not fails.hits:
            continue
        failed += 1
        swallowed += not fails.refused
        if left[-1] > 0:
            return told(
                Verdict.LEAK,
                f"a load whose allocation {nth} of {total} fails leaves {min(left)} B behind each time",
                min(left),
            )
        try:
            load()
        except Exception as error:
            return told(
                Verdict.BROKEN,
                f"after a load whose allocation {nth} of {total} failed the next load breaks: {error}",
            )
    if not failed:
        return told(Verdict.INCONCLUSIVE, "the load makes no allocation that could be failed")
    return told(Verdict.CLEAN, "")


class Failing:
    """Loads whose nth allocation fails. Attributes: hits: failures made. refused: the load said so."""

    def __init__(self, load: Callable[[], None], interposer: Interposer, least: int, nth: int) -> None:
        self._load, self._interposer, self._least, self._nth = load, interposer, least, nth
        self.hits, self.refused, self._held = 0, False, 0

    def once(self) -> int:
        """Load once; bytes held now beyond those held after the last time."""
        with self._interposer.failing(self._nth, least=self._least) as seen:
            try:
                self._load()
            except Exception:
                self.refused = True
        self.hits += seen[1]
        gc.collect()
        _, held, mapped = self._interposer.totals()
        before, self._held = self._held, held + mapped
        return self._held - before


def spread(total: int) -> Iterator[int]:
    """1 to `total`, each once, in an order in which any first part is spread over the whole."""
    step = max(1, round(total * GOLDEN))
    while math.gcd(step, max(1, total)) > 1:
        step += 1
    return (1 + number * step % total for number in range(total))
