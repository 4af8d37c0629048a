"""The rules by which a gate judges a run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prill_harness.faults.trial.forgotten import fallen
from prill_harness.faults.trial.kills import Kills, remedy
from prill_harness.numbers.compare import largest
from prill_harness.plan import beside
from prill_harness.plan.plan import Plan, cells_of
from prill_harness.plan.policy import Gate
from prill_harness.records.evidence import CellStarted, Status
from prill_harness.records.names import suite_of
from prill_harness.records.verdict import (
    CellResult,
    CheckResult,
    IncidentResult,
    IncidentState,
    ItemResult,
    ItemStatus,
    RuleResult,
    Severity,
    SpeedResult,
    WaiverResult,
)


@dataclass(frozen=True)
class GateCase:
    """Everything the rules judge, sorted, so that the order of records cannot matter."""

    gate: Gate
    plan: Plan
    items: Sequence[ItemResult]
    cells: Sequence[CellResult]
    checks: Sequence[CheckResult]
    claimed: frozenset[tuple[str, str]]  # (cell id, check id) that some item counts
    waivers: Sequence[WaiverResult]
    starts: Sequence[CellStarted]  # of every attempt
    contents: Mapping[str, frozenset[str]]  # content hashes seen, by (model-independent) check id
    flaky: Sequence[str]  # "check in cell" whose evidence disagrees with itself
    kills: Kills  # without what forgotten.toml gives a reason for
    incidents: Sequence[IncidentResult]
    faults: Mapping[str, frozenset[str]]  # planted faults claimed, by (model-independent) check id
    speeds: Sequence[SpeedResult]  # measured against a baseline
    documents: frozenset[str]  # that are there, and hold something


# What breaks a rule: FAILED where something was seen to be wrong, INCONCLUSIVE where something is lacking.
Broken = tuple[Status, str]
Rule = Callable[[GateCase], Broken | None]
RULES: dict[str, tuple[Rule, str]] = {}


def rule(name: str, holds: str) -> Callable[[Rule], Rule]:
    """Register a rule; `holds` is its sentence when it is not broken. Their order decides who is named."""

    def register(function: Rule) -> Rule:
        RULES[name] = (function, holds)
        return function

    return register


def judge(case: GateCase) -> tuple[RuleResult, ...]:
    """Every rule's result, in the order of declaration."""
    results = []
    for name, (function, holds) in RULES.items():
        status, sentence = function(case) or (Status.PASSED, holds)
        results.append(RuleResult(name, status, sentence))
    return tuple(results)


@rule("items", "every blocking item is proven, or waived where it is not critical")
def items_proven(case: GateCase) -> Broken | None:
    """A waiver is an excuse, not a proof: it opens no gate that a critical item holds shut."""
    if not case.items:
        return Status.INCONCLUSIVE, "no item of its checklists applies to this plan"
    open_items = [
        i for i in case.items if not _accepted(i) and not _warning(i) and case.gate.blocks(i.severity)
    ]
    if not open_items:
        return None
    worst = min(open_items, key=lambda i: (i.status is not ItemStatus.FAILED, i.severity.rank, i.id))
    more = f" (and {len(open_items) - 1} more items)" if len(open_items) > 1 else ""
    if worst.status is ItemStatus.FAILED:
        return Status.FAILED, f"{worst.id} ({worst.severity}): {worst.sentence}{more}"
    if worst.status is ItemStatus.WAIVED:
        told = f"{worst.id} ({worst.severity}) is waived, which proves nothing: {worst.sentence}{more}"
        return Status.INCONCLUSIVE, told
    return Status.INCONCLUSIVE, f"{worst.id} ({worst.severity}) is unproven: {worst.sentence}{more}"


def _accepted(item: ItemResult) -> bool:
    if item.status is ItemStatus.WAIVED:
        return item.severity is not Severity.CRITICAL
    return item.status is ItemStatus.PROVEN


def _warning(item: ItemResult) -> bool:
    """A finding that people should see and no gate waits for; what could not be looked at is no finding."""
    return item.warns and item.status is ItemStatus.FAILED


@rule("proof", "something is proven")
def something_proven(case: GateCase) -> Broken | None:
    """Where nothing blocks, or everything that does is waived, a gate would open on no evidence at all."""
    if any(item.status is ItemStatus.PROVEN for item in case.items):
        return None
    return Status.INCONCLUSIVE, f"none of {len(case.items)} items is proven"


@rule("unclaimed", "every failure belongs to an item of a checklist")
def no_unclaimed_failure(case: GateCase) -> Broken | None:
    """A failure that no item counts would otherwise pass unseen."""
    stray = [c for c in case.checks if c.status is Status.FAILED and (c.cell.id, c.check) not in case.claimed]
    if not stray:
        return None
    return (
        Status.FAILED,
        f"{stray[0].check} (on no checklist) failed in {stray[0].cell.id}: {stray[0].sentence}",
    )


