"""Where a stop string is looked for: over a border of tokens, by whole characters, in any script."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prill_runtime.run.generate import StopStrings
from prill_suites.properties_ends import in_one_token, over_a_border

PIECES = st.lists(
    st.binary(max_size=3) | st.text("ab é日🧪", max_size=3).map(str.encode), min_size=1, max_size=10
)


def stopped(pieces: list[bytes], stop: str) -> int:
    """How many tokens an engine writes that looks for the string in the bytes of its text."""
    watcher = StopStrings([stop])
    return next((n for n, piece in enumerate(pieces, 1) if watcher.push(piece)), len(pieces) + 1)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"ab", b"cd"], ("abcd", 2)),
        ([b"a", b"b", b"c", b"d", b"e", b"f"], ("cdef", 6)),
        (["forêt".encode(), b" vent"], ("êt v", 2)),
        (["河".encode(), "水".encode()], ("河水", 2)),
        ([b"\xe6", b"\xb2\xb3"], ("河", 2)),
        ([b"\xe6", b"\xb2", b"\xb3"], ("河", 3)),
        ([b"x", b"", b"y"], ("xy", 3)),
        ([b"one"], None),
        ([b"\xff", b"\xfe"], None),
        ([b"", b""], None),
    ],
)
def test_the_string_straddles_a_border(pieces: list[bytes], expected: tuple[str, int] | None) -> None:
    """Two characters of each side, one where there are no more, or the one that the border divides."""
    assert over_a_border(pieces) == expected


@given(PIECES)
@example([b"a", b"a", b"a", b"a", b"a", b"a"])
@example(["é".encode(), "é".encode(), b"a", b"b"])
def test_a_matcher_of_bytes_ends_where_the_string_is_expected_to(pieces: list[bytes]) -> None:
    """A string found over a border is in no token alone, and completes exactly at the token it is said to."""
    found = over_a_border(pieces)
    if found is None:
        return
    stop, count = found
    assert stopped(pieces, stop) == count
    assert stopped([b" ", *pieces], stop) == count + 1
    at = b"".join(pieces).find(stop.encode())
    assert at < [0, *accumulate(map(len, pieces))][count - 1]


@given(PIECES)
def test_a_string_in_one_token_ends_there(pieces: list[bytes]) -> None:
    """Where a token is whole characters, its text ends at it and not before."""
    found = in_one_token(pieces)
    if found is None:
        assert not any(p.decode("utf-8", "ignore").encode() == p and p.decode().strip() for p in pieces[:1])
    else:
        assert stopped(pieces, found[0]) == found[1]
