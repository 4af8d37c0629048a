"""Runs with a known verdict, gathered and decided by the gate's own code.

Every case is one sound run with one thing wrong. Its records are written as cells write them, gathered as a
plan gathers them, and decided on; the gate may be green on the sound run alone.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from prill_harness.decide import gate
from prill_harness.decide.checklist import Checklist, Item
from prill_harness.decide.waivers import Conditions, Waiver
from prill_harness.faults.trial.forgotten import Forgotten, Kill
from prill_harness.faults.trial.kills import FaultTrial, Kills, fresh
from prill_harness.plan.plan import Plan
from prill_harness.plan.policy import Gate, Policy
from prill_harness.planting.faults import Fault
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
from prill_harness.records.ledger import lines
from prill_harness.records.verdict import IncidentResult, IncidentState, Severity, Verdict
from prill_harness.run import executor, gather

DAY = dt.date(2026, 1, 1)
CELLS = (Cell("fixture:a", "numpy", "demo"), Cell("fixture:b", "numpy", "demo"))
FIRST, LAST = CHECKS = ("demo.first", "demo.last")
FAULTS = ("one", "another")  # that both checks claim
SAW, CODE = 100, "c" * 64
TRIAL = FaultTrial("", "head", "", ("logits",), CELLS[0].model, ("logits",), CHECKS)
KILLS = Kills(
    dict.fromkeys(FAULTS, TRIAL),
    dict.fromkeys(CHECKS, CODE),
    observed={cell.id: dict.fromkeys(CHECKS, SAW) for cell in CELLS},
)
Change = Callable[[Record], Iterable[Record]]


def sound() -> list[Record]:
    """Both checks in both cells, all of them passed."""
    records: list[Record] = []
    for cell in CELLS:
        records.append(CellStarted(cell, CHECKS, 0.0, {"prill": "1", "model_sha256": cell.model}))
        records += [Evidence(c, CODE, cell, Status.PASSED, SAW, "seen", "o", FAULTS, "") for c in CHECKS]
        records.append(CellEnded(cell, 0, 0.1, 1.0))
    return records


def ended(records: Sequence[Record]) -> Sequence[Record]:
    """A cell's records, with the exit code that its evidence asks for."""
    statuses = {record.status for record in records if isinstance(record, Evidence)}
    code = EXIT_CODES[min(statuses, key=badness, default=Status.PASSED)]
    return [msgspec.structs.replace(r, exit_code=code) if isinstance(r, CellEnded) else r for r in records]


def decide(folder: Path, records: Sequence[Record], **named: Any) -> Verdict:
    """The verdict on records, by way of a ledger for each cell."""
    ledgers = []
    for cell in CELLS:
        mine = [record for record in records if record.cell == cell]
        if mine:
            ledgers.append(executor.ledger_path(folder, cell))
            ledgers[-1].parent.mkdir(parents=True, exist_ok=True)
            ledgers[-1].write_bytes(lines(ended(mine)))
    gathered = gather.gather(ledgers, folder / "ledger.jsonl")
    item = Item("demo.all", "All", "so", Severity.CRITICAL, CHECKS)
    wanted = Gate("demo", ("demo",), ("demo",), frozenset(), (), Severity.LOW, 1, 0, 0)
    given: dict[str, Any] = {"kills": KILLS, "checklists": (_list(item),), "as_of": DAY} | named
    policy = Policy(Path("gates.toml"), "0" * 64, "demo", {"demo": wanted})
    return gate.decide(policy, Plan("demo", CELLS), gathered, **given)


def _list(*items: Item) -> Checklist:
    return Checklist("demo", "Demo", items, Path("demo.toml"), tuple(range(1, len(items) + 1)))


