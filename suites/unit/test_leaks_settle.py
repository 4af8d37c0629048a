"""Stores of CPython and NumPy are at one level at every reading; what a path says, its figures show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.leaks.judge import judge
from prill_harness.leaks.ledgers.ledgers import Book, Series
from prill_harness.leaks.probed import paths
from prill_harness.leaks.reports.report import JudgedSeries, LeakVerdict, Probe
from prill_harness.leaks.reports.verdict import WINDOWS, Rule

from .preloaded import preloaded

BLOCKS = Series("host", "blocks", "blocks", Rule.EXACT)

STORE = """
import sys
import numpy as np
from prill_harness.leaks.ledgers.ledgers import settle
from prill_harness.leaks.ledgers.native import Interposer
it, level = Interposer(), settle.settled if sys.argv[1] == "settled" else settle.freeze
settle.begin()
def at_once(count, sizes):
    held = [np.empty(size, np.uint8) for size in sizes for _ in range(count)]
    level()
read = []
for count in (1, 2, 3, 5, 7, 7, 1):
    at_once(count, (100, 333, 500, 777))
    level()
    read.append(it.totals()[0])
print(len(set(read[1:])))
"""


def test_numpys_store_is_full_at_every_reading() -> None:
    """However many arrays were in use at once the ledger reads the same; unsettled it does not."""
    assert preloaded(STORE, "settled") == "1\n"
    assert int(preloaded(STORE, "collected")) > 1


def book(values: list[int]) -> Book:
    rows = np.array(values, np.int64)[:, None]
    return Book([BLOCKS], rows, np.zeros_like(rows), len(values))


STAIRS = [1000] * 10 + [1000 + call // 8 for call in range(1, 41)]  # 0.125 blocks a call
TWICE = STAIRS + [STAIRS[-1] + call // 8 for call in range(1, 41)]


@pytest.mark.parametrize("step", [2, 3, 50])
def test_what_threads_alone_move_is_no_alarm(step: int) -> None:
    """One block in eight calls is a leak beside a still control, and none beside one that moves as much."""
    still, moves = (
        judge.ControlNoise(book([5] * 42), 3),
        judge.ControlNoise(book([5] * 20 + [5 + step] * 22), 3),
    )
    assert judge.Phase(book(STAIRS), 11, control=still).leaks
    assert judge.Phase(book(STAIRS), 11).leaks
    once = judge.Phase(book(STAIRS), 11, control=moves)
    assert not once.leaks
    assert once.open
    twice = judge.Phase(book(TWICE), 11, doubled=True, control=moves)
    (found,) = [j for j in twice.judged() if j.series == "blocks"]
    assert found.verdict is (LeakVerdict.LEAK if 4 * step <= 10 else LeakVerdict.INCONCLUSIVE)
    if found.verdict is LeakVerdict.INCONCLUSIVE:
        assert f"moved it by {step} blocks" in found.sentence


def test_a_leak_beyond_the_control_is_found() -> None:
    """Three blocks a call stand out of a control that moved by twenty."""
    leak = book([1000] * 10 + [1000 + 3 * call for call in range(1, 41)])
    control = judge.ControlNoise(book([5] * 20 + [25] * 22), 3)
    assert judge.Phase(leak, 11, control=control).leaks


@given(st.lists(st.lists(st.integers(-(10**6), 10**6), min_size=41, max_size=41), min_size=1, max_size=4))
def test_the_sentence_says_what_the_figures_show(series: list[list[int]]) -> None:
    """`no ledger grew` where none did; else each one that did, with its bytes and windows."""
    found = [
        JudgedSeries("host", f"s{n}", "B", LeakVerdict.CLEAN, "", tuple(row), windows=n % WINDOWS, of=WINDOWS)
        for n, row in enumerate(series)
    ]
    said = judge.quiet(found)
    grew = [j for j in found if j.values[-1] > j.values[0]]
    assert ("no ledger grew" in said) == (not grew)
    assert "in 40 calls" in said
    for j in grew:
        assert f"host {j.series} {j.values[-1] - j.values[0]:+d} B in all, in {j.windows} of 5" in said


def test_what_moved_with_distinct_prompts_is_shown_too() -> None:
    """Calls with distinct prompts that moved a series are a series of their own; worse ones replace it."""
    one = JudgedSeries("host", "bytes", "B", LeakVerdict.CLEAN, "", (7, 7))
    moved = JudgedSeries("host", "bytes", "B", LeakVerdict.CLEAN, "", (7, 131159))
    still = JudgedSeries("host", "bytes", "B", LeakVerdict.CLEAN, "", (9, 9))
    doubt = JudgedSeries("host", "bytes", "B", LeakVerdict.INCONCLUSIVE, "a cache?", (7, 99))
    assert judge.with_distinct([one], [still]) == [one]
    assert judge.with_distinct([one], [doubt]) == [doubt]
    first, second = judge.with_distinct([one], [moved])
    assert (first, second.series) == (one, "bytes with distinct prompts")
    assert "host bytes with distinct prompts +131152 B" in judge.quiet([first, second])


def engine_of(vocab: int, context: int, monkeypatch: pytest.MonkeyPatch) -> paths.Path:
    info = SimpleNamespace(config={"vocab_size": vocab, "context_length": context}, capabilities=frozenset())
    engine: Any = SimpleNamespace(info=info)
    monkeypatch.setattr(paths, "opened", lambda spec, model: engine)
    return paths.Success(Probe("any", "any"))


@pytest.mark.parametrize("context", [8, 9, 64, 0])
@pytest.mark.parametrize("vocab", [1, 2, 3, 10, 300, 32000])
def test_prompts_fit_every_vocabulary_and_context(
    vocab: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are in the vocabulary and leave room for three tokens; distinct prompts differ where they can."""
    path = engine_of(vocab, context, monkeypatch)
    prompts = [path.distinct(number) for number in range(11, 200)] if path.varies else []
    assert path.varies == (vocab ** len(path.ids) >= paths.DISTINCT_PROMPTS)
    assert len({tuple(ids) for ids in prompts}) == len(prompts)
    for ids in (path.ids, *prompts):
        assert ids
        assert min(ids) >= 0
        assert max(ids) < vocab
        assert not context or len(ids) + paths.CANCEL_AT <= context
