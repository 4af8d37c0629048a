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
from prill_harness.decide.rules import GateCase, judge
from prill_harness.decide.templates import instances, models_of
from prill_harness.decide.waivers import Key, Waiver
from prill_harness.decide.waivers import apply as apply_waivers
from prill_harness.faults.trial.forgotten import Forgotten, excused
from prill_harness.faults.trial.kills import Kills
from prill_harness.plan.plan import Plan
from prill_harness.plan.policy import Policy
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
    CellResult,
    CheckResult,
    ForgottenResult,
    ItemResult,
    ItemStatus,
    SpeedResult,
    Verdict,
)
from prill_harness.version import version
from prill_runtime.errors import PolicyError

NOWHERE: Mapping[str, tuple[Path, int]] = {}
NOTHING = Forgotten()


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
        speeds: of engines over their baselines. documents: those of the gate that are there.

    Raises:
        PolicyError: a checklist that the gate names is not given.
    """
    gate = policy.gate(plan.gate)
    index = _index(plan, records)
    lists = instances(_named(gate.checklists, checklists), index.observed.models)
    counted = _counted(lists, plan, index.observed)
    covered, waived = apply_waivers(waivers, counted, never=gate.never_waive, as_of=as_of)
    observed = msgspec.structs.replace(index.observed, waived=covered)
    items = evaluate(lists, plan.cells, observed, as_of)
    checks = _checks(index, counted, covered, sources)
    cells = tuple(_cell(cell, index) for cell in sorted(plan.cells))
    case = GateCase(
        gate=gate,
        plan=plan,
        items=items,
        cells=cells,
        checks=checks,
        claimed=frozenset((e.cell.id, e.check) for _, e in counted),
        waivers=waived,
        starts=index.starts,
        contents=index.contents,
        flaky=index.flaky,
        kills=excused(kills, forgotten),
        faults=index.faults,
        speeds=speeds,
        documents=frozenset(documents),
    )
    rules = judge(case)
    broken = sorted((r for r in rules if r.status is not Status.PASSED), key=lambda r: badness(r.status))
    status = broken[0].status if broken else Status.PASSED
    counts = Counter(check.status.value for check in checks)
    reason = broken[0].sentence if broken else _told(counts, cells, items)
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
        counts={s.value: counts[s.value] for s in Status} | {"checks": len(checks), "cells": len(cells)},
        policy_sha256=policy.sha256,
        prill_version=version(),
        duration_s=round(math.fsum(cell.duration_s for cell in cells), 6),
        assumptions=_assumptions(index.starts.values()),
        models={s.cell.model: s.versions.get("model_sha256", "") for _, s in sorted(index.starts.items())},
        policy=shown(policy.path),
        forgotten=_forgotten(forgotten),
    )


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


def _told(counts: Mapping[str, int], cells: Sequence[CellResult], items: Sequence[ItemResult]) -> str:
    """What stands behind a pass, and what was let through without proof."""
    proven = sum(item.status is ItemStatus.PROVEN for item in items)
    waived = sum(item.status is ItemStatus.WAIVED for item in items)
    told = f"{counts['passed']} checks in {len(cells)} cells, {proven} of {len(items)} items proven"
    return told + (f", {waived} waived and not proven" if waived else "")


@dataclass(frozen=True)
class _Index:
    """The records of the plan's cells, by cell id, in an order of their own."""

    observed: Observed
    starts: Mapping[str, CellStarted]
    ends: Mapping[str, CellEnded]
    contents: Mapping[str, frozenset[str]]
    faults: Mapping[str, frozenset[str]]
    flaky: tuple[str, ...]


def _index(plan: Plan, records: Iterable[Record]) -> _Index:
    planned_cells = set(plan.cells)
    # Sorted by content and stripped of repetitions: order and double merging cannot matter.
    unique = sorted({encode(r): r for r in records if r.cell in planned_cells}.items())
    found: dict[str, dict[str, list[Evidence]]] = defaultdict(lambda: defaultdict(list))
    starts: dict[str, CellStarted] = {}
    ends: dict[str, CellEnded] = {}
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
            starts[cell] = record
            planned[cell].update(record.planned)
        elif isinstance(record, CellEnded):
            ends[cell] = record
    worst = {
        cell: {check: min(several, key=_badness) for check, several in sorted(by_check.items())}
        for cell, by_check in sorted(found.items())
    }
    flaky = tuple(
        f"{check} in {cell}"
        for cell in sorted(found)
        for check, several in sorted(found[cell].items())
        if len({e.status for e in several}) > 1
    )
    observed = Observed(worst, planned, models_of(plan.cells, starts.values()))
    hashes, claimed = ({k: frozenset(v) for k, v in sets.items()} for sets in (contents, faults))
    return _Index(observed, starts, ends, hashes, claimed, flaky)


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
    sources: Mapping[str, tuple[Path, int]],
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
            results.append(_check(evidence, ids[0] if waived else "", sources.get(evidence.base)))
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
    )