@rule("cells", "every planned cell is complete")
def cells_complete(case: GateCase) -> Broken | None:
    lost = [cell for cell in case.cells if cell.status != "complete"]
    if not lost:
        return None
    return Status.INCONCLUSIVE, f"{len(lost)} of {len(case.cells)} cells not complete: {lost[0].sentence}"


@rule("errors", "no check ended in an error")
def no_error(case: GateCase) -> Broken | None:
    errors = [c for c in case.checks if c.status is Status.ERROR]
    if not errors:
        return None
    return Status.INCONCLUSIVE, f"{errors[0].check} broke in {errors[0].cell.id}: {errors[0].sentence}"


@rule("inconclusive", "no more checks are inconclusive than the policy allows")
def few_inconclusive(case: GateCase) -> Broken | None:
    """What an engine says that it lacks, and the policy lets it lack, was never owed."""
    found = [c for c in case.checks if c.status is Status.INCONCLUSIVE and not c.lacking]
    allowed = case.gate.max_inconclusive
    if len(found) <= allowed:
        return None
    first = f"{found[0].check} in {found[0].cell.id}: {found[0].sentence}"
    return Status.INCONCLUSIVE, f"{len(found)} checks are inconclusive, {allowed} allowed: {first}"


@rule("flaky", "no more checks contradict themselves than the policy allows")
def few_flaky(case: GateCase) -> Broken | None:
    if len(case.flaky) <= case.gate.max_flaky:
        return None
    return (
        Status.INCONCLUSIVE,
        f"{len(case.flaky)} checks are flaky, {case.gate.max_flaky} allowed: {case.flaky[0]}",
    )


@rule("incidents", "no incident is open that the policy waits for")
def incidents_closed(case: GateCase) -> Broken | None:
    """A critical one always holds a gate shut; a fix that nobody saw work is not one."""
    waited = [
        i for i in case.incidents
        if i.state is not IncidentState.CLOSED and i.severity.rank <= case.gate.incidents_block_at.rank
    ]  # fmt: skip
    if not waited:
        return None
    worst = min(waited, key=lambda i: (i.severity.rank, i.opened, i.id))
    more = f" (and {len(waited) - 1} more)" if len(waited) > 1 else ""
    told = f"incident {worst.id} ({worst.severity}, {worst.component}) is {worst.state} since {worst.opened}"
    return Status.FAILED, f"{told}: {worst.symptom}{more}"


@rule("executed", "enough checks were executed")
def enough_executed(case: GateCase) -> Broken | None:
    """Only what ended in passed or failed was executed, and a waived failure counts for nothing; a part of
    the plan owes its share."""
    done = sum(c.status in (Status.PASSED, Status.FAILED) for c in case.checks)
    whole = max(len(cells_of(case.gate)), len(case.plan.cells))
    required = math.ceil(case.gate.minimum_executed * len(case.plan.cells) / whole)
    if done >= required:
        return None
    return Status.INCONCLUSIVE, f"{done} checks executed, at least {required} required"


@rule("provenance", "all evidence comes from one prill, one model file per name and one code per check")
def one_provenance(case: GateCase) -> Broken | None:
    seen: dict[tuple[str, str], str] = {}
    for start in case.starts:
        facts = (("prill", ""), ("model_sha256", start.cell.model), ("engine_sha256", start.cell.engine))
        for fact, of in facts:
            value = start.versions.get(fact, "")
            if seen.setdefault((fact, of), value) != value:
                return Status.INCONCLUSIVE, f"{start.cell.id} ran with another {fact} {of}".rstrip()
    mixed = sorted(check for check, hashes in case.contents.items() if len(hashes) > 1)
    if mixed:
        return Status.INCONCLUSIVE, f"{mixed[0]} ran with different code in different cells"
    return None


@rule("kills", "every required check was seen to kill the planted faults that it claims")
def checks_kill(case: GateCase) -> Broken | None:
    """A pass is worth something only from a check that, with its present code, was seen to fail: on every
    fault that it says it finds."""
    passed = {
        c.base for c in case.checks if c.status is Status.PASSED and (c.cell.id, c.check) in case.claimed
    }
    lacking = [
        c for c in sorted(passed) if not case.kills.current(c, case.contents.get(c, ()), case.faults[c])
    ]
    if not lacking:
        return None
    more = f" (and {len(lacking) - 1} more checks)" if len(lacking) > 1 else ""
    first, claimed = lacking[0], case.faults[lacking[0]]
    unkept = case.kills.unkept(first, claimed) or sorted(claimed)
    own = case.plan.folder if beside.holds(case.plan.folder, suite_of(first)) else None
    return (
        Status.INCONCLUSIVE,
        f"{first} was not seen to kill {unkept[0]} with its present code{more}; "
        f"see it with `{remedy(claimed, own)}`",
    )


