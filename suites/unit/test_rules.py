"""Each rule of the gate alone: of a green run, the one change that this rule, and no other, turns down."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from prill_harness.decide.rules import RULES
from prill_harness.faults.trial.kills import Kills
from prill_harness.records.evidence import CellStarted, Evidence, Record, Status
from prill_harness.records.verdict import IncidentResult, IncidentState, Severity, SpeedResult, Verdict

from .test_gate import (
    ALL,
    CELLS,
    CHECKS,
    EXCUSABLE,
    FAILURE,
    KILLS,
    checklist,
    decide,
    item,
    record,
    waiver,
    whole,
)

NOISY = {("gpt", "tokens.exact"): (Status.INCONCLUSIVE, "noisy")}
BROKE = {("gpt", "tokens.exact"): (Status.ERROR, "boom")}
# The item of `tokens.exact` does not block, so that what becomes of the check is left to the rule under test.
LOW = checklist(
    item("demo.exact", "tokens.exact", severity=Severity.LOW), item("demo.greedy", "tokens.greedy")
)
NONE_BLOCKS = checklist(item("demo.exact", "tokens.exact", severity=Severity.LOW))
ONE = checklist(item("demo.greedy", "tokens.greedy"))
EVERYTHING = {(cell.model, "tokens.exact"): (Status.FAILED, "KL is above 1") for cell in CELLS}


def unplanned() -> Verdict:
    return decide([*whole(), record(CELLS[0], "tokens.extra")])


def another_file() -> Verdict:
    other = msgspec.structs.replace(CELLS[1], device="cuda")
    records = [
        msgspec.structs.replace(r, versions=r.versions | {"model_sha256": "another"})
        if isinstance(r, CellStarted) and r.cell == other
        else r
        for r in whole(cells=(*CELLS, other))
    ]
    return decide(records, cells=(*CELLS, other))


def contradicting() -> Verdict:
    again = record(CELLS[0], "tokens.exact", Status.FAILED, "sometimes")
    return decide([*whole(), again], lists=LOW)


def owing(check: str) -> Kills:
    return msgspec.structs.replace(KILLS, owed={"of_old": (check,)})


def incident(severity: str, state: str = "open") -> IncidentResult:
    return IncidentResult(
        severity, Severity(severity), "cache", "wrong text after a cancel", IncidentState(state), "2026-05-01"
    )


def on_record(values: int) -> Kills:
    """The checks of one cell on record with so many values; they observe five."""
    return msgspec.structs.replace(KILLS, observed={CELLS[0].id: {"tokens.exact": values}})


def leaking(slope: float, verdict: str = "leak") -> list[Record]:
    """A run in which a check failed by a leak of so many bytes a call, written down as `memory` does."""
    curve = {"unit": "B", "verdict": verdict, "slope": slope}
    detail = {"curves": [curve, curve | {"slope": slope / 2}, curve | {"unit": "blocks", "slope": 99}]}
    records = whole(FAILURE)
    place = next(n for n, r in enumerate(records) if isinstance(r, Evidence) and r.status is Status.FAILED)
    records[place] = msgspec.structs.replace(records[place], detail=detail)
    return records


def speed(low: float, high: float, engine: str = "numpy") -> SpeedResult:
    return SpeedResult(engine, "llama", "decode", (low + high) / 2, low, high)


def measured(*speeds: SpeedResult) -> Verdict:
    return decide(whole(), performance_budget=10.0, speeds=speeds)


ALONE: dict[str, tuple[Callable[[], Verdict], Callable[[], Verdict]]] = {
    # rule: (what it alone turns down, the nearest run that it lets through)
    "items": (
        lambda: decide(whole(FAILURE), waivers=(waiver(),)),
        lambda: decide(whole(FAILURE), lists=EXCUSABLE, waivers=(waiver(),)),
    ),
    "proof": (
        lambda: decide(whole(FAILURE), lists=NONE_BLOCKS),
        lambda: decide(whole(FAILURE), lists=LOW),
    ),
    "unclaimed": (lambda: decide(whole(FAILURE), lists=ONE), lambda: decide(whole(), lists=ONE)),
    "cells": (unplanned, lambda: decide(whole())),
    "errors": (lambda: decide(whole(BROKE), lists=LOW), lambda: decide(whole(), lists=LOW)),
    "inconclusive": (
        lambda: decide(whole(NOISY), lists=LOW),
        lambda: decide(whole(NOISY), lists=LOW, max_inconclusive=1),
    ),
    "flaky": (
        contradicting,
        lambda: decide(
            [*whole(), record(CELLS[0], "tokens.exact", Status.FAILED, "sometimes")], lists=LOW, max_flaky=1
        ),
    ),
    "incidents": (
        lambda: decide(whole(), incidents=(incident("high"),), incidents_block_at=Severity.HIGH),
        lambda: decide(whole(), incidents=(incident("high"), incident("critical", "closed"))),
    ),
    "executed": (
        lambda: decide(whole(EVERYTHING), lists=EXCUSABLE, waivers=(waiver(),), minimum_executed=3),
        lambda: decide(whole(EVERYTHING), lists=EXCUSABLE, waivers=(waiver(),), minimum_executed=2),
    ),
    "provenance": (another_file, lambda: decide(whole())),
    "kills": (lambda: decide(whole(), kills=Kills()), lambda: decide(whole())),
    "owed": (
        lambda: decide(whole(), kills=owing("tokens.exact")),
        lambda: decide(whole(), kills=owing("ops.of_another_gate")),
    ),
    "observed": (lambda: decide(whole(), kills=on_record(6)), lambda: decide(whole(), kills=on_record(5))),
    "leaks": (
        lambda: decide(leaking(17), lists=EXCUSABLE, waivers=(waiver(),), leak_budget=16),
        lambda: decide(leaking(16), lists=EXCUSABLE, waivers=(waiver(),), leak_budget=16),
    ),
    "performance": (lambda: measured(speed(1.11, 1.2)), lambda: measured(speed(1.0, 1.1))),
    "documents": (
        lambda: decide(whole(), documents=("README.md", "a.md"), there=("README.md",)),
        lambda: decide(whole(), documents=("README.md", "a.md"), there=("README.md", "a.md")),
    ),
    "waivers": (
        lambda: decide(whole(), waivers=(waiver(),), never_waive=frozenset({"demo.exact"})),
        lambda: decide(whole(), waivers=(waiver(),)),
    ),
}


def broken(found: Verdict) -> list[str]:
    return [rule.id for rule in found.rules if rule.status is not Status.PASSED]


@pytest.mark.parametrize("name", RULES)
def test_each_rule_alone_keeps_a_gate_shut(name: str) -> None:
    """One change breaks this rule and no other, and the gate is not green; without the change it is."""
    wrong, right = (run() for run in ALONE[name])
    assert broken(wrong) == [name]
    assert wrong.exit_code in (1, 10)
    assert name in wrong.sentence or wrong.rules[list(RULES).index(name)].sentence in wrong.sentence
    assert (broken(right), right.exit_code) == ([], 0)


def test_the_sample_run_is_whole() -> None:
    """What the cases above change is a run of every check in every cell, all of it passed."""
    records = [r for r in whole() if isinstance(r, Evidence)]
    assert len(records) == len(CELLS) * len(CHECKS)
    assert broken(decide(whole(), lists=ALL)) == []


def test_a_warning_is_shown_and_holds_no_gate_shut() -> None:
    """A failed item that warns lets a gate through that its severity would hold shut; one that could not be
    looked at does not."""
    exact, greedy = item("demo.exact", "tokens.exact"), item("demo.greedy", "tokens.greedy")
    lists = checklist(msgspec.structs.replace(exact, warns=True), greedy)
    found = decide(whole(FAILURE), lists=lists)
    assert (found.exit_code, [i.status.value for i in found.items]) == (0, ["failed", "proven"])
    assert decide(whole(FAILURE), lists=checklist(exact, greedy)).exit_code == 1
    assert decide(whole(NOISY), lists=lists, max_inconclusive=1).exit_code == 10


def test_an_open_critical_incident_is_waited_for_by_every_policy() -> None:
    """Whatever the policy says, and a fix seen to work is not yet closed; a high one only by policy."""
    for state in ("open", "fixed"):
        found = decide(whole(), incidents=(incident("critical", state),))
        assert (broken(found), found.exit_code) == (["incidents"], 1)
        assert f"incident critical (critical, cache) is {state} since 2026-05-01" in found.sentence
    many = tuple(incident(severity) for severity in ("low", "high", "critical"))
    assert "incident critical" in decide(whole(), incidents=many, incidents_block_at=Severity.LOW).sentence
    assert decide(whole(), incidents=many[:2]).exit_code == 0
    assert len(decide(whole(), incidents=many[:2]).incidents) == 2


@pytest.mark.parametrize(
    ("speeds", "code", "told"),
    [
        ((), 10, "numpy was not measured: `prill bench --engine numpy --model MODEL --baseline FILE"),
        ((speed(0.9, 1.0, "cuda"),), 10, "numpy was not measured"),
        ((speed(1.05, 1.15),), 10, "decode of numpy on llama takes 1.100 times its baseline's time (1.050"),
        ((speed(0.5, 0.6), speed(1.2, 1.3), speed(1.05, 1.15)), 1, "(1.200 to 1.300), at most 1.1 allowed"),
        ((speed(0.9, 1.05),), 0, "passed"),
    ],
)
def test_what_was_not_measured_or_is_noisy_is_inconclusive(
    speeds: tuple[SpeedResult, ...], code: int, told: str
) -> None:
    """A budget without a measurement, one of another engine, and an interval that reaches across it prove
    nothing; what is wholly beyond it fails, and is named before what is only noisy."""
    found = measured(*speeds)
    assert found.exit_code == code
    assert told in found.sentence


def test_a_leak_budget_that_nothing_was_measured_for_is_inconclusive() -> None:
    """No curve, no proof; and what was measured and found clean leaks nothing, whatever its slope."""
    assert "no check measured" in decide(whole(), leak_budget=0).sentence
    clean = decide(leaking(17, "clean"), lists=EXCUSABLE, waivers=(waiver(),), leak_budget=0)
    assert (broken(clean), clean.exit_code) == ([], 0)
