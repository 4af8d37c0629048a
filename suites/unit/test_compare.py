"""The measures of compare.py, against values worked by hand and against their laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from prill_harness.numbers import compare
from prill_runtime.errors import EngineError

Floats = NDArray[np.float64]
LOGITS = arrays(np.float64, (3, 7), elements=st.floats(-50, 50, width=32))
MEASURES = (compare.nmse, compare.kl, compare.dlogprob, compare.rank)


def test_nmse_by_hand() -> None:
    """(3,4) against (3,3): error 1, energy 25."""
    assert compare.nmse([3.0, 4.0], [3.0, 3.0]) == pytest.approx(1 / 25)
    assert compare.nmse([0.0], [0.0]) == 0
    assert compare.nmse([0.0], [1e-30]) == math.inf


def test_kl_by_hand() -> None:
    """Oracle (1/2, 1/2) against candidate (1/4, 3/4): ln 2 − ½ ln 3/2 ... worked by hand 0.143841."""
    row = compare.kl([[0.0, 0.0]], [[0.0, math.log(3)]])
    assert row[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12)


def test_tiny_kl_is_not_lost_to_cancellation() -> None:
    """For two ids and a shift of e in one logit, KL is p(1−p)e²/2 to third order, even at e = 1e-7."""
    e = 1e-7
    assert compare.kl([[0.0, 0.0]], [[e, 0.0]])[0] == pytest.approx(e * e / 8, rel=1e-5)


def test_dlogprob_looks_at_the_oracles_top_only() -> None:
    """A change in the least likely id alone is not seen with k=2, and is seen with k=3."""
    oracle, candidate = [[10.0, 9.0, -20.0]], [[10.0, 9.0, -25.0]]
    assert compare.dlogprob(oracle, candidate, k=2)[0] < 1e-12
    assert compare.dlogprob(oracle, candidate, k=3)[0] == pytest.approx(5.0, abs=1e-9)


def test_rank_counts_better_ids_and_lower_ids_on_ties() -> None:
    """Best id 2: alone on top 1, tied with id 0 it comes second, tied with id 3 first."""
    oracle = [[0.0, 0.0, 5.0, 0.0]]
    assert compare.rank(oracle, [[0.0, 0.0, 5.0, 0.0]])[0] == 1
    assert compare.rank(oracle, [[5.0, 0.0, 5.0, 0.0]])[0] == 2
    assert compare.rank(oracle, [[0.0, 0.0, 5.0, 5.0]])[0] == 1
    assert compare.agreement(np.array([1, 2, 6, 1]), 1) == 0.5
    assert compare.agreement(np.array([1, 2, 6, 1]), 5) == 0.75


def test_top_ids_break_ties_by_the_lowest_id() -> None:
    """Equal logits are ordered by id."""
    assert compare.top_ids([[1.0, 3.0, 3.0, 2.0]], 3).tolist() == [[1, 2, 3]]
    assert compare.best_ids([[1.0, 3.0, 3.0]]).tolist() == [1]


def test_p99_is_a_value_that_occurred() -> None:
    """Of 200 values with two outliers the 99th percentile is an outlier, not something between."""
    values = np.r_[np.zeros(197), [7.0, 8.0, 9.0]]
    assert compare.p99(values) == 8.0
    assert compare.p99(np.array([1.0, math.inf])) == math.inf


def test_buckets_hold_their_edges() -> None:
    """Positions 16, 17, 64, 65, 256 and 257 fall where the table says."""
    positions = np.array([16, 17, 64, 65, 256, 257])
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert compare.bucket_max(values, positions) == {"1-16": 1, "17-64": 3, "65-256": 5, "257+": 6}
    assert compare.bucket_max(values[:1], positions[:1]) == {"1-16": 1}


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1.0, "float32", 2**-23),
        (-1.0, "float32", 2**-23),
        (1.999, "float32", 2**-23),
        (16.0, "float16", 2**-6),
        (20.0, "bfloat16", 2**-3),
        (0.0, "float32", 2**-149),
        (0.0, "float16", 2**-24),
        (12.7, "int8", 0.1),
        (1.0, "float64", 2**-52),
    ],
)
def test_ulp_by_hand(value: float, kind: str, expected: float) -> None:
    """One unit in the last place, subnormals and sign included."""
    assert compare.ulp(value, kind) == pytest.approx(expected, rel=1e-12)


@given(st.floats(2**-100, 2**100, width=32))
def test_ulp_agrees_with_numpy(value: float) -> None:
    """The formula gives NumPy's spacing for float32."""
    assert compare.ulp(value, "float32") == float(np.spacing(np.float32(value)))


