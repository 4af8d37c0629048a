"""Faults of rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cupel_harness.faults.core import Patch, fault

ROPE = "cupel_runtime.backends.numpy:NumpyBackend.rope"
LLAMA = ("fixture:llama-tiny",)
BLAMES = ("q_rope", "k_rope")


@fault(area="rope", blames=BLAMES, models=LLAMA)
def rope_base_default() -> Iterator[Patch]:
    """The base is 10000 whatever the file says."""

    def wrap(rope: Any) -> Any:
        return lambda self, x, positions, *, base, **rest: rope(self, x, positions, base=10000.0, **rest)

    yield Patch(ROPE, wrap)


@fault(area="rope", blames=BLAMES, models=LLAMA)
def rope_pairing() -> Iterator[Patch]:
    """Pairs (i, i+d/2) are rotated where the file means (2i, 2i+1)."""

    def wrap(rope: Any) -> Any:
        return lambda self, x, positions, *, layout, **rest: rope(self, x, positions, layout="neox", **rest)

    yield Patch(ROPE, wrap)