def cases(folder: Path) -> Iterator[tuple[str, str, Verdict]]:
    """(what is wrong, the rules that have to break, the verdict)."""
    made = 0

    def case(records: Sequence[Record], **named: Any) -> Verdict:
        nonlocal made
        made += 1
        return decide(folder / str(made), records, **named)

    yield "nothing", "", case(sound())
    for what, rule, change in changes():
        yield what, rule, case([new for record in sound() for new in change(record)])
    for what, rule, named in givens():
        yield what, rule, case(sound(), **named)
    fails = changed(LAST, status=Status.FAILED, sentence=WAIVER.signature)
    failing = [new for record in sound() for new in fails(record)]
    yield "a critical failure that is waived", "items", case(failing, waivers=(WAIVER,))
    line = Forgotten(kills=(Kill("one", LAST, "another way"),))
    yield "nothing, for a reason is given", "", case(sound(), kills=owing(), forgotten=line)


def changed(of: str, **values: Any) -> Change:
    """A check's record of the last cell with other values."""

    def change(record: Record) -> Sequence[Record]:
        mine = isinstance(record, Evidence) and (record.check, record.cell) == (of, CELLS[-1])
        return [msgspec.structs.replace(record, **values) if mine else record]

    return change


def changes() -> Iterator[tuple[str, str, Change]]:
    """What can be wrong with the records."""
    for status, rule in (
        (Status.FAILED, "items"),
        (Status.ERROR, "items errors"),
        (Status.INCONCLUSIVE, "items inconclusive"),
    ):
        yield f"a check that is {status}", rule, changed(LAST, status=status)
    yield "a check that saw half", "observed", changed(LAST, observed=SAW // 2)
    yield "a check of other code", "kills provenance", changed(LAST, content="d" * 64)
    yield "a check that nobody planned", "items cells", changed(LAST, check="demo.extra")

    def without(kind: type) -> Change:
        return lambda record: [] if record.cell == CELLS[-1] and isinstance(record, kind) else [record]

    yield "a cell without evidence", "items cells", without(Evidence)
    yield "a cell that died", "cells", without(CellEnded)
    yield "a cell that left nothing", "items cells", without(object)

    def twice(status: Status) -> Change:
        return lambda record: [
            record,
            *(new for new in changed(LAST, status=status)(record) if new != record),
        ]

    yield "a check that failed the second time", "items flaky", twice(Status.FAILED)
    yield "a check that passed and broke", "items errors flaky", twice(Status.ERROR)

    def again(record: Record) -> Sequence[Record]:
        failed = changed(LAST, status=Status.FAILED)(record)
        return [*failed, *(msgspec.structs.replace(record, attempt=2) for new in failed if new != record)]

    yield "a check that passed when it was run again", "items flaky", again

    def other(record: Record) -> Sequence[Record]:
        versions = {"prill": "2", "model_sha256": record.cell.model}
        mine = isinstance(record, CellStarted) and record.cell == CELLS[-1]
        return [msgspec.structs.replace(record, versions=versions) if mine else record]

    yield "a cell of another prill", "provenance", other


def owing() -> Kills:
    """A matrix in which a kill was not seen again, of a fault that the check does not claim any more."""
    return msgspec.structs.replace(KILLS, owed={"one": (LAST,)})


def givens() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """What can be wrong with what the gate holds the records against."""
    yield "no kill at all", "kills", {"kills": Kills()}
    half = {**KILLS.faults, FAULTS[-1]: msgspec.structs.replace(TRIAL, killed_by=(FIRST,))}
    yield "kills of faults that have changed", "kills", {"kills": fresh(KILLS, CHANGED)}
    yield "one of two kills", "kills", {"kills": msgspec.structs.replace(KILLS, faults=half)}
    yield "a kill that was lost", "owed", {"kills": owing()}
    yield "a critical incident that is open", "incidents", {"incidents": (INCIDENT,)}


# Faults of these names whose code is not what it was when they were killed.
CHANGED = {
    name: Fault(name, TRIAL.area, TRIAL.blames, "is wrong", (TRIAL.model,), lambda: ()) for name in FAULTS
}
INCIDENT = IncidentResult(
    "0001", Severity.CRITICAL, "cache", "wrong text after a cancel", IncidentState.OPEN, DAY.isoformat()
)
WAIVER = Waiver(
    id="W-1", item="demo.all", conditions=Conditions("numpy", "cpu"), check=LAST,
    signature="known to be wrong", owner="ada", issue="17", reason="known", created=DAY, expires=DAY,
)  # fmt: skip