def test_margin_and_near_tie() -> None:
    """The edge itself counts as near; an id outside the vocabulary never does."""
    assert compare.margin_of([1.0, 1.5], 0, 0.5).near_tie
    assert not compare.margin_of([1.0, 1.5], 0, 0.49).near_tie
    assert compare.margin_of([1.0, 1.5], 1, 0.0).near_tie
    for outside in (2, -1):
        assert compare.margin_of([1.0, 1.5], outside, 1e9).margin == math.inf


@given(LOGITS)
def test_nothing_differs_from_itself(z: Floats) -> None:
    """Every distance of x to x is 0 and every rank is 1."""
    assert compare.nmse(z, z) == 0
    assert not compare.kl(z, z).any()
    assert not compare.dlogprob(z, z).any()
    assert (compare.rank(z, z) == 1).all()


@given(LOGITS, LOGITS)
def test_kl_is_never_negative_and_matches_the_textbook(a: Floats, b: Floats) -> None:
    """KL ≥ 0, and equals Σ p (log p − log q) up to rounding."""
    log_p, log_q = compare.log_softmax(a), compare.log_softmax(b)
    textbook = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    ours = compare.kl(a, b)
    assert (ours >= 0).all()
    np.testing.assert_allclose(ours, textbook, rtol=1e-9, atol=1e-12)


@given(LOGITS, LOGITS, st.floats(-20, 20))
def test_shifting_all_logits_changes_no_distribution(a: Floats, b: Floats, shift: float) -> None:
    """Softmax measures ignore a constant; NMSE does not, and must not."""
    np.testing.assert_allclose(compare.kl(a, b + shift), compare.kl(a, b), rtol=1e-7, atol=1e-11)
    np.testing.assert_allclose(compare.dlogprob(a, b + shift), compare.dlogprob(a, b), atol=1e-9)
    assert compare.nmse(a + 1.0, a + 1.5) > 0


@given(LOGITS, LOGITS, st.permutations(range(7)))
def test_renaming_the_ids_changes_no_distance(a: Floats, b: Floats, order: list[int]) -> None:
    """NMSE, KL and Δ logprob are the same under any permutation of the vocabulary."""
    np.testing.assert_allclose(compare.kl(a[:, order], b[:, order]), compare.kl(a, b), rtol=1e-9, atol=1e-12)
    assert compare.nmse(a[:, order], b[:, order]) == pytest.approx(compare.nmse(a, b), rel=1e-9)
    gaps = compare.dlogprob(a[:, order], b[:, order], k=7), compare.dlogprob(a, b, k=7)
    np.testing.assert_allclose(*gaps, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_candidate_that_is_not_finite_never_passes(bad: float) -> None:
    """One NaN or infinity makes every measure of its position infinite and its rank the last."""
    oracle = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    candidate = oracle.copy()
    candidate[1, 2] = bad
    assert compare.nmse(oracle, candidate) == math.inf
    assert compare.kl(oracle, candidate).tolist() == [0.0, math.inf]
    assert compare.dlogprob(oracle, candidate)[1] == math.inf
    assert compare.rank(oracle, candidate).tolist() == [1, 3]


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.__name__)
def test_unequal_lengths_are_an_error(measure: object) -> None:
    """A truncated output is not compared up to where it ends."""
    with pytest.raises(EngineError, match=r"another shape: expected \(3, 4\), got \(2, 4\)"):
        measure(np.zeros((3, 4)), np.zeros((2, 4)))  # type: ignore[operator]


