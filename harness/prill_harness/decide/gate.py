"""The verdict on a run by the policy's rules, from plan, records, checklists and waivers."""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from prill_harness.decide.checklist import Checklist, Observed, carriers, evaluate
from prill_harness.decide.rootcause import lead
from prill_harness.decide.rules import GateCase, judge
from prill_harness.decide.templates import instances, models_of
from prill_harness.decide.waivers import Key, Waiver
from prill_harness.decide.waivers import apply as apply_waivers
from prill_harness.faults.trial.forgotten import Forgotten, excused
from prill_harness.faults.trial.kills import Kills
from prill_harness.plan.plan import Plan
from prill_harness.plan.policy import Gate, Policy
from prill_harness.records.catalog import shown
from prill_harness.records.evidence import (
    EXIT_CODES,
    Cell,
    CellEnded,
    CellStarted,
    Evidence,
    Record,
    Status,
    badness,
)
from prill_harness.records.ledger import encode
from prill_harness.records.verdict import (
    AssumptionResult,
    AttemptResult,
    CellResult,
    CheckResult,
    ForgottenResult,
    IncidentResult,
    ItemResult,
    ItemStatus,
    SpeedResult,
    StandingResult,
    Verdict,
    WaiverResult,
)
from prill_harness.version import version
from prill_runtime.errors import PolicyError

NOWHERE: Mapping[str, tuple[Path, int]] = {}
NOTHING = Forgotten()
NO_HISTORY: Mapping[tuple[str, str], StandingResult] = {}


def decide(
    policy: Policy,
    plan: Plan,
    records: Iterable[Record],
    *,
    checklists: Sequence[Checklist],
    kills: Kills,
    waivers: Sequence[Waiver] = (),
    as_of: dt.date,
    sources: Mapping[str, tuple[Path, int]] = NOWHERE,
    forgotten: Forgotten = NOTHING,
    standings: Mapping[tuple[str, str], StandingResult] = NO_HISTORY,
    incidents: Sequence[IncidentResult] = (),
    speeds: Sequence[SpeedResult] = (),
    documents: Collection[str] = (),
) -> Verdict:
    """The verdict on a run: a pure function of its arguments, whatever the order of the records.

    Args:
        records: of the plan's cells; records of other cells are left out.
        checklists: at least those the gate names; others are left out.
        kills: which checks were seen to kill planted faults; a pass without the kills that the check claims
            is inconclusive.
        as_of: the day on which waivers and signatures are judged.
        sources: file and line that declare each check, by id without parameter.
        forgotten: kills and amounts that are no longer owed, each with its reason; the verdict shows them.
        standings: what the history says, by (cell id, check id). incidents: the whole log.
        speeds: of engines over their baselines. documents: those of the gate that are there.

    Raises:
        PolicyError: a checklist that the gate names is not given.
    """
    gate, records = policy.gate(plan.gate), tuple(records)
    index = _index(plan, records)
    lists = instances(_named(gate.checklists, checklists), index.observed.models)
    counted = _counted(lists, plan, index.observed)
    covered, waived = apply_waivers(waivers, counted, never=gate.never_waive, as_of=as_of)
    waived = _with_standing(waived, covered, standings)
    lacking = _lacking(index, gate)
    observed = msgspec.structs.replace(index.observed, waived=covered, lacking=lacking)
    items = evaluate(lists, plan.cells, observed, as_of)
    checks = _checks(index, counted, covered, lacking, sources, standings)
    unsteady = {key for key, standing in standings.items() if standing.flaky}
    flaky = tuple(
        f"{c.check} in {c.cell.id}" for c in checks if _contradicts(c) or (c.cell.id, c.check) in unsteady
    )
    cells = tuple(_cell(cell, index) for cell in sorted(plan.cells))
    case = GateCase(
        gate=gate,
        plan=plan,
        items=items,
        cells=cells,
        checks=checks,
        claimed=frozenset((e.cell.id, e.check) for _, e in counted),
        waivers=waived,
        starts=index.every_start,
        contents=index.contents,
        flaky=flaky,
        incidents=incidents,
        kills=excused(kills, forgotten),
        faults=index.faults,
        speeds=speeds,
        documents=frozenset(documents),
    )
    rules = judge(case)
    broken = sorted((r for r in rules if r.status is not Status.PASSED), key=lambda r: badness(r.status))
    status = broken[0].status if broken else Status.PASSED
    counts = Counter(check.status.value for check in checks)
    reason = broken[0].sentence if broken else _told(checks, cells, items)
    return Verdict(
        gate=gate.name,
        status=status,
        exit_code=EXIT_CODES[status],
        sentence=f"gate {gate.name} {'is ' * (status is Status.INCONCLUSIVE)}{status.value}: {reason}",
        as_of=as_of.isoformat(),
        rules=rules,
        items=items,
        cells=cells,
        checks=checks,
        waivers=waived,
        counts={s.value: counts[s.value] for s in Status}
        | {"lacking": sum(bool(c.lacking) for c in checks), "checks": len(checks), "cells": len(cells)},
        policy_sha256=policy.sha256,
        prill_version=version(),
        duration_s=round(math.fsum(cell.duration_s for cell in cells), 6),
        assumptions=_assumptions(index.starts.values()),
        models={s.cell.model: s.versions.get("model_sha256", "") for _, s in sorted(index.starts.items())},
        policy=shown(policy.path),
        forgotten=_forgotten(forgotten),
        lead=lead(checks, records) if broken else None,
        flaky=flaky,
        incidents=tuple(incidents),
    )


