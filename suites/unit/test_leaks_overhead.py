"""What the preloaded ledger adds to a decode loop: told from noise, and over its bar where it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prill_harness.leaks.ledgers import build
from prill_harness.leaks.selftest import overhead


def timed(monkeypatch: pytest.MonkeyPatch, plain: Iterator[float], preloaded: Iterator[float]) -> None:
    monkeypatch.setattr(build, "interposer", lambda: Path(__file__))  # any file that can be opened
    monkeypatch.setattr(overhead, "_timed", lambda extra, files=(): next(preloaded if extra else plain))


def test_a_ledger_that_costs_a_tenth_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that agree are believed after one round, whatever their ratio is."""
    timed(monkeypatch, iter([1.0] * 5), iter([1.1] * 5))
    cost = overhead.measured(quick=True)
    assert (cost.holds, cost.pairs) == (False, 5)
    assert cost.sentence.startswith("+10.0 %")


def test_noise_is_timed_again_until_two_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops that are all disturbed say nothing: neither that the bar holds nor that it does not."""
    disturbed = [1.2, 1.4, 1.5, 1.7, 1.9]
    timed(monkeypatch, iter(disturbed + [1.0] * 5), iter([*disturbed, *[1.08] * 5]))
    cost = overhead.measured(quick=True)
    assert (cost.holds, cost.pairs) == (False, 10)
    timed(monkeypatch, iter(disturbed + [1.0] * 5), iter([1.3] * 5 + [1.01] * 5))
    cost = overhead.measured(quick=True)
    assert (cost.holds, cost.pairs) == (True, 10)


def test_noise_without_an_end_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """After three rounds the fastest of each are what there is."""
    times = [1 + n / 10 for n in range(15)]
    timed(monkeypatch, iter(times), iter(times))
    assert overhead.measured(quick=True).pairs == 15