@rule("owed", "no kill that was seen once is missing")
def nothing_owed(case: GateCase) -> Broken | None:
    """A check that lost a kill was weakened, or the matrix was not run again; or a line says why."""
    owed = [(f, c) for f, checks in sorted(case.kills.owed.items()) for c in checks if c in case.contents]
    if not owed:
        return None
    fault, check = owed[0]
    more = f" (and {len(owed) - 1} more kills)" if len(owed) > 1 else ""
    again = remedy({name for name, by in owed if by == check})
    return (
        Status.INCONCLUSIVE,
        f"{check} killed {fault} once and was not seen to since{more}; see it with `{again}`, or give the "
        "reason in forgotten.toml",
    )


@rule("observed", "every check observed what it is on record with")
def enough_observed(case: GateCase) -> Broken | None:
    """On packaged models what a check compares is known; one that compares less was weakened."""
    seen: dict[str, dict[str, int]] = defaultdict(dict)
    for check in case.checks:
        if check.status is Status.PASSED:
            seen[check.cell.id][check.check] = check.observed
    fell = fallen(case.kills.observed, seen)
    if not fell:
        return None
    more = f" (and {len(fell) - 1} more checks)" if len(fell) > 1 else ""
    return Status.FAILED, f"{fell[0].sentence}{more}"


@rule("waivers", "no waiver is refused")
def waivers_sound(case: GateCase) -> Broken | None:
    """An unused or expired waiver is reported; its failure, if there is one, counts by itself."""
    refused = [w for w in case.waivers if w.state == "refused"]
    return (Status.FAILED, refused[0].sentence) if refused else None


@rule("leaks", "what is waived leaks no more than the policy allows")
def leaks_within_budget(case: GateCase) -> Broken | None:
    """A waiver excuses a leak, and does not say how large it may grow."""
    if case.gate.leak_budget is None:
        return None
    measured = {(c.cell.id, c.check): _leaked(c) for c in case.checks if _curves(c)}
    if not measured:
        return Status.INCONCLUSIVE, "a leak budget is set and no check measured a leak's curve"
    total = math.fsum(measured.values())
    if total <= case.gate.leak_budget:
        return None
    (cell, check), most = max(measured.items(), key=lambda one: (one[1], one[0]))
    told = f"{total:g} bytes a call leak, at most {case.gate.leak_budget} allowed"
    return Status.FAILED, f"{told}; {most:g} of them by {check} in {cell}"


def _curves(check: CheckResult) -> list[Mapping[str, object]]:
    """The curves of readings that a check's detail holds, of one path or of several parts."""
    parts = [check.detail, *(part for part in check.detail.values() if isinstance(part, Mapping))]
    rows = [row for part in parts for row in _listed(part.get("curves"))]
    return [row for row in rows if isinstance(row, Mapping)]


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()


def _leaked(check: CheckResult) -> float:
    """Bytes a call by the worst curve: one leak shows in several ledgers."""
    slopes = [
        row.get("slope") for row in _curves(check) if (row.get("unit"), row.get("verdict")) == ("B", "leak")
    ]
    return largest(0.0, *(float(slope) for slope in slopes if isinstance(slope, int | float)))


@rule("performance", "every engine is as fast as its baseline, within the budget")
def fast_enough(case: GateCase) -> Broken | None:
    """Slower is failed where the whole interval is; where it only reaches that far, nobody can tell."""
    budget = case.gate.performance_budget
    if budget is None:
        return None
    most, measured = 1 + budget / 100, {speed.engine for speed in case.speeds}
    for engine in dict.fromkeys(cell.cell.engine for cell in case.cells):
        if engine not in measured:
            again = f"prill bench --engine {engine} --model MODEL --baseline FILE -o RESULT"
            return Status.INCONCLUSIVE, f"{engine} was not measured: `{again}`, and --speed RESULT"
    slow = sorted((s for s in case.speeds if s.high > most), key=lambda s: (s.low <= most, -s.low))
    if not slow:
        return None
    first = slow[0]
    interval = f"{first.ratio:.3f} times its baseline's time ({first.low:.3f} to {first.high:.3f})"
    told = f"{first.name} of {first.engine} on {first.model} takes {interval}, at most {most:g} allowed"
    return (Status.FAILED if first.low > most else Status.INCONCLUSIVE), told


@rule("documents", "every document that the policy asks for is there")
def documents_there(case: GateCase) -> Broken | None:
    lacking = [name for name in case.gate.documents if name not in case.documents]
    if not lacking:
        return None
    more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
    return Status.FAILED, f"{lacking[0]} is not there, or empty{more}"
