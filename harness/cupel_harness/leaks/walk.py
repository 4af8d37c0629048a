"""A load in; the 1st, 2nd, 3rd ... allocation of it failed, until it succeeds; what each failure left, out."""

from __future__ import annotations

import gc
from collections.abc import Callable

from cupel_harness.engines import open_engine
from cupel_harness.leaks.native import Interposer
from cupel_harness.leaks.report import Judged, Probe, Verdict
from cupel_runtime.errors import Inconclusive

REPEATS = 3  # loads failed at the same allocation; what grows with each was left behind
MOST = 400  # allocations that are failed at most; beyond, equally spaced ones
PYTHON_LEAST = 4096  # bytes; see `least_for`


def least_for(probe: Probe) -> int:
    """The smallest allocation that is failed.

    In the C control library every one. Where Python itself allocates in the loading thread, an allocation
    below a page is mostly the interpreter's own (frames, dicts, exceptions), whose failure tests CPython and
    not the engine: there only large ones, which hold tensors, are failed.
    """
    return 0 if probe.engine.startswith("control:") else PYTHON_LEAST


def walked(probe: Probe) -> list[Judged]:
    """What the walk found, as one series of the host ledger."""
    try:
        interposer = Interposer()
    except Inconclusive:
        return []

    def load() -> None:
        open_engine(probe.engine, probe.model).close()

    return [walk(load, interposer, least_for(probe))]


def walk(load: Callable[[], None], interposer: Interposer, least: int = 0) -> Judged:
    """Fail each allocation of `load` in turn; after each failure nothing remains and the next load works."""
    with interposer.failing(0, least=least) as seen:
        load()
    total, failed, swallowed = seen[0], 0, 0
    for nth in _chosen(total):
        left, hits, refused = _failures(load, interposer, least, nth)
        if not hits:
            continue
        failed += 1
        swallowed += not refused
        if min(left) > 0:
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


def _failures(
    load: Callable[[], None], interposer: Interposer, least: int, nth: int
) -> tuple[list[int], int, bool]:
    """(bytes left by each repetition after the first, failures made, whether the load was refused)."""
    left, hits, refused, before = [], 0, False, 0
    for turn in range(REPEATS):
        with interposer.failing(nth, least=least) as seen:
            try:
                load()
            except Exception:
                refused = True
        hits += seen[1]
        gc.collect()
        _, held, mapped = interposer.totals()
        if turn:
            left.append(held + mapped - before)
        before = held + mapped
    return left, hits, refused


def _chosen(total: int) -> list[int]:
    step = max(1, -(-total // MOST))
    return list(range(1, total + 1, step))


def _told(verdict: Verdict, sentence: str, growth: int = 0) -> Judged:
    return Judged("host", "failed allocations", "B", verdict, sentence, growth=growth)
