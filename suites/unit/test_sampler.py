"""Philox is Philox, filters keep what they say, ties go to the lowest id, and nothing depends on history."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_runtime.errors import InvalidParameter, NotANumber
from prill_runtime.sampling.philox import philox4x32, philox_uniform
from prill_runtime.sampling.sampler import SamplingParams, filtered_distribution, sample

FULL = 201_088  # the largest vocabulary in use
INF = math.inf


def kept(logits: list[float], history: tuple[int, ...] = (), **params: Any) -> dict[int, float]:
    """The filtered distribution as {id: probability}, in order."""
    settings = SamplingParams(**{"temperature": 1.0, **params})
    ids, probabilities = filtered_distribution(np.array(logits), settings, history)
    return {int(i): float(p) for i, p in zip(ids, probabilities, strict=True)}


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """The known-answer vectors of Random123 for philox4x32 with ten rounds."""
    assert philox4x32(counter, key) == words


def test_uniform_is_53_bits_of_the_first_two_words() -> None:
    """The fraction of the zero vector, written out; high words of seed and position are used."""
    assert philox_uniform(0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    words = philox4x32((7, 3, 0, 0), (9, 5))
    expected = ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53
    assert philox_uniform(9 + (5 << 32), 7 + (3 << 32)) == expected


def test_uniform_is_uniform_and_keyed() -> None:
    """4,000 draws fill 20 bins evenly; a neighbouring seed or position gives an unrelated number."""
    draws = np.array([philox_uniform(42, position) for position in range(4000)])
    assert ((draws >= 0) & (draws < 1)).all()
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 50  # χ² with 19 degrees: beyond 50 is one in 10⁴
    other = np.array([philox_uniform(43, position) for position in range(4000)])
    assert abs(np.corrcoef(draws, other)[0, 1]) < 0.06
    assert len({*draws, *other}) == 8000


@pytest.mark.parametrize("wrong", [-1, 1 << 64, 1.5, True])
def test_seeds_and_positions_are_unsigned_64_bit(wrong: Any) -> None:
    """Anything else is refused by name rather than wrapped."""
    with pytest.raises(InvalidParameter, match="seed"):
        philox_uniform(wrong, 0)
    with pytest.raises(InvalidParameter, match="position"):
        philox_uniform(0, wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("temperature", value) for value in (-0.1, math.nan, INF, "1", True)),
        *(("top_k", value) for value in (-1, 1.0, True)),
        *(("top_p", value) for value in (-0.1, 1.1, math.nan)),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
        *(("repetition_penalty", value) for value in (0, -1.0, INF, math.nan)),
        *(("seed", value) for value in (-1, 1 << 64, 0.5)),
    ],
)
def test_parameters_out_of_range_are_named(name: str, wrong: Any) -> None:
    """Each wrong value gives one sentence with the parameter's name."""
    with pytest.raises(InvalidParameter, match=f"in {name}: out of range"):
        SamplingParams(**{name: wrong})


def test_greedy_takes_the_largest_and_the_lowest_id_on_ties() -> None:
    """Temperature 0: argmax; equal logits give the lowest id; −0.0 equals 0.0; −inf is just masked."""
    greedy = SamplingParams()
    assert sample(np.array([1.0, 3.0, 2.0]), greedy, 0) == 1
    assert sample(np.array([1.0, 3.0, 3.0, 3.0]), greedy, 5) == 1
    assert sample(np.array([-1.0, -0.0, 0.0]), greedy, 0) == 1
    assert sample(np.array([-INF, -INF, -5.0]), greedy, 0) == 2
    assert sample(np.zeros(FULL, np.float32), greedy, 0) == 0


def test_the_distribution_is_softmax_at_the_temperature() -> None:
    """No filter: softmax(logits / T), most probable first; T is applied once."""
    logits = [0.3, -1.0, 2.5, 0.3]
    for temperature in (0.5, 1.0, 3.0):
        weights = [math.exp(z / temperature) for z in logits]
        got = kept(logits, temperature=temperature)
        assert list(got) == [2, 0, 3, 1]
        for token, probability in got.items():
            assert math.isclose(probability, weights[token] / sum(weights), rel_tol=1e-12)


def test_top_k_keeps_k_with_ties_by_id() -> None:
    """k of them, the lowest ids among equals; 0 and k ≥ vocab are off; k = 1 is greedy."""
    logits = [1.0, 2.0, 2.0, 2.0, 0.0]
    assert list(kept(logits, top_k=2)) == [1, 2]
    assert list(kept(logits, top_k=1)) == [1]
    for off in (0, 5, 6, 1 << 40):
        assert kept(logits, top_k=off) == kept(logits)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    """Mass .5 .25 .125 .125: the id that reaches p is kept, one that comes after it is not."""
    logits = [math.log(p) for p in (0.125, 0.5, 0.125, 0.25)]
    for top_p, ids in ((0.0, [1]), (0.4, [1]), (0.6, [1, 3]), (0.8, [1, 3, 0]), (1.0, [1, 3, 0, 2])):
        got = kept(logits, top_p=top_p)
        assert list(got) == ids
        assert math.isclose(sum(got.values()), 1)
    flat = [0.0] * 4
    assert list(kept(flat, top_p=0.5)) == [0, 1]
    assert list(kept(flat, top_p=0.500001)) == [0, 1, 2]