@given(LOGITS, LOGITS, st.integers(1, 7))
def test_top_n_bounds_hold_the_true_kl(a: Floats, b: Floats, n: int) -> None:
    """Whatever n is returned, the true KL and total variation lie within the bounds."""
    log_q = compare.log_softmax(b[0])
    ids = compare.top_ids(b[0], n)
    seen = compare.top_n(a[0], ids.tolist(), log_q[ids].tolist(), least_logprob=float(log_q.min()))
    true = compare.kl(a[:1], b[:1])[0]
    apart = 0.5 * np.abs(np.exp(compare.log_softmax(a[0])) - np.exp(log_q)).sum()
    assert seen.kl_low <= true + 1e-9
    assert true <= seen.kl_high + 1e-9
    assert apart <= seen.distance_high + 1e-9


@given(LOGITS, st.integers(2, 7), st.floats(-2e-5, 2e-5))
def test_top_n_takes_no_rounding_for_divergence(a: Floats, n: int, off: float) -> None:
    """Right logprobs that all miss by as much as float32 softmaxes miss their sum have a lower bound of
    noise's size, with as few or as many ids returned; one logprob that is off by a thousandth is seen."""
    log_q = compare.log_softmax(a[0])
    ids = compare.top_ids(a[0], n)
    told = (log_q[ids] + off).astype(np.float32).astype(np.float64)
    assert compare.top_n(a[0], ids.tolist(), told.tolist()).kl_low < 1e-11
    second = math.exp(log_q[ids[1]])
    told[1] -= 1e-3
    if second > 0.01:
        assert compare.top_n(a[0], ids.tolist(), told.tolist()).kl_low > 1e-9


def test_top_n_sees_a_share_beyond_rounding() -> None:
    """Probability that went to the ids not returned: KL of (0.7, 0.3) from (0.6, 0.4), less what rounding
    may hide."""
    told = np.log(np.array([0.4, 0.3]) * 6 / 7).tolist()
    seen = compare.top_n(np.log([0.4, 0.3, 0.2, 0.1]), [0, 1], told)
    assert seen.kl_low == pytest.approx(0.7 * math.log(0.7 / 0.6) + 0.3 * math.log(0.3 / 0.4), rel=0.01)


def test_top_n_says_what_it_did_not_see() -> None:
    """Two of four ids: the sentence names the unseen mass, and without a least logprob no upper bound."""
    seen = compare.top_n(np.log([0.4, 0.3, 0.2, 0.1]), [0, 1], np.log([0.4, 0.3]).tolist())
    assert seen.kl_high == math.inf
    assert seen.kl_low == pytest.approx(0, abs=1e-5)
    assert "2 ids" in seen.sentence
    assert "unbounded" in seen.sentence
    assert "0.3 of the candidate's probability" in seen.sentence


@pytest.mark.parametrize(
    ("ids", "logprobs"), [([0, 0], [-1.0, -1.0]), ([0, 9], [-1.0, -1.0]), ([0], [-1.0, -2.0]), ([], [])]
)
def test_malformed_top_n_is_an_error(ids: list[int], logprobs: list[float]) -> None:
    """Repeated or foreign ids, and unequal numbers, are not compared."""
    with pytest.raises(EngineError, match="malformed"):
        compare.top_n(np.zeros(4), ids, logprobs)


@pytest.mark.parametrize("logprobs", [[math.nan, -1.0], [-0.1, -0.1]])
def test_impossible_top_n_never_passes(logprobs: list[float]) -> None:
    """NaN, or probabilities that add up to more than one, are infinitely wrong."""
    seen = compare.top_n(np.zeros(4), [0, 1], logprobs)
    assert seen.kl_low == math.inf
    assert seen.dlogprob == math.inf
