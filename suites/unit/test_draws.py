"""Where a sampled text may part: what noise moves in the order of drawing, and what it cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.numbers import lanes
from prill_harness.numbers.draws import boundary_distance, expected_swaps, share_distance
from prill_runtime.sampling.sampler import SamplingParams, filtered_distribution

HOT = SamplingParams(temperature=1.0)
NEAR = np.log([0.36, 0.355, 0.2, 0.085])  # ids 0 and 1 are about as probable


def drawn(row: np.ndarray, uniform: float, params: SamplingParams = HOT) -> int:
    """The id that a row gives for a draw."""
    ids, probabilities = filtered_distribution(row, params)
    mass = np.cumsum(probabilities)
    return int(ids[min(int(np.searchsorted(mass, uniform * mass[-1], side="right")), len(ids) - 1)])


def test_ids_about_as_probable_may_change_places() -> None:
    """A draw in the middle of a share is far from its borders; noise of one percent gives the other id."""
    assert drawn(NEAR, 0.18) == 0
    assert drawn(np.log([0.355, 0.36, 0.2, 0.085]), 0.18) == 1
    assert boundary_distance(NEAR, HOT, [], 0, 0.18) == pytest.approx(0.18)
    assert share_distance(NEAR, HOT, [], 1, 0.18) == pytest.approx(0.18)
    assert share_distance(NEAR, HOT, [], 1, 0.18, noise=0.005) == 0.0


def test_an_id_that_is_less_probable_stays_behind() -> None:
    """What noise cannot bring forward is as far from the draw as its share begins."""
    for token, begins in ((2, 0.715), (3, 0.915)):
        assert share_distance(NEAR, HOT, [], token, 0.18, noise=0.005) == pytest.approx(begins - 0.18)
    assert share_distance(NEAR, SamplingParams(1.0, top_k=2), [], 3, 0.18, noise=0.005) == math.inf


@given(st.integers(0, 2**32), st.integers(1, 30), st.floats(0, 0.999), st.sampled_from([0.3, 1.0, 4.0]))
def test_without_noise_it_is_the_share_itself(seed: int, size: int, uniform: float, spread: float) -> None:
    """The drawn id is at distance nought, and no other but on a border."""
    row = spread * np.random.default_rng(seed).standard_normal(size).round(1)  # with ties
    near = [one for one in range(size) if share_distance(row, HOT, [], one, uniform) < 1e-12]
    assert drawn(row, uniform) in near
    assert len(near) <= 2  # two on a border


@given(
    st.integers(0, 2**32), st.integers(2, 40), st.floats(0, 0.999), st.sampled_from([1e-4, 1e-2, 0.1, 1.0])
)  # fmt: skip
def test_noise_reaches_no_further_than_its_total_variation(
    seed: int, size: int, uniform: float, noise: float
) -> None:
    """Whatever id a disturbed row draws, the draw lies within the total variation of what it may have."""
    random = np.random.default_rng(seed)
    row = 2 * random.standard_normal(size)
    other = row + noise * random.standard_normal(size)
    p, q = (np.exp(r - r.max()) / np.exp(r - r.max()).sum() for r in (row, other))
    moved = float(np.abs(p - q).sum()) / 2
    got = drawn(other, uniform)
    assert share_distance(row, HOT, [], got, uniform, moved) <= moved + 1e-9


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from([1e-3, 1e-2]))
def test_swaps_are_predicted_where_ids_crowd(seed: int, tau: float) -> None:
    """In a flat row of thousands noise often puts another id in a token's place; in a steep one it cannot."""
    random = np.random.default_rng(seed)
    flat, steep = random.standard_normal((20, 4000)), 3.0 * np.arange(20 * 8).reshape(20, 8)
    moved = flat + tau / lanes.SIGMAS / math.sqrt(2) * random.standard_normal(flat.shape)
    tokens, seen = ([int(filtered_distribution(row, HOT)[0][2000]) for row in rows] for rows in (flat, moved))
    predicted = sum(
        expected_swaps(flat[n, None], [], tokens[n : n + 1], HOT, tau) for n in range(len(tokens))
    )
    assert 0 < predicted <= len(tokens)
    assert sum(a != b for a, b in zip(tokens, seen, strict=True)) <= lanes.poisson_upper(predicted)
    assert expected_swaps(steep, [], [1] * 20, HOT, tau) == 0.0
