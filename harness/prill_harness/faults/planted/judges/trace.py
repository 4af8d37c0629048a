"""Faults of the trace: the model is right, and what is shown of its stages is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.planting.faults import Patch, fault

TRACE = "prill_harness.engines.embedded:Embedded.trace"
BLAMES = ("trace",)
Stages = list[tuple[str, NDArray[Any]]]


def other_stages(changed: Callable[[Stages], Stages]) -> Iterator[Patch]:
    """A trace that is not what was captured."""
    yield Patch(TRACE, lambda trace: lambda self, *given: iter(changed(list(trace(self, *given)))))


@fault(area="trace", blames=BLAMES)
def trace_pointers_alias() -> Iterator[Patch]:
    """Every stage is kept as a pointer into one buffer, which the last one has overwritten."""

    def aliased(stages: Stages) -> Stages:
        buffer = np.zeros(max(array.size for _, array in stages), stages[0][1].dtype)
        views = [(name, buffer[: array.size].reshape(array.shape)) for name, array in stages]
        for (_, view), (_, array) in zip(views, stages, strict=True):
            view[...] = array
        return views

    yield from other_stages(aliased)


@fault(area="trace", blames=BLAMES)
def trace_changes_result() -> Iterator[Patch]:
    """Showing a stage rounds it to half precision, for the rest of the pass too."""

    def wrap(tracing: Any) -> Any:
        def rounding(trace: Any) -> Any:
            tap = tracing(trace)
            return lambda stage, x: tap(stage, x.astype(np.float16).astype(x.dtype))

        return rounding

    yield Patch("prill_runtime.run.model:_tracing", wrap)


@fault(area="trace", blames=BLAMES)
def stage_missing() -> Iterator[Patch]:
    """The trace leaves out what attention gives."""
    yield from other_stages(lambda stages: [s for s in stages if not s[0].endswith(".attn")])


@fault(area="trace", blames=BLAMES, needs=("gate",))
def stage_misnamed() -> Iterator[Patch]:
    """Gate and up carry each other's names."""
    other = {"gate": "up", "up": "gate"}

    def renamed(stages: Stages) -> Stages:
        parts = [(*name.rpartition("."), array) for name, array in stages]
        return [(block + dot + other.get(kind, kind), array) for block, dot, kind, array in parts]

    yield from other_stages(renamed)


@fault(area="trace", blames=BLAMES)
def stage_unknown() -> Iterator[Patch]:
    """The output of a block goes by a name that no table has."""
    yield from other_stages(lambda stages: [(name.replace(".out", ".block_end"), a) for name, a in stages])


@fault(area="trace", blames=BLAMES)
def trace_order_reversed() -> Iterator[Patch]:
    """Stages are shown last first."""
    yield from other_stages(lambda stages: stages[::-1])


@fault(area="trace", blames=BLAMES)
def trace_last_row_only() -> Iterator[Patch]:
    """Of every stage but the logits the last row alone is shown."""
    yield from other_stages(lambda stages: [*((name, a[-1:]) for name, a in stages[:-1]), stages[-1]])


@fault(area="trace", blames=BLAMES)
def trace_of_last_request() -> Iterator[Patch]:
    """The trace is that of the first request, whatever is asked."""
    kept: dict[int, Any] = {}

    def wrap(trace: Any) -> Any:
        return lambda self, *given: iter(kept.setdefault(id(self), list(trace(self, *given))))

    yield Patch(TRACE, wrap)
