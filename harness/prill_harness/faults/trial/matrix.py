"""Run the suites against planted faults, and see which check killed which."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prill_harness.engines.spec import FAULT
from prill_harness.faults.trial import blame as blaming
from prill_harness.faults.trial.blame import Blame
from prill_harness.faults.trial.kills import FaultTrial, digest
from prill_harness.plan import plan
from prill_harness.plan.plan import Plan
from prill_harness.plan.policy import Gate
from prill_harness.planting.faults import Fault
from prill_harness.records.catalog import check_ids, suites
from prill_harness.records.evidence import Cell, Evidence, Record, Status
from prill_harness.records.names import suite_of
from prill_harness.run import executor
from prill_harness.run.pool import Event

TIMEOUT_S = 240.0
ENGINE = "numpy"
# In the order of a diagnosis: suites of single parts before those that run the whole engine.
ORDER = ("harness", "witness", "file", "blocks", "ops", "options", "tokenizer", "stages", "tokens", "sampler",
         "cache", "properties", "requests", "contract", "errors", "boundary", "process",
         "memory", "cost")  # fmt: skip
# CPU seconds of suites that take more than about one; the longest cells are started first.
HEAVY = {
    "contract": 14,
    "boundary": 8,
    "process": 4,
    "tokens": 6,
    "properties": 6,
    "requests": 2,
    "harness": 2,
    "cache": 2,
    "errors": 2,
}
# The suites that may detect faults of an area, besides those whose checks claim them.
LOOK = {
    "file": ("file", "blocks", "stages", "errors"),
    "blocks": ("file", "blocks", "stages"),
    "embedding": ("ops", "stages"),
    "norm": ("ops", "stages"),
    "rope": ("ops", "stages"),
    "attention": ("ops", "stages"),
    "feed-forward": ("ops", "stages"),
    "options": ("options", "stages"),
    "head": ("stages", "tokens", "sampler"),
    "sampler": ("stages", "sampler"),
    "tokenizer": ("tokenizer",),
    "generation": ("errors",),
    "requests": ("requests",),
    "state": ("stages", "cache"),
    "late": ("stages",),
    "memory": ("memory",),
    "boundary": ("boundary",),
    "cost": ("cost",),
    "trace": ("stages", "cache"),
    "device": ("ops", "stages"),
    "harness": ("harness", "stages"),
    "common": ("witness",),
    "shapes": ("ops", "stages", "properties"),
}


@dataclass(frozen=True)
class TrialSubject:
    """The subject of one trial: a fault, or several composed, of which the first decides model and area."""

    faults: tuple[Fault, ...]

    @property
    def name(self) -> str:
        return "+".join(fault.name for fault in self.faults)

    @property
    def engine(self) -> str:
        return ENGINE + "".join(FAULT + fault.name for fault in self.faults)

    @property
    def model(self) -> str:
        return self.faults[0].models[0]

    @property
    def blames(self) -> frozenset[str]:
        return frozenset(part for fault in self.faults for part in fault.blames)

    @property
    def breaks_harness(self) -> bool:
        return any(fault.area == "harness" for fault in self.faults)


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial: the checks that killed the fault, what is blamed, and a sentence."""

    subject: TrialSubject
    killed_by: tuple[str, ...]
    blamed: Blame | None

    @property
    def right(self) -> bool:
        return self.blamed is not None and bool(set(self.blamed.parts) & self.subject.blames)

    @property
    def sentence(self) -> str:
        name = self.subject.name
        if self.blamed is None:
            return f"{name} survives: no check that passes without it fails on it"
        parts, owed = " or ".join(self.blamed.parts), " or ".join(sorted(self.subject.blames))
        verdict = "rightly" if self.right else f"wrongly: it breaks {owed}"
        shown = ", ".join(self.killed_by[:4]) + (
            f" and {len(self.killed_by) - 4} more" if len(self.killed_by) > 4 else ""
        )
        return f"{name} is killed by {shown}; {parts} is blamed, {verdict} ({self.blamed.check})"

    def trial(self) -> FaultTrial:
        """The result as kept in kills.json; for a single fault."""
        (fault,) = self.subject.faults
        blamed = self.blamed.parts if self.blamed else ()
        return FaultTrial(
            digest(fault), fault.area, fault.summary, fault.blames, self.subject.model, blamed, self.killed_by
        )


