"""Windows, falls and slopes: what a series of readings is worth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.leaks.reports.verdict import Rule, State, shape, state, theil_sen


def judged(values: list[int], rule: Rule = Rule.EXACT, *, doubled: bool = False) -> State:
    return state(shape(values), rule, doubled=doubled)


def stairs(step: int, every: int, calls: int = 40) -> list[int]:
    return [step * (call // every) for call in range(calls + 1)]


@pytest.mark.parametrize(("step", "every"), list(itertools.product((1, 24, 4096), (1, 2, 3, 5, 8))))
def test_a_leak_is_found_in_forty_calls(step: int, every: int) -> None:
    """A quiet ledger that grows by the same in every nth call, n up to the window, is a leak at once."""
    assert judged(stairs(step, every)) is State.LEAK


@given(st.lists(st.integers(-50, 50), min_size=41, max_size=41), st.integers(0, 7))
def test_what_comes_back_in_the_last_window_is_no_leak(noise: list[int], at: int) -> None:
    """Whatever happens before: a reading in the last window at or below all earlier ones is not a leak."""
    values = [1000 + v for v in noise]
    values[33 + at] = 900
    assert judged(values) is not State.LEAK
    assert judged(values, doubled=True) is not State.LEAK


@given(st.integers(1, 32), st.integers(1, 10**6))
def test_a_cache_that_fills_before_the_last_window_is_no_leak(entries: int, size: int) -> None:
    """Growth by every call that ends before the last window: never a leak, doubled or not."""
    values = [size * min(call, entries) for call in range(41)]
    assert judged(values) is not State.LEAK
    assert judged([size * min(call, 2 * entries) for call in range(81)], doubled=True) is not State.LEAK


def test_a_trend_alone_is_not_evidence() -> None:
    """A cache that fills has a positive slope with an interval above zero, and is no leak all the same."""
    values = [min(call, 30) for call in range(41)]
    seen = shape(values)
    assert seen.low > 0
    assert judged(values) is not State.LEAK


def test_noise_as_large_as_the_growth_asks_for_more_calls() -> None:
    """Growth in every window amid falls is unclear; with twice the calls it is a leak once it stands out."""
    rng = np.random.default_rng(1)
    values = [call * 3 + int(rng.integers(0, 12)) for call in range(81)]
    assert judged(values[:41]) is State.UNCLEAR
    assert judged(values, doubled=True) is State.LEAK


def test_a_random_walk_is_not_a_leak() -> None:
    """Of 400 random walks none is called a leak at once, and with twice the calls fewer than 1 in 100."""
    rng = np.random.default_rng(7)
    walks = np.cumsum(rng.integers(-3, 4, (400, 81)), axis=1)
    assert not any(judged(list(map(int, walk[:41]))) is State.LEAK for walk in walks)
    assert sum(judged(list(map(int, walk)), doubled=True) is State.LEAK for walk in walks) < 4


def test_descriptors_never_grow() -> None:
    """One more descriptor at the end is enough; one that is closed again is not."""
    assert judged([5] * 20 + [6] * 21, Rule.NEVER) is State.LEAK
    assert judged([5] * 20 + [6] * 20 + [5], Rule.NEVER) is State.CLEAN


def test_resident_memory_speaks_in_pages() -> None:
    """Below a page a call nothing is said; above, only twice the calls make it a leak."""
    assert judged([100 * call for call in range(81)], Rule.RESIDENT, doubled=True) is State.CLEAN
    grows = [65536 * call for call in range(81)]
    assert judged(grows[:41], Rule.RESIDENT) is State.UNCLEAR
    assert judged(grows, Rule.RESIDENT, doubled=True) is State.LEAK


def test_counters_go_back_to_idle() -> None:
    """A counter that ends higher is never clean; one that grows in every window is a leak."""
    assert judged([10] * 41, Rule.COUNTER) is State.CLEAN
    assert judged([10] * 30 + [11] * 11, Rule.COUNTER) is State.UNCLEAR
    assert judged(stairs(1, 8), Rule.COUNTER) is State.LEAK


@given(st.floats(-100, 100), st.lists(st.floats(-1, 1), min_size=12, max_size=40))
def test_theil_sen_against_every_pair(slope: float, noise: list[float]) -> None:
    """The slope is the median over all pairs, written a second time here; the interval holds it."""
    values = np.array([slope * i + e for i, e in enumerate(noise)])
    found, low, high = theil_sen(values)
    pairs = [(values[j] - values[i]) / (j - i) for i in range(len(values)) for j in range(i + 1, len(values))]
    assert found == pytest.approx(float(np.median(pairs)))
    assert low <= found <= high


def test_windows_must_be_equal() -> None:
    """Calls that do not divide into the windows are refused, not rounded."""
    with pytest.raises(ValueError, match="equal windows"):
        shape([0] * 40)
