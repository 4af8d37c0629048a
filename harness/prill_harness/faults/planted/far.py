"""Faults that show at the far end alone: at the largest and smallest magnitudes, and late in a text.

A check that no longer goes there kills everything else that it claims.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from prill_harness.faults.planted.model.norm import NORMS
from prill_harness.faults.planted.serving.sampler import other_numbers
from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, op

SMALLEST = np.finfo(np.float32).tiny  # that is not denormal
LARGEST, FAR, LATE = 1e4, 1e3, 32  # no fixture's stream, no fixture's score; positions


@fault(area="feed-forward", blames=("ffn_in", "out"), models=ONE)
def denormals_flushed() -> Iterator[Patch]:
    """A residual sum that is denormal in float32 becomes 0."""

    def add(original: Any, self: Any, a: Any, b: Any) -> Any:
        got = original(self, a, b)
        return np.where(np.abs(got) < SMALLEST, np.zeros_like(got), got)

    yield op("add", add)


@fault(area="norm", blames=NORMS, models=ONE)
def norm_input_clipped() -> Iterator[Patch]:
    """Norms clip values beyond 10^4."""
    for name in ("rms_norm", "layer_norm"):
        yield op(name, lambda original, self, x, *rest: original(self, np.clip(x, -LARGEST, LARGEST), *rest))


@fault(area="attention", blames=("attn",), models=ONE)
def scores_clipped() -> Iterator[Patch]:
    """Softmax takes scores beyond 10^3 for 10^3; masked ones stay masked."""

    def softmax(original: Any, self: Any, x: Any) -> Any:
        return original(self, np.where(np.isfinite(x), np.clip(x, -FAR, FAR), x).astype(x.dtype))

    yield op("softmax", softmax)


@fault(area="sampler", blames=("sampler",), models=ONE)
def late_draws_of_another_seed() -> Iterator[Patch]:
    """From position 32 on the next seed's random numbers are used."""
    yield from other_numbers(lambda seed, position: (seed + (position >= LATE), position))
