"""What a suite writes: the marker names its kill, and the observer lets nothing pass unseen."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prill_harness.records.sources import judging
from prill_harness.run.checks import CheckFailed, Observer, check, content_hash


def test_a_check_names_a_fault_that_it_kills() -> None:
    """A check without a planted fault cannot be declared."""
    with pytest.raises(ValueError, match="kills"):
        check("a.b", kills=())
    mark = check("a.b", kills=("x",), oracle="numpy64")
    assert mark.mark.kwargs == {"name": "a.b", "kills": ("x",), "needs": (), "oracle": "numpy64"}  # type: ignore[attr-defined]


def test_an_observer_adds_what_it_saw() -> None:
    """Counts add up and the oracle is kept; a new observer has seen nothing."""
    observer = Observer()
    assert (observer.observed, observer.oracle) == (0, "")
    observer.saw(2, oracle="a")
    observer.saw(3, oracle="a")
    assert (observer.observed, observer.oracle) == (5, "a")


@pytest.mark.parametrize(
    ("value", "bound"),
    [
        (2.0, {"at_most": 1.0}),
        (0.0, {"at_least": 1.0}),
        (0.0, {"equals": 1.0}),
        (math.nan, {"at_most": 1.0}),
        (math.inf, {"at_least": 1.0}),
        (np.float32("nan"), {}),
    ],
)
def test_a_figure_out_of_bound_fails_and_is_kept(value: float, bound: dict[str, float]) -> None:
    """Out of bound, NaN or infinite: the check fails with the figures, and the metric is kept."""
    observer = Observer()
    with pytest.raises(CheckFailed, match="kl: expected"):
        observer.metric("kl", value, **bound)
    assert len(observer.metrics) == 1
    with pytest.raises(CheckFailed, match="my sentence"):
        observer.metric("kl", value, **bound, otherwise="my sentence")


def test_a_figure_within_its_bound_is_kept() -> None:
    """At the bound exactly, the figure holds."""
    observer = Observer()
    observer.metric("kl", 1.0, at_most=1.0)
    observer.metric("top1", np.float64(1), at_least=np.float32(1))
    observer.metric("n", 3, equals=3)
    assert [(type(m.value), m.relation) for m in observer.metrics] == [(float, r) for r in ("<=", ">=", "==")]
    assert type(observer.metrics[1].bound) is float


@pytest.mark.parametrize("bound", [math.inf, math.nan])
def test_a_bound_that_decides_nothing_is_refused(bound: float) -> None:
    """An infinite bound would pass everything, so it is the check's own error."""
    with pytest.raises(ValueError, match="decides nothing"):
        Observer().metric("kl", 1.0, at_most=bound)


def test_expect_fails_with_its_sentence_and_detail() -> None:
    """A false condition fails and leaves its detail; a true one leaves nothing."""
    observer = Observer()
    observer.expect(True, "no", row=1)
    assert observer.detail == {}
    with pytest.raises(CheckFailed, match="row 1 differs"):
        observer.expect(False, "row 1 differs", row=np.int64(1))
    assert observer.detail == {"row": 1}
    assert type(observer.detail["row"]) is int


def test_the_content_hash_follows_the_code_that_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two functions of one module differ, one function is stable, and a judge's text takes part."""
    first = content_hash(test_an_observer_adds_what_it_saw)
    assert first == content_hash(test_an_observer_adds_what_it_saw)
    assert first != content_hash(test_a_check_names_a_fault_that_it_kills)
    texts = dict(judging(Path(__file__)))
    monkeypatch.setattr("prill_harness.run.checks.judging", lambda suite: texts)
    assert first == content_hash(test_an_observer_adds_what_it_saw)
    texts["prill_harness.run.outcomes"] += b"\n"
    assert first != content_hash(test_an_observer_adds_what_it_saw)


def test_the_hash_of_a_check_is_the_same_in_every_process() -> None:
    """A suite and a judge may share a file name; the order they are hashed in may not depend on chance."""
    code = (
        "from prill_suites.tokens import test_greedy as check; "
        "from prill_harness.run.checks import content_hash; print(content_hash(check))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(6)
    }
    assert len(seen) == 1
    assert len(seen.pop().strip()) == 64
