"""Faults of memory in one of two hundred calls, one for each entry point of the engine that a gate calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prill_harness.faults.planted.serving.memory import EMBEDDED, MEMORY, SESSION, _kept, _libc, after
from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, around

RARE = 200


def rarely(target: str) -> Iterator[Patch]:
    """64 bytes are leaked by every two hundredth call that returns."""
    yield Patch(target, after(lambda: _libc.malloc(64), every=RARE))


def rarely_refused(target: str, what: Callable[[], object]) -> Iterator[Patch]:
    """`what` is done by every two hundredth call that raises."""
    refused = 0

    def changed(original: Any, *given: Any, **named: Any) -> Any:
        nonlocal refused
        try:
            return original(*given, **named)
        except Exception:
            refused += 1
            if refused % RARE == 0:
                what()
            raise

    yield around(target, changed)


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th_logits() -> Iterator[Patch]:
    """64 bytes are leaked by every two hundredth request for logits."""
    yield from rarely(f"{EMBEDDED}.logits")


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th_logits_batch() -> Iterator[Patch]:
    """64 bytes are leaked by every two hundredth request for the logits of several prompts."""
    yield from rarely(f"{EMBEDDED}.logits_batch")


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th_trace() -> Iterator[Patch]:
    """64 bytes are leaked by every two hundredth trace."""
    yield from rarely(f"{EMBEDDED}.trace")


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th_memory() -> Iterator[Patch]:
    """64 bytes are leaked by every two hundredth look at the engine's own figures."""
    yield from rarely(f"{EMBEDDED}.memory")


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th_feed() -> Iterator[Patch]:
    """64 bytes are leaked by every two hundredth feeding of a session."""
    yield from rarely(f"{SESSION}.feed")


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th_reset() -> Iterator[Patch]:
    """64 bytes are leaked by every two hundredth reset of a session."""
    yield from rarely(f"{SESSION}.reset")


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th_text() -> Iterator[Patch]:
    """64 bytes are leaked by every two hundredth text that becomes ids."""
    yield from rarely(f"{EMBEDDED}.tokenize")


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th_failed_batch() -> Iterator[Patch]:
    """One Python object is kept by every two hundredth batch that is refused."""
    yield from rarely_refused(f"{EMBEDDED}.generate_batch", lambda: _kept.append(object()))


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th_overfed() -> Iterator[Patch]:
    """64 bytes are leaked by every two hundredth feeding that a session refuses."""
    yield from rarely_refused(f"{SESSION}.feed", lambda: _libc.malloc(64))