def _contradicts(check: CheckResult) -> bool:
    """Whether its attempts ended differently."""
    return len({attempt.status for attempt in check.attempts}) > 1


def _with_standing(
    waivers: Iterable[WaiverResult],
    covered: Mapping[Key, str],
    standings: Mapping[tuple[str, str], StandingResult],
) -> tuple[WaiverResult, ...]:
    """Each waiver with the standing of the failure that it covers: how long it has failed, how often."""
    found: dict[str, list[StandingResult]] = defaultdict(list)
    for (_, cell, check), waiver in covered.items():
        found[waiver] += [standings[cell, check]] if (cell, check) in standings else []
    longest = {
        waiver: max(mine, key=lambda s: (s.failing_runs, s.failed)) for waiver, mine in found.items() if mine
    }
    return tuple(msgspec.structs.replace(each, standing=longest.get(each.id)) for each in waivers)


def _forgotten(lines: Forgotten) -> tuple[ForgottenResult, ...]:
    """What checks were let off, kills before amounts."""
    kills = [ForgottenResult(line.check, f"the kill of {line.fault}", line.reason) for line in lines.kills]
    amounts = [
        ForgottenResult(line.check, f"all but {line.values} values in {line.cell}", line.reason)
        for line in lines.observed
    ]
    return tuple(kills + amounts)


def _assumptions(starts: Iterable[CellStarted]) -> tuple[AssumptionResult, ...]:
    """Each assumption once, with the models it was made of."""
    models: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for start in starts:
        for assumed in start.assumptions:
            models[assumed].add(start.cell.model)
    return tuple(AssumptionResult(*each, models=tuple(sorted(of))) for each, of in sorted(models.items()))


def _lacking(index: _Index, gate: Gate) -> Mapping[tuple[str, str], tuple[str, ...]]:
    """What engines say that they lack and the policy lets them lack, by cell id and check id."""
    return {
        (cell, check): evidence.lacks
        for cell, by_check in index.observed.evidence.items()
        for check, evidence in by_check.items()
        if evidence.lacks and gate.may_lack.issuperset(evidence.lacks)
    }


def _told(checks: Sequence[CheckResult], cells: Sequence[CellResult], items: Sequence[ItemResult]) -> str:
    """What stands behind a pass, and what was let through without proof."""
    passed = sum(check.status is Status.PASSED for check in checks)
    lacking = [check for check in checks if check.lacking]
    proven = sum(item.status is ItemStatus.PROVEN for item in items)
    waived = sum(item.status is ItemStatus.WAIVED for item in items)
    told = f"{passed} checks in {len(cells)} cells, {proven} of {len(items)} items proven"
    told += f", {waived} waived and not proven" if waived else ""
    missed = ", ".join(sorted({capability for check in lacking for capability in check.lacking}))
    return told + (f", {len(lacking)} not asked of engines that lack {missed}" if lacking else "")


@dataclass(frozen=True)
class _Index:
    """The records of the plan's cells, by cell id, in an order of their own."""

    observed: Observed
    starts: Mapping[str, CellStarted]  # of first attempts
    ends: Mapping[str, CellEnded]
    every_start: tuple[CellStarted, ...]
    contents: Mapping[str, frozenset[str]]
    faults: Mapping[str, frozenset[str]]
    attempts: Mapping[tuple[str, str], tuple[AttemptResult, ...]]  # of checks that have several records


def _index(plan: Plan, records: Iterable[Record]) -> _Index:
    planned_cells = set(plan.cells)
    # Sorted by content and stripped of repetitions: order and double merging cannot matter.
    unique = sorted({encode(r): r for r in records if r.cell in planned_cells}.items())
    found: dict[str, dict[str, list[Evidence]]] = defaultdict(lambda: defaultdict(list))
    starts: dict[str, CellStarted] = {}
    ends: dict[str, CellEnded] = {}
    every_start: list[CellStarted] = []
    planned: dict[str, set[str]] = defaultdict(set)
    contents: dict[str, set[str]] = defaultdict(set)
    faults: dict[str, set[str]] = defaultdict(set)
    for _, record in unique:
        cell = record.cell.id
        if isinstance(record, Evidence):
            found[cell][record.check].append(record)
            faults[record.base].update(record.kills)
            if record.content:
                contents[record.base].add(record.content)
        elif isinstance(record, CellStarted):
            every_start.append(record)
            starts[cell] = min(record, starts.get(cell, record), key=lambda start: start.attempt)
            planned[cell].update(record.planned)
        elif isinstance(record, CellEnded):
            ends[cell] = min(record, ends.get(cell, record), key=lambda end: end.attempt)
    worst = {
        cell: {check: min(several, key=_badness) for check, several in sorted(by_check.items())}
        for cell, by_check in sorted(found.items())
    }
    attempts = {
        (cell, check): tuple(map(_attempt, sorted(several, key=lambda e: (e.attempt, encode(e)))))
        for cell, by_check in found.items()
        for check, several in by_check.items()
        if len(several) > 1
    }
    observed = Observed(worst, planned, models_of(plan.cells, starts.values()))
    hashes, claimed = ({k: frozenset(v) for k, v in sets.items()} for sets in (contents, faults))
    return _Index(observed, starts, ends, tuple(every_start), hashes, claimed, attempts)


