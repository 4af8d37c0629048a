"""The metrics of a sprint and its days, computed from a verdict, the history of gates and lint findings."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from prill_harness.incidents.history import HistoryLine
from prill_harness.incidents.lint import LintFindings
from prill_harness.records.evidence import Status
from prill_harness.records.names import base_of, suite_of
from prill_harness.records.verdict import CheckResult, IncidentResult, IncidentState, Severity, Verdict

BLOCKING = (Severity.CRITICAL, Severity.HIGH)  # of these a sprint ends with none
OF_LIBRARIES = "boundary.memory_returned"
OF_THE_PROBE = ("memory.counters", "memory.probe_sees")  # the suite's checks of what looks for leaks
NOT_SEEN = (Status.ERROR, Status.INCONCLUSIVE)


@dataclass(frozen=True)
class Measure:
    """One metric. `met` is None where nothing was observed, or nothing is asked for (no `goal`)."""

    name: str
    goal: str
    measured: str
    met: bool | None


@dataclass(frozen=True)
class SprintDay:
    """One day: its gates, what its last one saw of each check at worst, and incidents.

    `unsolved` is what was open when the last gate ran, in words; all of a day without a gate is empty.
    """

    day: dt.date
    gates: int
    passed: int
    failed: int
    other: int
    opened: int
    closed: int
    unsolved: str


def measures(verdict: Verdict, lint: LintFindings | None) -> list[Measure]:
    """The seed's quantitative metrics, each from what was observed."""
    return [
        *(_open(verdict.incidents, severity) for severity in Severity),
        _closed(verdict.incidents),
        _regressions(verdict),
        _passed(verdict),
        _none("flaky checks", len(verdict.flaky), len(verdict.checks), "checks"),
        _leaks(verdict.checks),
        Measure("lint findings", "0", "not observed; name a SARIF file with --lint", None)
        if lint is None
        else Measure("lint findings", "0", f"{lint.count} by {', '.join(lint.tools)}", lint.count == 0),
    ]


def _open(incidents: Sequence[IncidentResult], severity: Severity) -> Measure:
    count = sum(i.severity is severity and i.state is not IncidentState.CLOSED for i in incidents)
    asked = severity in BLOCKING
    return Measure(
        f"open incidents, {severity}", "0" if asked else "", str(count), count == 0 if asked else None
    )


def _closed(incidents: Sequence[IncidentResult]) -> Measure:
    closed = sum(i.state is IncidentState.CLOSED for i in incidents)
    told = f"{closed} of {len(incidents)}" if incidents else "none is on record"
    return Measure("incidents fixed and closed", "all", told, closed == len(incidents) if incidents else None)


def _regressions(verdict: Verdict) -> Measure:
    """Each closed incident has a regression check; what counts is that it was seen to pass here."""
    closed = [i for i in verdict.incidents if i.state is IncidentState.CLOSED]
    seen = [_worst(verdict.checks, incident.regression) for incident in closed]
    told = f"{seen.count(Status.PASSED)} of {len(closed)} passed in this gate"
    if outside := seen.count(None):
        told += f", {outside} it does not run"
    lost = any(status not in (Status.PASSED, None) for status in seen)
    met = False if lost else True if closed and None not in seen else None
    return Measure("regression checks of closed incidents", "all", told if closed else "none is closed", met)


def _worst(checks: Sequence[CheckResult], name: str) -> Status | None:
    """The first status of a check that is not passed, PASSED where every cell passed it, None without any."""
    mine = [c.status for c in checks if name in (c.check, base_of(c.check))]
    return next((status for status in mine if status is not Status.PASSED), mine[0] if mine else None)


def _passed(verdict: Verdict) -> Measure:
    """Of what was planned, so that a cell that is lost counts; at least what was reported."""
    passed = sum(check.status is Status.PASSED for check in verdict.checks)
    lost = sum(cell.status == "missing" for cell in verdict.cells)
    owed = max(sum(cell.planned for cell in verdict.cells), len(verdict.checks))
    if not owed:
        return Measure("checks passed", "100 %", "no check ran", None)
    told = f"{passed} of {owed}, {100 * passed / owed:.1f} %" + (
        f"; {lost} cells are missing" if lost else ""
    )
    return Measure("checks passed", "100 %", told, passed == owed and not lost)


def _leaks(checks: Sequence[CheckResult]) -> Measure:
    looked = [c for c in checks if _about_leaks(c) and c.status not in NOT_SEEN]
    return _none(
        "memory leaks", sum(c.status is not Status.PASSED for c in looked), len(looked), "leak checks"
    )


def _about_leaks(check: CheckResult) -> bool:
    return check.base == OF_LIBRARIES or (
        suite_of(check.check) == "memory" and check.base not in OF_THE_PROBE
    )


def _none(name: str, found: int, looked: int, what: str) -> Measure:
    if not looked:
        return Measure(name, "0", f"not observed: no {what} ran", None)
    return Measure(name, "0", f"{found} in {looked} {what}", found == 0)


def days(verdict: Verdict, runs: Sequence[HistoryLine]) -> list[SprintDay]:
    """The days on which a gate ran, or an incident was opened or closed; the latest first."""
    opened = [dt.date.fromisoformat(i.opened) for i in verdict.incidents]
    closed = [dt.date.fromisoformat(i.closed) for i in verdict.incidents if i.closed]
    every = sorted({*opened, *closed, *(run.day for run in runs)}, reverse=True)
    return [
        _day(day, [r for r in runs if r.day == day], opened.count(day), closed.count(day)) for day in every
    ]


def _day(day: dt.date, runs: Sequence[HistoryLine], opened: int, closed: int) -> SprintDay:
    letters = list(runs[-1].worst().values()) if runs else []
    passed, failed = letters.count("P"), letters.count("F")
    unsolved = ""
    if runs:
        counts = runs[-1].incidents
        unsolved = ", ".join(f"{counts[s]} {s}" for s in Severity if counts.get(s)) or "none"
    return SprintDay(day, len(runs), passed, failed, len(letters) - passed - failed, opened, closed, unsolved)
