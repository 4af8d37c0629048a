"""The table of request features, and what the rules alone say of a request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prill_suites.requests_table import FEATURES, every_pair, pairs, table
from prill_suites.requests_twins import NEVER, TextOutcome, outcome, shown, spans, stop_strings

PIECES = [b" The", b" caf\xc3", b"\xa9s", b" are", " près".encode(), b" of", b" the river"]
IDS = [4, 9, 2, 7, 9, 1, 3]


def test_every_pair_of_feature_values_occurs() -> None:
    """Each value of a feature meets each of every other in some request; counted by hand, with itertools."""
    sizes = [len(values) for values in FEATURES.values()]
    every = every_pair()
    assert len(every) == (sum(sizes) ** 2 - sum(n * n for n in sizes)) // 2
    requests = list(table())
    met = {
        ((a, request[a]), (b, request[b]))
        for request in requests
        for a in FEATURES
        for b in FEATURES
        if [*FEATURES].index(a) < [*FEATURES].index(b)
    }
    assert met == every
    assert len(requests) < 64


def test_a_pair_counts_only_where_it_can_come_to_pass() -> None:
    """In a request for one token, or none, no stop string meets a callback."""
    many = [request for request in table() if request["tokens"] == "many"]
    covered = set().union(*map(pairs, many))
    assert {pair for pair in every_pair() if "tokens" not in (pair[0][0], pair[1][0])} <= covered
    short = dict.fromkeys(FEATURES, "x") | {"tokens": "1"}
    assert all("tokens" in (a, b) for (a, _), (b, _) in pairs(short))


def test_the_rules() -> None:
    """End, callback, stop string, number asked for: in this order, one token after the other."""

    def said(stops: list[str], most: int, ends: set[int], callback: str = "none") -> TextOutcome:
        return outcome(IDS, PIECES, stops, most, ends, callback)

    assert said([], 0, {4}) == TextOutcome(0, "length")
    assert said([], 1, {9}) == TextOutcome(1, "length", None, 1)
    assert said([], 7, {7, 2}) == TextOutcome(2, "eos", 2, 2)
    assert said(["és"], 7, set()) == TextOutcome(3, "stop", None, 3)
    assert said(["près", "és a"], 4, set()) == TextOutcome(4, "stop", None, 4)
    assert said([" The"], 7, {4}) == TextOutcome(0, "eos", 4, 0)
    assert said(["caf"], 7, set(), "refuses") == TextOutcome(2, "cancelled", None, 2)
    assert said(["The"], 7, set(), "raises") == TextOutcome(1, "stop", None, 1)
    assert said(["caf"], 7, set(), "raises") == TextOutcome(2, "", None, 2, raised=True)


def test_stop_strings_of_every_kind_come_from_the_text() -> None:
    """Each kind is what it is called: in one token, over two, of 17 bytes, beyond ASCII, in the prompt."""
    found = stop_strings(PIECES, "on été".encode())
    text = b"".join(PIECES).decode()
    assert found["none"] == []
    assert any(found["in a token"][0].encode() in piece for piece in PIECES[1:])
    assert found["over tokens"][0] in text
    assert not any(found["over tokens"][0].encode() in piece for piece in PIECES)
    assert len(found["long"][0].encode()) >= 17
    assert found["long"][0] in text
    assert not found["not ASCII"][0].isascii()
    assert found["begun in the prompt"] == ["té T"]
    several = [outcome(IDS, PIECES, [stop], 7, (), "none") for stop in found["several"]]
    assert [each.reason for each in several] == ["length", "stop", "stop", "stop"]
    assert several[-1].count < several[-2].count
    assert NEVER in stop_strings([b"", b""])["not ASCII"]


@given(st.lists(st.binary(max_size=3) | st.text("ab é日", max_size=3).map(str.encode), max_size=8))
def test_a_run_is_in_the_text_where_it_is_said_to_be(pieces: list[bytes]) -> None:
    """Every run occurs first from the first to the last token it names."""
    for first, last, run in spans(pieces):
        done = outcome(range(len(pieces)), pieces, [run], len(pieces), (), "none")
        assert done.reason == "stop"
        assert done.count == last + 1
        assert b"".join(pieces[first : last + 1]).find(run.encode()) >= 0
        assert shown(pieces, [run]) in b"".join(pieces).decode(errors="replace")