def claims(folder: Path | None = None) -> dict[str, tuple[str, ...]]:
    """Check id -> the faults it claims, read from the suites' source: literals, or a module's constant."""
    found: dict[str, tuple[str, ...]] = {}
    for file in {file for file, _ in check_ids(folder).values()}:
        tree = ast.parse(file.read_text("utf-8"), str(file))
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            named = {keyword.arg: keyword.value for keyword in call.keywords}
            if getattr(call.func, "id", "") != "check" or "kills" not in named or not call.args:
                continue
            value = named["kills"]
            value = constants.get(value.id, value) if isinstance(value, ast.Name) else value
            found[str(ast.literal_eval(call.args[0]))] = tuple(ast.literal_eval(value))
    return found


def suites_for(subject: TrialSubject, claimed: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The suites to run a subject against, in order: those of its areas, those that claim a fault of it."""
    there = set(suites())
    names = {fault.name for fault in subject.faults}
    wanted = {suite for fault in subject.faults for suite in LOOK[fault.area]}
    wanted |= {suite_of(check) for check, faults in claimed.items() if names & set(faults)}
    return tuple(name for name in (*ORDER, *sorted(there - set(ORDER))) if name in wanted & there)


def cells_for(
    subjects: Iterable[TrialSubject],
    claimed: Mapping[str, Sequence[str]],
    *,
    every: bool = False,
    gate: Gate | None = None,
) -> tuple[Cell, ...]:
    """One process per subject, and one on the clean engine per model and suite.

    Args:
        every: all suites, for subjects that the likely suites did not kill.
        gate: also run its cells, to record what their checks observe on the clean engine.
    """
    trials, clean = [], defaultdict[str, dict[str, None]](dict)
    for subject in subjects:
        names = tuple(n for n in ORDER if n in suites()) if every else suites_for(subject, claimed)
        clean[subject.model] |= dict.fromkeys(names)
        trials.append(Cell(subject.model, subject.engine, "+".join(names)))
    sound = [Cell(model, ENGINE, name) for model, names in sorted(clean.items()) for name in names]
    sound += [cell for cell in plan.build(gate).cells if cell.engine == ENGINE] if gate else []
    # The longest first, so that none is left to a single core at the end.
    return tuple(dict.fromkeys([*sound, *sorted(trials, key=_cost, reverse=True)]))


def _cost(cell: Cell) -> int:
    return sum(HEAVY.get(suite, 1) for suite in cell.suite.split("+"))


def run(
    cells: Sequence[Cell],
    out: Path,
    jobs: int,
    progress: Callable[[Event], None] = lambda event: None,
    folder: Path | None = None,
) -> tuple[Record, ...]:
    """Run the cells of `cells_for`; their records."""
    return executor.run(
        Plan("faults", tuple(cells), folder=folder), out, jobs, progress=progress, timeout_s=TIMEOUT_S
    )


def judge(subjects: Sequence[TrialSubject], records: Iterable[Record]) -> tuple[TrialResult, ...]:
    """Judge each subject's evidence against that of the clean engine."""
    by_engine: dict[tuple[str, str], list[Evidence]] = defaultdict(list)
    for record in records:
        if isinstance(record, Evidence):
            by_engine[record.cell.model, record.cell.engine].append(record)
    results = []
    for subject in subjects:
        seen = by_engine[subject.model, subject.engine]
        sound = by_engine[subject.model, ENGINE]
        killed = blaming.kills(seen, sound, silence=subject.breaks_harness)
        checks = tuple(sorted({evidence.base for evidence in killed}))
        results.append(TrialResult(subject, checks, blaming.blame(killed)))
    return tuple(results)


def alarms(records: Iterable[Record]) -> tuple[list[Evidence], int]:
    """Checks that did not pass on a clean engine, and how many were run there."""
    clean = [r for r in records if isinstance(r, Evidence) and r.cell.engine == ENGINE]
    return [e for e in clean if e.status in (Status.FAILED, Status.ERROR)], len(clean)


def unkept(
    claimed: Mapping[str, Sequence[str]], killed_by: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Check id -> faults that it claims and did not kill, of those that were run.

    Args:
        killed_by: for each fault that was run, the checks that killed it.
    """
    found = {
        check: tuple(name for name in names if name in killed_by and check not in killed_by[name])
        for check, names in sorted(claimed.items())
    }
    return {check: names for check, names in found.items() if names}


def contents(records: Iterable[Record]) -> dict[str, str]:
    """Content hash of every check that was run on a clean engine, by id without parameters."""
    return {
        r.base: r.content
        for r in records
        if isinstance(r, Evidence) and r.content and r.cell.engine == ENGINE
    }
