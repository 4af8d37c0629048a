"""What goes over a worker's line, values and errors, comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from prill_harness.engines.channels.lines import DTYPES, error_of, packed, told, unpacked
from prill_runtime.errors import (
    ContextLengthExceeded,
    InvalidParameter,
    MissingCapability,
    NotANumber,
    PrillError,
    UsageError,
)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text()
        | st.binary()
        | arrays.arrays(st.sampled_from(DTYPES), arrays.array_shapes(min_dims=1, max_dims=3, min_side=0),
                        elements={"allow_nan": False}),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3).filter(lambda k: k != "base64"), inner, max_size=3),
        max_leaves=6,
    )
)  # fmt: skip
def test_what_is_packed_comes_back(value: object) -> None:
    """Numbers, texts, bytes and arrays of every type go over the line and come back bit for bit."""
    again = unpacked(packed(value))
    same(again, value)


def same(got: object, want: object) -> None:
    if isinstance(want, np.ndarray):
        assert isinstance(got, np.ndarray)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    elif isinstance(want, list):
        assert isinstance(got, list)
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            same(one, other)
    elif isinstance(want, dict):
        assert isinstance(got, dict)
        assert got.keys() == want.keys()
        for key in want:
            same(got[key], want[key])
    else:
        assert got == want


@pytest.mark.parametrize(
    "cls", [ContextLengthExceeded, NotANumber, InvalidParameter, MissingCapability, UsageError]
)
def test_kinds_of_errors_survive(cls: type[PrillError]) -> None:
    """What a worker reports is the same kind of error on this side, with its sentence."""
    error = error_of(told(cls("too long by 3", expected=9, got="12")), "mine, logits")
    assert type(error) is cls
    assert str(error).endswith(" in mine, logits: too long by 3: expected 9, got 12")