def _attempt(evidence: Evidence) -> AttemptResult:
    return AttemptResult(evidence.attempt, evidence.status, evidence.sentence, evidence.duration_s)


def _badness(evidence: Evidence) -> tuple[int, bytes]:
    """Of several records of one check in one cell the worst counts: a lucky repetition hides nothing."""
    return badness(evidence.status), encode(evidence)


def _named(names: Iterable[str], checklists: Sequence[Checklist]) -> tuple[Checklist, ...]:
    given = {checklist.id: checklist for checklist in checklists}
    for name in names:
        if name not in given:
            raise PolicyError("the gate names a checklist that is not there", got=repr(name))
    return tuple(given[name] for name in names)


def _counted(checklists: Sequence[Checklist], plan: Plan, seen: Observed) -> list[tuple[str, Evidence]]:
    """(item id, evidence) for every record that an item counts."""
    return [
        (item.id, evidence)
        for checklist in checklists
        for item in checklist.items
        for cell, check in carriers(item, plan.cells, seen.models)
        for evidence in seen.evidence.get(cell.id, {}).values()
        if evidence.base == check
    ]


def _checks(
    index: _Index,
    counted: Sequence[tuple[str, Evidence]],
    covered: Mapping[Key, str],
    lacking: Mapping[tuple[str, str], tuple[str, ...]],
    sources: Mapping[str, tuple[Path, int]],
    standings: Mapping[tuple[str, str], StandingResult],
) -> tuple[CheckResult, ...]:
    """Every record as the gate counts it: waived only where each item that counts it is covered."""
    owners: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item, evidence in counted:
        owners[evidence.cell.id, evidence.check].append(item)
    results = []
    for cell, by_check in index.observed.evidence.items():
        for check, evidence in by_check.items():
            items = owners[cell, check]
            ids = [covered.get((item, cell, check), "") for item in items]
            waived = bool(ids) and all(ids) and evidence.status is Status.FAILED
            result = _check(evidence, ids[0] if waived else "", sources.get(evidence.base))
            attempts, standing = index.attempts.get((cell, check), ()), standings.get((cell, check))
            lacks = lacking.get((cell, check), ())
            results.append(
                msgspec.structs.replace(result, lacking=lacks, attempts=attempts, standing=standing)
            )
    return tuple(results)


def _check(evidence: Evidence, waiver: str, source: tuple[Path, int] | None) -> CheckResult:
    return CheckResult(
        check=evidence.check,
        cell=evidence.cell,
        status=Status.WAIVED if waiver else evidence.status,
        sentence=evidence.sentence,
        observed=evidence.observed,
        duration_s=evidence.duration_s,
        reproduce=evidence.reproduce,
        waiver=waiver,
        oracle=evidence.oracle,
        metrics=tuple(msgspec.to_builtins(metric) for metric in evidence.metrics),
        detail=evidence.detail,
        file=shown(source[0]) if source else "",
        line=source[1] if source else 0,
    )


def _cell(cell: Cell, index: _Index) -> CellResult:
    evidence = index.observed.evidence.get(cell.id, {})
    start, end = index.starts.get(cell.id), index.ends.get(cell.id)
    planned = set(index.observed.planned.get(cell.id, ()))
    lost, extra = sorted(planned - set(evidence)), sorted(set(evidence) - planned)
    status, sentence = "complete", ""
    if start is None:
        status, sentence = "missing", f"{cell.id} left no ledger"
    elif end is None or lost:
        what = f"left no evidence of {lost[0]}" if lost else "did not finish"
        died = [e.sentence for e in evidence.values() if e.status is Status.ERROR]
        status, sentence = "incomplete", f"{cell.id} {what}{': ' + died[0] if died else ''}"
    elif extra:
        status, sentence = "error", f"{cell.id} reported {extra[0]}, which it had not planned"
    elif not planned:
        status, sentence = "error", f"{cell.id} planned no check"
    return CellResult(
        cell=cell,
        status=status,
        planned=len(planned),
        executed=sum(e.status in (Status.PASSED, Status.FAILED) for e in evidence.values()),
        passed=sum(e.status is Status.PASSED for e in evidence.values()),
        duration_s=end.duration_s if end else 0.0,
        sentence=sentence,
        at=start.at if start else 0.0,
        host=start.host if start else "",
    )
