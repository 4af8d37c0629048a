"""Judge one series of readings: whether it grew in every window, how fast, and what that means.

The retained level is the one below which no later reading falls: noise above it does not count, and its
growth is a leak. A window grew if the retained level at its end is above that at its start. Trend tests are
not used to decide: they flag every cache that fills.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

WINDOWS = 5
EVEN_FACTOR = 2  # a leak's windows differ by no more than this factor, or the calls are doubled first
CLEAR_FACTOR = 4  # with noise, growth must be this many times the largest fall seen
ROUGH_FACTOR = 4  # as EVEN_FACTOR, once the calls have been doubled
SETTLING_SHARE = 0.5  # growth of the last two windows over the first two, below which it is coming to an end
# Growth per call below which resident memory shows nothing: a heap takes that long to reach its size.
RESIDENT_BYTES = 16384
STEADY_SHARE = 0.8  # the same, above which growth of resident memory is not coming to an end
CONFIDENCE = 1.959964  # standard deviations of a 95 % interval


class Rule(StrEnum):
    """How a ledger's readings are judged.

    EXACT: to the byte; COUNTER: reported by the engine; NEVER: no growth at all; RESIDENT: pages, noisy.
    """

    EXACT = "exact"
    COUNTER = "counter"
    NEVER = "never"
    RESIDENT = "resident"


class State(StrEnum):
    """What a series shows so far; UNCLEAR first means twice as many calls, and then inconclusive."""

    LEAK = "leak"
    CLEAN = "clean"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class SeriesShape:
    """Measures of a series of readings (call 0 is after warm-up, then one per call).

    Attributes:
        grown: growth of the retained level in each window.
        fall: the largest drop below an earlier reading. growth: of the retained level.
        slope, low, high: Theil-Sen per call, with its 95 % interval.
    """

    grown: tuple[int, ...]
    growth: int
    fall: int
    last: int
    slope: float
    low: float
    high: float

    @property
    def every_window(self) -> bool:
        return min(self.grown) > 0

    def even(self, factor: int = EVEN_FACTOR) -> bool:
        """Whether all windows grew by about the same amount."""
        return max(self.grown) <= factor * min(self.grown)

    @property
    def visible(self) -> bool:
        """Whether growth stands out from the noise at all."""
        return self.every_window and self.growth >= EVEN_FACTOR * self.fall

    @property
    def settling(self) -> bool:
        """Whether growth is coming to an end: a cache that fills, a heap that reaches its size."""
        return self.kept < SETTLING_SHARE

    @property
    def kept(self) -> float:
        """Growth of the last two windows over that of the first two."""
        return sum(self.grown[-2:]) / max(1, sum(self.grown[:2]))


def shape(values: Sequence[int], windows: int = WINDOWS) -> SeriesShape:
    """Measure readings; their number less one must be a multiple of `windows`."""
    array = np.asarray(values, np.int64)
    per, rest = divmod(len(array) - 1, windows)
    if rest or not per:
        raise ValueError(f"{len(array) - 1} calls do not make {windows} equal windows")
    retained = np.minimum.accumulate(array[::-1])[::-1]
    fall = int((np.maximum.accumulate(array) - array).max())
    slope, low, high = theil_sen(array)
    grown = tuple(int(g) for g in np.diff(retained[::per]))
    growth = int(retained[-1] - retained[0])
    return SeriesShape(grown, growth, fall, int(array[-1] - array[0]), slope, low, high)


def theil_sen(values: Sequence[int] | NDArray[np.int64]) -> tuple[float, float, float]:
    """(median of all pairwise slopes, and the 95 % interval by Sen's rank method), per step."""
    array = np.asarray(values, np.float64)
    n = len(array)
    first, second = np.triu_indices(n, 1)
    slopes = np.sort((array[second] - array[first]) / (second - first))
    reach = CONFIDENCE * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low = max(0, math.floor((len(slopes) - reach) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + reach) / 2))
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def state(seen: SeriesShape, rule: Rule, *, doubled: bool = False) -> State:
    """What a series shows; `doubled`: it already has twice the calls, and there will be no more."""
    return JUDGES[rule](seen, doubled)


def _exact(seen: SeriesShape, doubled: bool) -> State:
    if not seen.every_window:
        rising = not doubled and min(seen.grown[-2:]) > 0 and seen.growth >= EVEN_FACTOR * seen.fall
        return State.UNCLEAR if rising else State.CLEAN
    if not doubled:
        return State.LEAK if not seen.fall and seen.even() else State.UNCLEAR
    sure = seen.growth >= CLEAR_FACTOR * seen.fall and seen.even(ROUGH_FACTOR) and not seen.settling
    return State.LEAK if sure else State.UNCLEAR


def _counter(seen: SeriesShape, doubled: bool) -> State:
    """A counter of the engine must be back at its idle value after every call."""
    if seen.last <= 0:
        return State.CLEAN
    return State.LEAK if seen.every_window else State.UNCLEAR


def _never(seen: SeriesShape, doubled: bool) -> State:
    return State.LEAK if seen.last > 0 else State.CLEAN


def _resident(seen: SeriesShape, doubled: bool) -> State:
    if not seen.every_window or seen.low < RESIDENT_BYTES or seen.growth < EVEN_FACTOR * seen.fall:
        return State.CLEAN
    sure = doubled and seen.growth >= CLEAR_FACTOR * seen.fall and seen.kept >= STEADY_SHARE
    return State.LEAK if sure else State.UNCLEAR


JUDGES = {Rule.EXACT: _exact, Rule.COUNTER: _counter, Rule.NEVER: _never, Rule.RESIDENT: _resident}
