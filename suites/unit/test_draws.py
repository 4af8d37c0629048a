"""Where a sampled text may part: what noise moves in the order of drawing, and what it cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.numbers import lanes
from prill_harness.numbers.draws import (
    boundary_distance,
    expected_swaps,
    left_by_filters,
    share_distance,
)
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


def test_an_id_on_a_filter_s_edge_moves_every_share() -> None:
    """Id 3 is a hair above the least probability that min-p keeps: without it the others' shares grow, so a
    draw far from every border of theirs gives another id. Without noise, and off the edge, none does."""
    edge = np.log([0.5, 0.25, 0.15, 0.10000001])  # a fifth of the first
    params = SamplingParams(temperature=1.0, min_p=0.2)
    dropped = np.log([0.5, 0.25, 0.15, 0.09999999])
    uniform = 0.8  # in id 2's share of all four, in id 1's without the last
    assert (drawn(edge, uniform, params), drawn(dropped, uniform, params)) == (2, 1)
    assert boundary_distance(edge, params, [], 2, uniform) == pytest.approx(0.05)
    assert share_distance(edge, params, [], 1, uniform, 1e-6) == pytest.approx(0.05)
    assert share_distance(edge, params, [], 1, uniform, 1e-6, tau=1e-6) == 0.0
    assert boundary_distance(edge, params, [], 2, uniform, tau=1e-6) == 0.0
    off = np.log([0.5, 0.25, 0.14, 0.11])
    assert share_distance(off, params, [], 1, 0.8, 1e-6, tau=1e-6) == pytest.approx(0.05)
    # What is lost with it is the probability that such a draw is the next one.
    swaps = [expected_swaps(row[None], [], [0], params, 1e-6) for row in (edge, off)]
    assert swaps == pytest.approx([-math.expm1(-0.1), 0.0], abs=1e-6)


FILTERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 4, 30]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


@settings(deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 60), st.floats(0, 0.999), st.sampled_from([1e-6, 0.05]), FILTERS
)  # fmt: skip
def test_noise_gives_no_id_but_those_that_it_may(
    seed: int, size: int, uniform: float, tau: float, params: SamplingParams
) -> None:
    """Logits that move apart by up to tau leave as many ids as was said, and draw what may be drawn."""
    random = np.random.default_rng(seed)
    row = random.standard_normal(size).round(1)  # with ties
    if size > 1:  # and one id just on the edge of min-p
        row[size // 2] = row.max() + params.temperature * math.log(params.min_p or 0.3)
    other = row + tau * (random.random(size) - 0.5)
    fewest, most = left_by_filters(row, params, [], 1.001 * tau)
    assert fewest[0].size <= filtered_distribution(other, params)[0].size <= most[0].size
    noise = 2 * math.expm1(1.001 * tau / params.temperature)
    got = drawn(other, uniform, params)
    assert share_distance(row, params, [], got, uniform, noise, 1.001 * tau) <= noise + 1e-9


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
