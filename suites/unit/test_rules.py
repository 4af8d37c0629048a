"""Each rule of the gate alone: of a green run, the one change that this rule, and no other, turns down."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from prill_harness.decide.rules import RULES
from prill_harness.faults.trial.kills import Kills
from prill_harness.records.evidence import CellStarted, Evidence, Status
from prill_harness.records.verdict import IncidentResult, IncidentState, Severity, Verdict

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
