"""The walk of failed allocations: all of them in a library of C, as many as fit elsewhere, and it says so."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.leaks.judge.probe import run
from prill_harness.leaks.probed import walk
from prill_harness.leaks.reports import curves
from prill_harness.leaks.reports.report import LeakVerdict, LoadWalk, PathReport, Probe

from .preloaded import preloaded


@pytest.fixture(autouse=True)
def _no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended load leaves none, and collecting that of the tests takes most of their time."""
    monkeypatch.setattr(walk, "settled", lambda: None)


class FakeInterposer:
    """Stands for the preloaded library: a load of known allocation sizes, and what its failures leave."""

    def __init__(self, sizes: list[int], leaves: Callable[[int], int] = lambda nth: 0) -> None:
        self.sizes, self._leaves = sizes, leaves
        self.failed: list[int] = []
        self._held = self._nth = self._least = self._hit = 0

    def load(self) -> None:
        candidates = [size for size in self.sizes if size >= self._least]
        if 0 < self._nth <= len(candidates):
            self._hit = 1
            self.failed.append(self._nth)
            self._held += self._leaves(self._nth)
            raise MemoryError

    @contextmanager
    def failing(self, nth: int, *, least: int = 0) -> Iterator[list[int]]:
        self._nth, self._least, self._hit = nth, least, 0
        seen: list[int] = []
        try:
            yield seen
        finally:
            seen += [sum(size >= least for size in self.sizes), self._hit, 0]
            self._nth = 0

    failed_at = "load in libpretended.so+0x10"

    def attribute(self) -> None:
        """The pretended load calls no library."""

    def last_word(self) -> None:
        """It does not die."""

    def totals(self) -> tuple[int, int, int]:
        return 0, self._held, 0


def walked(fake: Any, least: int = 0, **more: float) -> tuple[LeakVerdict, LoadWalk]:
    judged, done = walk.walk_over(fake.load, fake, least, **more)
    return judged.verdict, done


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 24, 100, 151, 859])
def test_every_allocation_is_chosen_once(total: int) -> None:
    """The order is a permutation of 1 to the total."""
    assert sorted(walk.spread(total)) == list(range(1, total + 1))


@pytest.mark.parametrize("total", [151, 859, 7770])
def test_any_first_part_is_spread(total: int) -> None:
    """After n choices no gap is more than three times as long as equal spacing would leave."""
    order = list(walk.spread(total))
    for n in (8, 24, 60, 120):
        stops = [0, *sorted(order[:n]), total]
        assert max(b - a for a, b in itertools.pairwise(stops)) <= 3 * total / n + 1


def test_without_a_limit_all_are_failed() -> None:
    """As for a library of C: each of 300 allocations fails, and the report says 300 of 300."""
    fake = FakeInterposer([16] * 300)
    verdict, done = walked(fake)
    assert verdict is LeakVerdict.CLEAN
    assert set(fake.failed) == set(range(1, 301))
    assert (done.failed, done.of, done.smaller) == (300, 300, 0)
    assert done.sentence.startswith("300 of the 300 allocations of a load failed in turn: nothing remained")


def test_small_ones_are_counted_and_not_failed() -> None:
    """Where Python allocates only large allocations fail; how many smaller ones there are is part of it."""
    fake = FakeInterposer([16] * 90 + [8192] * 10)
    verdict, done = walked(fake, 4096)
    assert verdict is LeakVerdict.CLEAN
    assert (done.failed, done.of, done.least, done.smaller) == (10, 10, 4096, 90)
    assert "10 of the 10 allocations of 4096 bytes and more" in done.sentence
    assert "its 90 smaller allocations were not failed" in done.sentence


