"""A load in; its 1st, 2nd, 3rd ... allocation failed, until it succeeds; what each failure left, out."""

from __future__ import annotations

import gc
from collections.abc import Callable

from cupel_harness.leaks.native import Interposer
from cupel_harness.leaks.paths import opened
from cupel_harness.leaks.report import Judged, Probe, Verdict
from cupel_runtime.errors import Inconclusive

REPEATS = 4  # loads failed at the same allocation when the first repetition grew; a leak grows with each
MOST = 24  # allocations that are failed at most where a load is slow; beyond, equally spaced ones
# In the C control library every allocation fails in turn. Where Python itself allocates in the loading thread
# those below a page are mostly the interpreter's own (frames, dicts, errors); failing them tests CPython.
# Only the large ones, which hold tensors, are failed there.
PYTHON_LEAST = 4096  # bytes


def walked(probe: Probe, model: str) -> list[Judged]:
    """What the walk found, as a series of the host ledger; `model`: the file, where the probe's is a name."""
    try:
        interposer = Interposer()
    except Inconclusive:
        return []

    if probe.engine.startswith("control:"):
        from cupel_harness.leaks.controls import loader

        return [walk(loader(probe.engine), interposer)]

    def load() -> None:
        opened(probe.engine, model).close()

    return [walk(load, interposer, PYTHON_LEAST)]


def walk(load: Callable[[], None], interposer: Interposer, least: int = 0) -> Judged:
    """Fail each allocation of `load` in turn; after each failure nothing remains and the next load works."""
    with interposer.failing(0, least=least) as seen:
        load()
    total, failed, swallowed = seen[0], 0, 0
    for nth in _chosen(total, MOST if least else total):
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
            return _told(
                Verdict.LEAK,
                f"host: a load whose allocation {nth} of {total} fails leaves {min(left)} B behind each time",
                min(left),
            )
        try:
            load()
        except Exception as error:
            return _told(
                Verdict.BROKEN,
                f"host: after a load whose allocation {nth} of {total} failed the next load breaks: {error}",
            )
    if not failed:
        return _told(Verdict.INCONCLUSIVE, "host: the load makes no allocation that could be failed")
    kind = f" of {least} bytes and more" if least else ""
    return _told(
        Verdict.CLEAN,
        f"host: {failed} of the {total} allocations{kind} of a load failed in turn: nothing remained "
        f"({swallowed} of them were made good)",
    )


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


def _chosen(total: int, most: int) -> list[int]:
    step = max(1, -(-total // most)) if total else 1
    return list(range(1, total + 1, step))


def _told(verdict: Verdict, sentence: str, growth: int = 0) -> Judged:
    return Judged("host", "failed allocations", "B", verdict, sentence, growth=growth)
