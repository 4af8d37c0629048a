"""What a gate does with a probe that could not tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prill_harness.leaks.judge.repeat import RUNS, settled
from prill_harness.leaks.reports.report import LeakVerdict

UNCLEAR, CLEAN, LEAK = LeakVerdict.INCONCLUSIVE, LeakVerdict.CLEAN, LeakVerdict.LEAK


@pytest.mark.parametrize(
    ("verdicts", "runs", "last"),
    [
        ([CLEAN], 1, CLEAN),
        ([LEAK], 1, LEAK),
        ([UNCLEAR, CLEAN], 2, CLEAN),
        ([UNCLEAR, LEAK], 2, LEAK),
        ([UNCLEAR, UNCLEAR, CLEAN], 3, CLEAN),
        ([UNCLEAR] * 9, RUNS, UNCLEAR),
    ],
)
def test_only_what_is_unclear_is_asked_again(
    verdicts: list[LeakVerdict], runs: int, last: LeakVerdict
) -> None:
    """A verdict ends the asking, a leak at the first; three runs that cannot tell stay inconclusive."""
    asked: list[str] = []

    def run(wanted: str) -> Any:
        asked.append(wanted)
        return SimpleNamespace(verdict=verdicts[len(asked) - 1])

    assert settled(run, "probe").verdict is last
    assert asked == ["probe"] * runs