def test_min_p_is_relative_to_the_most_probable() -> None:
    """Ids at least min_p times as probable as the first; 1 keeps its equals; 0 is off."""
    logits = [math.log(p) for p in (0.1, 0.4, 0.1, 0.4)]
    assert list(kept(logits, min_p=0.2)) == [1, 3, 0, 2]
    assert list(kept(logits, min_p=0.3)) == [1, 3]
    assert list(kept([5.0, 5.0, 4.9], min_p=1.0)) == [0, 1]


def test_filters_work_on_what_the_one_before_left() -> None:
    """Top-p counts mass after top-k: of .4 .3 .2 .1, top-k 2 leaves 4/7 and 3/7, so p = .55 keeps one.

    After temperature too: at T = 1/2 the masses are .53 .30 .13 .03, and p = .8 keeps two instead of three.
    """
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert list(kept(logits, top_k=2, top_p=0.55)) == [0]
    assert list(kept(logits, top_p=0.55)) == [0, 1]
    assert list(kept(logits, top_p=0.8)) == [0, 1, 2]
    assert list(kept(logits, top_p=0.8, temperature=0.5)) == [0, 1]


def test_repetition_penalty_always_lowers() -> None:
    """Positive logits are divided, negative ones multiplied, once per id however often it was seen."""
    logits = [4.0, -4.0, 0.0, 1.0]
    expected = kept([2.0, -8.0, 0.0, 1.0])
    assert kept(logits, history=(0, 1, 2, 0, 0, 1), repetition_penalty=2.0) == expected
    assert kept(logits, history=(0, 1), repetition_penalty=1.0) == kept(logits)
    assert sample(np.array([4.0, 3.0]), SamplingParams(repetition_penalty=2.0), 0, [0]) == 1
    with pytest.raises(InvalidParameter, match=r"history.*0 to 3, got 4"):
        kept(logits, history=(4,), repetition_penalty=2.0)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_unusable_logits_are_refused(temperature: float) -> None:
    """NaN and +inf name the id; nothing but −inf is no distribution; an empty row is no row."""
    params = SamplingParams(temperature=temperature)
    with pytest.raises(NotANumber, match="id 1 is nan"):
        sample(np.array([0.0, math.nan, INF]), params, 0)
    with pytest.raises(NotANumber, match="id 2 is inf"):
        sample(np.array([0.0, 1.0, INF]), params, 0)
    with pytest.raises(NotANumber, match="every logit is -inf"):
        sample(np.full(4, -INF), params, 0)
    for wrong in (np.empty(0), np.zeros((2, 3))):
        with pytest.raises(InvalidParameter, match="logits"):
            sample(wrong, params, 0)


def test_masked_ids_are_never_in_the_distribution() -> None:
    """−inf is out even when no filter is on; a probability that underflows is never drawn."""
    assert list(kept([-INF, 0.0, -INF, 0.0])) == [1, 3]
    rare = SamplingParams(temperature=1.0, seed=3)
    assert {sample(np.array([-1e6, 0.0, 0.0]), rare, position) for position in range(200)} == {1, 2}


def test_flat_distributions_of_a_full_vocabulary_are_exact() -> None:
    """201,088 equal logits: top-p counts exactly, the order is by id, and the draw is u · n."""
    flat = np.zeros(FULL, np.float32)
    half = SamplingParams(temperature=1.0, top_p=0.5, seed=11)
    ids, probabilities = filtered_distribution(flat, half)
    np.testing.assert_array_equal(ids, np.arange(FULL // 2))
    assert abs(probabilities.sum() - 1) < 1e-9
    everything = SamplingParams(temperature=1.0, seed=11)
    for position in range(20):
        assert abs(sample(flat, everything, position) - int(philox_uniform(11, position) * FULL)) <= 1


def test_the_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    """The first id, in descending order, whose cumulative probability exceeds u; frequencies follow."""
    probabilities = np.array([0.2, 0.5, 0.3])
    params = SamplingParams(temperature=1.0, seed=2**63)
    drawn = []
    for position in range(3000):
        u = philox_uniform(2**63, position)
        expected = 1 if u < 0.5 else 2 if u < 0.8 else 0
        drawn.append(sample(np.log(probabilities), params, position))
        assert drawn[-1] == expected
    np.testing.assert_allclose(np.bincount(drawn) / 3000, probabilities, atol=0.03)


def test_seed_and_position_alone_decide() -> None:
    """The same call gives the same id in any order; another seed or position gives other sequences."""
    logits = np.random.default_rng(0).standard_normal(500)
    params = SamplingParams(temperature=1.0, seed=1)
    forwards = [sample(logits, params, position) for position in range(50)]
    backwards = [sample(logits, params, position) for position in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) > 20
    other = SamplingParams(temperature=1.0, seed=2)
    assert forwards != [sample(logits, other, position) for position in range(50)]


logit_rows = st.lists(st.integers(-30, 30).map(lambda n: n / 4), min_size=1, max_size=40)


@given(
    logits=logit_rows,
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    position=st.integers(0, 2**64 - 1),
)
def test_any_filters_leave_a_distribution(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, position: int
) -> None:
    """Never empty, sums to one, descending with ties by id, no more than top-k, and the draw is from it."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=5)
    ids, probabilities = filtered_distribution(np.array(logits), params)
    assert 1 <= ids.size <= (min(top_k, len(logits)) or len(logits))
    assert abs(probabilities.sum() - 1) < 1e-12
    keys = [(-logits[i], i) for i in ids]
    assert keys == sorted(keys)
    assert ids[0] == int(np.argmax(logits))
    assert (np.diff(probabilities) <= 0).all()
    assert sample(np.array(logits), params, position) in ids
