"""The kernels that draw, on the emulator: `sampler.sample`'s ids, whatever logits, settings and history."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.device.memory.arena import Arena
from prill_runtime.device.ops import sampler as sampling
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.errors import InvalidParameter, NotANumber
from prill_runtime.sampling.sampler import SamplingParams, filtered_distribution, philox_uniform, sample

SIZES = {"weights": 1 << 20, "cache": 1 << 20, "activations": 8 << 20, "scratch": 8 << 20, "logits": 1 << 20}
INF = math.inf
ROUNDING = 1e-11  # of a host's sum, of the whole

FLOATS = st.one_of(
    st.floats(-30, 30, width=32),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, -1e4, -INF]),
)
LOGITS = st.integers(1, 700).flatmap(
    lambda size: arrays(np.float32, size, elements=FLOATS, fill=st.sampled_from([0.0, -2.0, -INF]))
)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-300, 0.1, 0.7, 1.0, 3.0, 1e300]) | st.floats(0, 10),
    top_k=st.sampled_from([0, 1, 2, 40, 699, 700, 2**62]) | st.integers(0, 800),
    top_p=st.sampled_from([0.0, 0.5, 1.0, 1.0]) | st.floats(0, 1),
    min_p=st.sampled_from([0.0, 0.0, 1.0]) | st.floats(0, 1),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.5]) | st.floats(0.01, 100),
    seed=st.integers(0, 2**64 - 1),
)


@pytest.fixture(scope="module")
def ops() -> Iterator[CudaBackend]:
    device = EmuDevice()
    yield CudaBackend(device, Arena(device, SIZES, None, "test"))
    device.close()


def borderline(row: NDArray[Any], params: SamplingParams, position: int, history: list[int]) -> set[int]:
    """Ids that sums as inexact as the host's may come to."""
    found = set()
    for nudge in (-ROUNDING, 0.0, ROUNDING):
        top_p = min(max(params.top_p + nudge, 0.0), 1.0) if params.top_p < 1 else 1.0
        for factor in (1 - 1e-15, 1.0, 1 + 1e-15):
            named = (params.temperature, params.top_k, top_p, min(1.0, params.min_p * factor))
            ids, p = filtered_distribution(row, SamplingParams(*named, params.repetition_penalty), history)
            mass, fraction = np.cumsum(p), philox_uniform(params.seed, position)
            for f in (fraction - ROUNDING, fraction, fraction + ROUNDING):
                drawn = int(np.searchsorted(mass, f * mass[-1], side="right"))
                found.add(int(ids[min(drawn, int(np.count_nonzero(p)) - 1)]))
    return found


def said(draw: Callable[..., int], *arguments: Any) -> int | str:
    """The id, or the refusal's sentence."""
    try:
        return draw(*arguments)
    except NotANumber as error:
        return str(error)


@settings(max_examples=150)
@given(LOGITS, PARAMS, st.integers(0, 2**31 - 1), st.data())
def test_any_row_is_drawn_from_as_on_the_host(
    ops: CudaBackend, row: NDArray[np.float32], params: SamplingParams, position: int, data: st.DataObject
) -> None:
    """The same id, or the same refusal in the same words; on a border, an id on one side of it."""
    history = data.draw(st.lists(st.integers(0, len(row) - 1), max_size=8))
    expected, got = (said(draw, row, params, position, history) for draw in (sample, ops.draw))
    assert got == expected or got in borderline(row, params, position, history)


@pytest.mark.parametrize("size", [1, 31, 33, 511, 513, 2047, 2049, 70_001])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 3.0])
def test_vocabularies_about_every_border(ops: CudaBackend, size: int, spread: float) -> None:
    """Sizes about lists, bins and blocks; flat, nearly flat and spread: the very id of the host."""
    row = (np.random.default_rng(size).standard_normal(size) * spread).astype(np.float32)
    for number, (top_k, top_p, penalty) in enumerate([(0, 1.0, 1.0), (size // 2, 0.9, 1.0), (0, 0.3, 1.1)]):
        params = SamplingParams(1.0, top_k, top_p, 0.0, penalty, number)
        history = [0, size // 2, size - 1]
        assert ops.draw(row, params, 77, history) == sample(row, params, 77, history)


def test_every_probable_id_is_drawn(ops: CudaBackend) -> None:
    """Over 400 positions the ids are the host's, one by one, and no filter lets another through."""
    row = np.random.default_rng(2).standard_normal(60).astype(np.float32)
    params = SamplingParams(1.0, 12, 0.9, 0.05, 1.2, 99)
    drawn = [ops.draw(row, params, position, [3, 3, 8]) for position in range(400)]
    assert drawn == [sample(row, params, position, [3, 3, 8]) for position in range(400)]
    assert set(drawn) == set(filtered_distribution(row, params, [3, 3, 8])[0].tolist())


def test_a_single_block_finishes_what_is_missing(ops: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no pass in the graph the last kernel does all of them, and the id is the same."""
    rows = (np.zeros(3000, np.float32), np.random.default_rng(4).standard_normal(3000).astype(np.float32))
    params = SamplingParams(1.0, 2900, 0.95, 1e-4, 1.1, 6)
    expected = [ops.draw(row, params, 5, [7]) for row in rows]
    monkeypatch.setattr(sampling, "FILTER_PASSES", 0)
    assert [ops.draw(row, params, 5, [7]) for row in rows] == expected
    assert expected == [sample(row, params, 5, [7]) for row in rows]


def test_the_order_of_threads_changes_nothing(ops: CudaBackend) -> None:
    """Threads from last to first: the same ids; no barrier is missing."""
    row = np.round(np.random.default_rng(5).standard_normal(5000) * 4).astype(np.float32)
    cases = [(SamplingParams(1.0, 4000, 0.8, 0.001, 1.3, seed), 10 + seed) for seed in range(6)]
    forward = [ops.draw(row, params, position, [1, 2]) for params, position in cases]
    ops.device.reverse = True  # type: ignore[attr-defined]
    try:
        assert [ops.draw(row, params, position, [1, 2]) for params, position in cases] == forward
    finally:
        ops.device.reverse = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", [[0, math.nan, INF], [0, INF, math.nan], [-INF, -INF], [-INF, 1e38]])
def test_what_is_refused_is_refused_in_the_hosts_words(ops: CudaBackend, row: list[float]) -> None:
    """The first id that is NaN or +inf, the penalty's overflow included; nothing but -inf."""
    params = SamplingParams(1.0, repetition_penalty=1e-300)
    sentences = [said(draw, np.array(row, np.float32), params, 0, [1]) for draw in (sample, ops.draw)]
    assert sentences[0] == sentences[1]
    assert "logit" in str(sentences[0])


def test_an_id_outside_the_vocabulary_is_refused(ops: CudaBackend) -> None:
    """A history of another vocabulary is an error, not a write behind the map."""
    for token in (-1, 4):
        with pytest.raises(InvalidParameter, match=f"expected 0 to 3, got {token}"):
            ops.draw(np.zeros(4, np.float32), SamplingParams(1.0, repetition_penalty=2.0), 0, [token])


def test_every_byte_is_in_the_estimate(ops: CudaBackend) -> None:
    """The arena holds just what the sizes say, and has it back when the sampler goes."""
    before = ops.arena.ledger()["scratch"]
    made = sampling.DeviceSampler(ops, 1000)
    assert ops.arena.ledger()["scratch"] - before == sum(sampling.sizes(1000).values())
    del made
    assert ops.arena.ledger()["scratch"] == before
