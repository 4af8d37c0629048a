"""`prill diff`: what changed between two ledgers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import click

from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.records.evidence import CellStarted, Evidence, Record, Status, badness, checks
from prill_harness.records.ledger import audited
from prill_runtime.errors import UsageError

Key = tuple[str, str]
LEDGER = "ledger.jsonl"
LONGEST = 160  # characters of a sentence in the table


class ChangeKind(StrEnum):
    """How a check changed, worst first. LESS: it passed both times and compared fewer values than before."""

    WORSE = "worse"
    GONE = "gone"
    LESS = "less"
    OTHER = "other"
    BETTER = "better"
    NEW = "new"


WORSENED = (ChangeKind.WORSE, ChangeKind.GONE, ChangeKind.LESS)


@dataclass(frozen=True)
class LedgerChange:
    """One check in one cell; statuses are empty where it is not there."""

    kind: ChangeKind
    check: str
    cell: str
    before: str
    after: str
    sentence: str


@dataclass(frozen=True)
class Shift:
    """A figure that is another than before; values are None where not finite."""

    check: str
    cell: str
    name: str
    before: float | None
    after: float | None
    bound: float | None


@declare(name="diff", example="prill diff before/out out\nprill diff a.jsonl b.jsonl --figures")
@click.argument("old", metavar="A", type=click.Path(path_type=Path))
@click.argument("new", metavar="B", type=click.Path(path_type=Path))
@click.option("--figures", is_flag=True, help="Show every figure that changed, too.")
def command(console: Console, old: Path, new: Path, figures: bool) -> int:
    """Show what ledger B has that A has not: checks that got worse or better, came or went, compare less.

    A and B are ledgers, or the folders that hold them. Exit code 1 when something is worse, gone or compares
    less, 0 otherwise.
    """
    then, now = (_read(path) for path in (old, new))
    before, after = checks(then), checks(now)
    changes = sorted(_changes(before, after), key=lambda c: (list(ChangeKind).index(c.kind), c.cell, c.check))
    shifts = list(_shifts(before, after))
    inputs = sorted(_inputs(then, now))
    same = len(before.keys() & after.keys()) - sum(bool(c.before and c.after) for c in changes)
    console.emit({"changes": changes, "figures": shifts, "inputs": inputs, "same": same})
    for line in inputs:
        console.line(line)
    if changes:
        rows = [(c.kind, c.before or "-", c.after or "-", c.check, c.cell, _cut(c.sentence)) for c in changes]
        console.table(("change", "before", "after", "check", "cell", "now"), rows)
    if figures and shifts:
        told = [(s.check, s.cell, s.name, *map(_number, (s.before, s.after, s.bound))) for s in shifts]
        console.table(("check", "cell", "figure", "before", "after", "bound"), told)
    counts = Counter(change.kind for change in changes)
    told_counts = [f"{counts[kind]} {kind}" for kind in ChangeKind if counts[kind]]
    worse = any(counts[kind] for kind in WORSENED)
    summary = ", ".join([*told_counts, f"{same} the same, {len(shifts)} figures changed"])
    console.line(summary, status="failed" if worse else "passed")
    return 1 if worse else 0


def _read(path: Path) -> tuple[Record, ...]:
    file = path / LEDGER if path.is_dir() else path
    if not file.is_file():
        raise UsageError("no such ledger", where=str(file), hint="run prill gate first, or name its --out")
    return audited(file)


def _changes(before: Mapping[Key, Evidence], after: Mapping[Key, Evidence]) -> Iterator[LedgerChange]:
    for cell, check in before.keys() | after.keys():
        was, now = before.get((cell, check)), after.get((cell, check))
        last = now or was
        kind = _kind(was, now)
        if kind is not None and last is not None:
            said = last.sentence
            if kind is ChangeKind.LESS and was and now:
                said = f"compared {now.observed} values, {was.observed} before: {said}"
            yield LedgerChange(kind, check, cell, was.status if was else "", now.status if now else "", said)


def _kind(was: Evidence | None, now: Evidence | None) -> ChangeKind | None:
    if was is None or now is None:
        return ChangeKind.NEW if was is None else ChangeKind.GONE
    if was.status is not now.status:
        return ChangeKind.WORSE if badness(now.status) < badness(was.status) else ChangeKind.BETTER
    if now.status is not Status.PASSED:
        return None if was.sentence == now.sentence else ChangeKind.OTHER
    return ChangeKind.LESS if now.observed < was.observed else None


def _shifts(before: Mapping[Key, Evidence], after: Mapping[Key, Evidence]) -> Iterator[Shift]:
    for cell, check in sorted(before.keys() & after.keys()):
        was = {metric.name: metric.value for metric in before[cell, check].metrics}
        for metric in after[cell, check].metrics:
            if metric.name in was and was[metric.name] != metric.value:
                yield Shift(check, cell, metric.name, was[metric.name], metric.value, metric.bound)


def _inputs(then: tuple[Record, ...], now: tuple[Record, ...]) -> set[str]:
    """What the two ran with: models with another digest, other versions, checks with other code."""
    facts = [
        {
            (record.cell.model if name == "model_sha256" else "", name): value
            for record in records
            if isinstance(record, CellStarted)
            for name, value in record.versions.items()
            if name in ("prill", "numpy", "python", "model_sha256")
        }
        for records in (then, now)
    ]
    found = set()
    for of, name in facts[0].keys() & facts[1].keys():
        was, is_now = facts[0][of, name], facts[1][of, name]
        if was != is_now:
            found.add(f"{of or name}: {was[:16]} before, {is_now[:16]} now")
    codes = [{r.base: r.content for r in records if isinstance(r, Evidence)} for records in (then, now)]
    other = sum(codes[0][check] != codes[1][check] for check in codes[0].keys() & codes[1].keys())
    return found | ({f"{other} checks were judged by other code"} if other else set())


def _cut(sentence: str) -> str:
    return sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST]}…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
