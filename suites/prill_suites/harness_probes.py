"""Dishonest checks, run like any suite, and the status that each deserves."""

from __future__ import annotations

from pathlib import Path

from prill_harness.plan.plan import Plan
from prill_harness.records.evidence import Cell, Record, Status
from prill_harness.run import executor

LONGEST_S = 120.0
PROBES = '''
import pytest
from prill_harness.run.checks import check
from prill_runtime.errors import EngineError, Inconclusive

LAW = dict(kills=("rope_pairing",))

@check("probes.sound", **LAW)
def test_sound(observe):
    observe.saw(1, oracle="itself")

@check("probes.expects", **LAW)
def test_expects(observe):
    observe.saw(1, oracle="itself")
    observe.expect(False, "wrong")

@check("probes.measures", **LAW)
def test_measures(observe):
    observe.saw(1, oracle="itself")
    observe.metric("two", 2.0, at_most=1.0)

@check("probes.not_a_number", **LAW)
def test_not_a_number(observe):
    observe.saw(1, oracle="itself")
    observe.metric("nothing", float("nan"), at_most=1.0)

@check("probes.sees_nothing", **LAW)
def test_sees_nothing(observe):
    """Nothing is done here."""

@check("probes.no_oracle", **LAW)
def test_no_oracle(observe):
    observe.saw(1, oracle="")

@check("probes.skips", **LAW)
def test_skips(observe):
    observe.saw(1, oracle="itself")
    pytest.skip("the model is not there")

@check("probes.expected_to_fail", **LAW)
@pytest.mark.xfail
def test_expected_to_fail(observe):
    observe.saw(1, oracle="itself")
    observe.expect(False, "wrong")

@check("probes.crashes", **LAW)
def test_crashes(observe):
    observe.saw(1, oracle="itself")
    raise RuntimeError("crashed")

@check("probes.sees_seven", **LAW)
def test_sees_seven(observe):
    observe.saw(3, oracle="itself")
    observe.saw(4, oracle="itself")

@check("probes.measures_hardly", **LAW)
def test_measures_hardly(observe):
    observe.saw(1, oracle="itself")
    observe.metric("a hair", 1.0 + 2**-52, at_most=1.0)

@check("probes.measures_less", **LAW)
def test_measures_less(observe):
    observe.saw(1, oracle="itself")
    observe.metric("a hair", 1.0 - 2**-53, at_least=1.0)

@check("probes.measures_other", **LAW)
def test_measures_other(observe):
    observe.saw(1, oracle="itself")
    observe.metric("a hair", 1.0 - 2**-53, equals=1.0)

@check("probes.engine_stops", **LAW)
def test_engine_stops(observe):
    observe.saw(1, oracle="itself")
    raise EngineError("stopped")

@check("probes.several", **LAW)
def test_several(observe):
    observe.saw(1, oracle="itself")
    raise ExceptionGroup("two", [Inconclusive("too noisy"), EngineError("stopped")])

@pytest.fixture
def broken_end():
    yield
    raise OSError("the disk is full")

@check("probes.breaks_at_its_end", **LAW)
def test_breaks_at_its_end(observe, broken_end):
    observe.saw(1, oracle="itself")
'''
DYING = """
import os
from prill_harness.run.checks import check

@check("dying.dies", kills=("rope_pairing",))
def test_dies(observe):
    observe.saw(1, oracle="itself")
    os._exit(0)
"""
OWED = {
    "probes.sound": Status.PASSED,
    "probes.expects": Status.FAILED,
    "probes.measures": Status.FAILED,
    "probes.not_a_number": Status.FAILED,
    "probes.sees_nothing": Status.INCONCLUSIVE,
    "probes.no_oracle": Status.INCONCLUSIVE,
    "probes.skips": Status.INCONCLUSIVE,
    "probes.expected_to_fail": Status.INCONCLUSIVE,
    "probes.crashes": Status.ERROR,
    "probes.sees_seven": Status.PASSED,
    "probes.measures_hardly": Status.FAILED,
    "probes.measures_less": Status.FAILED,
    "probes.measures_other": Status.FAILED,
    "probes.engine_stops": Status.FAILED,
    "probes.several": Status.FAILED,
    "probes.breaks_at_its_end": Status.ERROR,
    "dying.dies": Status.ERROR,
}
SEEN = {"probes.sound": 1, "probes.sees_seven": 7}


def run(folder: Path, engine: str) -> tuple[Record, ...]:
    """The records of all of them, each suite in a cell of its own, gathered as those of any plan."""
    for name, text in (("probes", PROBES), ("dying", DYING)):
        (folder / f"{name}.py").write_text(text, "utf-8")
    cells = tuple(Cell("none", engine, name) for name in ("probes", "dying"))
    return executor.run(Plan("probes", cells, folder=folder), folder / "out", jobs=2, timeout_s=LONGEST_S)
