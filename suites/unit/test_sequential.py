"""Sums in float32, one term after another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.numbers import sequential
from prill_harness.numbers.lanes import EXACT
from prill_harness.numbers.sequential import product
from prill_harness.stages.routing import LanePasses


def naive(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Every sum by itself, term after term, in float32."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    out = np.empty((len(a), b.shape[1]), np.float32)
    for row, column in np.ndindex(*out.shape):
        total = a[row, 0] * b[0, column]
        for n in range(1, len(b)):
            total = np.float32(total + np.float32(a[row, n] * b[n, column]))
        out[row, column] = total
    return out.astype(np.float64)


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 99),
    st.sampled_from([8, 64, 512]),
)
def test_terms_are_added_in_order(rows: int, terms: int, columns: int, seed: int, held: int) -> None:
    """However many terms and rows are taken at a time, each sum has the bits of the plain loop."""
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(rows, terms)), random.normal(size=(terms, columns))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequential, "TERMS", held)
        patch.setattr(sequential, "BLOCK", held // 4)
        assert product(a, b).tobytes() == naive(a, b).tobytes()


@pytest.mark.parametrize("shape", [(1, 300, 1), (1, 300, 2), (3, 300, 1), (2, 300, 40)])
def test_long_sums_are_not_added_in_pairs(shape: tuple[int, int, int]) -> None:
    """Hundreds of terms, which NumPy adds in pairs where they lie side by side, are added one by one."""
    rows, terms, columns = shape
    random = np.random.default_rng(7)
    a, b = random.normal(size=(rows, terms)), random.normal(size=(terms, columns))
    got = product(a, b)
    assert got.tobytes() == naive(a, b).tobytes()
    pairs = np.add.reduce(np.ascontiguousarray(a[:, None] * b.T, np.float32), axis=-1)
    assert (got != pairs).any()


@pytest.mark.parametrize("model", ["llama-tiny", "gpt-oss-tiny"])
def test_a_pass_is_that_of_its_draw_whatever_went_before(model: str) -> None:
    """Passes through one model are those through a model of their own, with and without experts."""
    spec, ids = f"fixture:{model}", [1, 5, 9]
    passes = LanePasses(spec, EXACT)
    for draw in (1, 0, 1):
        found, alone = passes.stages(ids, draw), LanePasses(spec, EXACT).stages(ids, draw)
        assert found.keys() == alone.keys()
        assert all(np.array_equal(found[stage], alone[stage]) for stage in alone)
    assert not np.array_equal(passes.stages(ids, 0)["logits"], passes.stages(ids, 1)["logits"])