def test_when_time_is_over_the_report_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand allocations as many are failed as fit into the time, spread over the load."""
    clock = iter(range(10**6))
    monkeypatch.setattr(walk.time, "monotonic", lambda: next(clock))
    fake = FakeInterposer([8192] * 1000)
    verdict, done = walked(fake, 4096, budget_s=50)
    assert verdict is LeakVerdict.CLEAN
    assert (done.failed, done.of) == (50, 1000)
    assert "50 of the 1000 allocations of 4096 bytes and more of a load, spread over it," in done.sentence
    assert min(fake.failed) <= 40
    assert max(fake.failed) >= 960


def test_a_load_longer_than_the_time_is_failed_once() -> None:
    """However long one load takes an allocation is failed, and one of how many is said."""
    verdict, done = walked(FakeInterposer([8192] * 10), budget_s=-1)
    assert verdict is LeakVerdict.CLEAN
    assert (done.failed, done.of) == (1, 10)


def test_a_load_that_allocates_nothing_is_inconclusive() -> None:
    """A walk that failed nothing claims nothing."""
    assert walked(FakeInterposer([]))[0] is LeakVerdict.INCONCLUSIVE


@given(st.integers(1, 20), st.integers(1, 4096))
def test_a_store_that_fills_is_no_leak(entries: int, size: int) -> None:
    """What the first failures leave, be it at each of twenty, and later ones do not, is a cache."""
    left = itertools.chain([size] * entries, itertools.repeat(0))
    fake: Any = FakeInterposer([8192] * 3, lambda nth: next(left) if nth == 2 else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "settled", lambda: None)
        judged, done = walk.walk_over(fake.load, fake, 4096)
    assert judged.verdict is LeakVerdict.CLEAN, judged.sentence
    assert done.filled == (entries > walk.SUSPECT)
    assert ("1 filled a store that has an end" in done.sentence) == bool(done.filled)


@given(st.integers(1, 4096))
def test_what_stays_each_time_is_a_leak(size: int) -> None:
    """The same beside a store that fills: what grows on once that is full is found, with its size."""
    left = itertools.chain([size + 64] * 6, itertools.repeat(size))
    fake: Any = FakeInterposer([8192] * 3, lambda nth: next(left) if nth == 2 else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "settled", lambda: None)
        judged, _ = walk.walk_over(fake.load, fake, 4096)
    assert judged.verdict is LeakVerdict.LEAK
    assert f"leaves {size} B behind each time" in judged.sentence


def test_one_leaking_failure_among_many_is_found() -> None:
    """Only the failure of the 77th of 151 allocations leaves 24 bytes: found, with its number and frames."""
    fake: Any = FakeInterposer([8192] * 151, lambda nth: 24 * (nth == 77))
    judged, _ = walk.walk_over(fake.load, fake, 4096)
    assert judged.verdict is LeakVerdict.LEAK
    assert judged.sentence.startswith("host: a load whose allocation 77 of 151, load (test_leaks_walk.py:")
    assert judged.sentence.endswith("load in libpretended.so+0x10, fails leaves 24 B behind each time")


def test_a_load_that_breaks_afterwards_is_broken() -> None:
    """After the third failed allocation no load works any more."""

    class Breaks(FakeInterposer):
        def load(self) -> None:
            if 3 in self.failed:
                raise RuntimeError("still locked")
            super().load()

    fake: Any = Breaks([8192] * 5)
    judged, _ = walk.walk_over(fake.load, fake)
    assert judged.verdict is LeakVerdict.BROKEN
    assert judged.sentence.endswith("failed the next load breaks: still locked")
    assert "allocation 3 of 5, load (test_leaks_walk.py:" in judged.sentence


def test_a_library_of_c_is_walked_whole_and_evidence_says_so() -> None:
    """A real probe of the control library: every allocation of its load failed, and the evidence has it."""
    report = run(Probe("control:", "none", "load"))
    assert report.verdict is LeakVerdict.CLEAN, report.sentence
    assert report.walk is not None
    assert report.walk.failed == report.walk.of > 3
    assert (report.walk.least, report.walk.smaller) == (0, 0)
    assert curves.noted(report)["failed allocations"]["of"] == report.walk.of


DRIVER = """
#include <stdlib.h>
#include <string.h>
void *volatile kept;
int driver_open(void) { /* forgets 1512 bytes when it is refused memory, or libc for it */
    void *state = malloc(1512), *buffer = malloc(8192);
    char *text = buffer ? strndup((char *)memset(buffer, 'x', 8192), 6000) : 0;
    if (!text) { kept = state; free(buffer); return 1; }
    free(text); free(buffer); free(state);
    return 0;
}
"""

ENGINE = """
import ctypes, sys
from prill_harness.leaks.ledgers import owners; from prill_harness.leaks.probed import walk
from prill_harness.leaks.ledgers.native import Interposer
driver = ctypes.CDLL(sys.argv[1])
if sys.argv[2] == "fail": owners.DRIVERS = ("libother",)
def load():
    own = bytearray(10000)
    if driver.driver_open(): raise MemoryError
judged, walked = walk.walk_over(load, Interposer(), 4096)
print(judged.verdict.value, walked.failed, walked.of, walked.spared, judged.sentence)
"""


@pytest.mark.parametrize("driver", ["spared", "fail"])
def test_what_a_gpus_driver_forgets_is_not_the_engines(tmp_path: Path, driver: str) -> None:
    """A real library by the driver's name leaks when it is refused memory, itself or libc for it: not failed.

    By another name the same library is failed, and its leak is found.
    """
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text(DRIVER)
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    said = preloaded(ENGINE, str(library), driver)
    verdict, failed, of, spared, *_ = said.split()
    if driver == "fail":
        assert verdict == "leak"
        assert "leaves 1528 B behind" in said or "leaves 1512 B behind" in said
        return
    assert (verdict, failed, spared) == ("clean", of, "2")
    assert int(of) >= 1
    assert "nor were 2 that libraries made for themselves" in said


def test_a_path_without_a_walk_notes_none() -> None:
    """Evidence of other paths has no word about failed allocations."""
    assert "failed allocations" not in curves.noted(PathReport("success", LeakVerdict.CLEAN, ""))
