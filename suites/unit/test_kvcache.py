"""The KV cache holds what was committed, nothing else, and never more than its capacity."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from prill_runtime.errors import ContextLengthExceeded, InvalidParameter
from prill_runtime.models.cache import KVCache


def rows(n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, 2, 3)).astype(np.float32)


def filled(n: int, capacity: int = 8) -> tuple[KVCache, NDArray[np.float32], NDArray[np.float32]]:
    cache, k, v = KVCache(2, 2, 3, capacity, np.float32), rows(n), rows(n, 1)
    for layer in range(2):
        cache.append(layer, k + layer, v + layer)
    cache.commit()
    return cache, k, v


def test_what_goes_in_comes_out() -> None:
    """Rows come back per head in order, keys and values apart, layers apart, across several appends."""
    cache, k, v = filled(5)
    more = rows(3, 2)
    for layer in range(2):
        cache.append(layer, more, -more)
        keys, values = cache.view(layer)  # the pass sees its own rows before the commit
        np.testing.assert_array_equal(keys.transpose(1, 0, 2), np.concatenate([k + layer, more]))
        np.testing.assert_array_equal(values.transpose(1, 0, 2), np.concatenate([v + layer, -more]))
    assert cache.length == 5
    cache.commit()
    assert cache.length == 8


def test_a_full_cache_refuses_before_it_writes() -> None:
    """One row too many raises with needed and available, and changes neither length nor contents."""
    cache, _, _ = filled(6)
    before = [array.copy() for array in cache.view(0)]
    with pytest.raises(ContextLengthExceeded, match=r"at most 8 positions, got 6 .* 3 new ones, 9 needed"):
        cache.append(0, rows(3, 3), rows(3, 4))
    assert cache.length == 6
    for array, kept in zip(cache.view(0), before, strict=True):
        np.testing.assert_array_equal(array, kept)
    cache.append(0, rows(2, 3), rows(2, 4))
    with pytest.raises(ContextLengthExceeded):
        cache.append(0, rows(1), rows(1))


def test_rollback_forgets_half_a_pass() -> None:
    """Rows that only some layers received cannot be committed; rolled back, the cache is as before."""
    cache, k, _ = filled(4)
    cache.append(0, rows(2, 5), rows(2, 6))
    with pytest.raises(InvalidParameter, match=r"different numbers of new rows.*\[2, 0\]"):
        cache.commit()
    assert cache.length == 4
    cache.rollback()
    np.testing.assert_array_equal(cache.view(0)[0].transpose(1, 0, 2), k)


def test_a_pass_that_wrote_by_itself_says_how_many_rows() -> None:
    """Rows that a captured graph wrote count as appended ones do, up to the capacity."""
    cache = KVCache(2, 2, 3, 8, np.float32, offset=10)
    cache.commit(5)
    assert (cache.length, cache.position) == (5, 15)
    with pytest.raises(ContextLengthExceeded):
        cache.commit(4)
    assert (cache.length, cache.view(1)[0].shape) == (5, (2, 5, 3))


def test_nobody_else_counts() -> None:
    """A length cannot be set from outside."""
    cache, _, _ = filled(2)
    with pytest.raises(AttributeError):
        cache.length = 3  # type: ignore[misc]


def test_truncate_and_clear() -> None:
    """Truncation keeps the first rows bit for bit; clear keeps none; neither accepts more than there is."""
    cache, k, _ = filled(5)
    cache.truncate(2)
    assert cache.length == 2
    np.testing.assert_array_equal(cache.view(1)[0].transpose(1, 0, 2), k[:2] + 1)
    for wrong in (-1, 3):
        with pytest.raises(InvalidParameter, match="a length of 0 to 2"):
            cache.truncate(wrong)
    cache.append(0, rows(1), rows(1))
    cache.truncate(2)  # uncommitted rows are gone, too
    assert cache.view(0)[0].shape == (2, 2, 3)
    cache.clear()
    assert cache.length == 0
    assert cache.view(0)[0].shape == (2, 0, 3)


def test_bytes_are_what_the_shape_says() -> None:
    """2 · layers · heads · capacity · dimension · item size, from the start, whatever the length is."""
    cache = KVCache(3, 2, 5, 7, np.float64)
    assert cache.nbytes == 2 * 3 * 2 * 5 * 7 * 8
    assert cache.dtype == np.float64


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int, int]) -> None:
    """A cache without layers, heads, dimension or room is a mistake, said in one sentence."""
    with pytest.raises(InvalidParameter, match="at least 1"):
        KVCache(*sizes, np.float32)


def test_a_cache_beyond_memory_is_a_sentence() -> None:
    """An impossible size is an error of the caller, not a traceback from NumPy."""
    with pytest.raises(InvalidParameter, match="does not fit into memory"):
        KVCache(1 << 20, 1 << 10, 1 << 10, 1 << 20, np.float32)
