"""Read checklists, and decide by the evidence which items are proven, failed or unproven.

```toml
id = "model"
title = "Every architecture"
each = "architecture"                # optional: a template, of which every architecture has its own list

[[items]]
id = "tokens.exact"                  # unique over all checklists; a template's: `llama.tokens.exact`
title = "Tokens equal the oracle's in the exact lane"
why = "a wrong number here is wrong text for every user"
severity = "critical"                # critical, high, medium, low
checks = ["tokens.teacher_forced"]   # ids of checks; every parameter of each must pass
docs = "docs/LEAKS.md"               # optional
needs = ["rope"]                     # optional, in a template: only models with these features,
lacks = ["window"]                   # and without these (`prill inspect` shows a model's)

[[items]]                            # a manual item has no checks but a signature
id = "release.read"
title = "Somebody read the guide"
why = "no check can"
severity = "low"
[items.manual]
signer = "Ada"
date = 2026-01-31
evidence_sha256 = "…64 hex digits…"
verify_again = 2026-07-31            # from this day on the item is unproven again
```
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from prill_harness.engines.features import Traits
from prill_harness.records.catalog import check_ids, packaged, shown
from prill_harness.records.evidence import Cell, Evidence, Status, badness
from prill_harness.records.names import base_of, look_up, suite_of
from prill_harness.records.strict import load_toml
from prill_harness.records.verdict import ItemResult, ItemStatus, Severity
from prill_runtime.errors import ChecklistError
from prill_runtime.models.walks import FEATURES

HEADER = re.compile(r"^\s*\[\[\s*items\s*\]\]")
UNKNOWN = "unknown"
"""Stands for the architecture of a model that nobody could read, so that it hides no item."""


class Manual(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A person's signature under what no check can see."""

    signer: str
    date: dt.date
    evidence_sha256: str
    verify_again: dt.date


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a checklist.

    Attributes:
        needs, lacks: features of the models that it speaks of. architecture: of a template's instance, and in
            no file. warns: its failure is shown and holds no gate shut.
    """

    id: str
    title: str
    why: str
    severity: Severity
    checks: tuple[str, ...] = ()
    docs: str = ""
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    architecture: str = ""
    manual: Manual | None = None
    warns: bool = False


class _ChecklistFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    title: str
    items: tuple[Item, ...]
    each: Literal["", "architecture"] = ""


class Checklist(msgspec.Struct, frozen=True):
    """One file, or what a template comes to for one architecture.

    Attributes:
        lines: 1-based, on which its items start. template: its items are asked of each architecture.
        left_out: condition -> how many items no model of the architecture has it for.
    """

    id: str
    title: str
    items: tuple[Item, ...]
    path: Path
    lines: tuple[int, ...]
    template: bool = False
    left_out: Mapping[str, int] = {}


def load_checklists(
    names: Iterable[str] | None = None, *, folder: Path | None = None, known: Collection[str] | None = None
) -> tuple[Checklist, ...]:
    """Read checklists by name, or all of the folder (None: the packaged ones).

    Args:
        names: file names without .toml; None for every file.
        folder: where they lie.
        known: check ids that exist; None: those of the packaged suites.

    Raises:
        UsageError: no checklist of that name.
        ChecklistError: unreadable, unknown keys, a repeated item id, an item without proof, or a check
            that no suite declares.
    """
    folder = folder or packaged() / "checklists"
    there = checklist_names(folder)
    names = there if names is None else tuple(names)
    for name in names:
        look_up(name, there, "no such checklist")
    paths = [folder / f"{name}.toml" for name in names]
    known = check_ids() if known is None else known
    lists = tuple(_load(path) for path in paths)
    seen: dict[str, Path] = {}
    for checklist in lists:
        for number, item in enumerate(checklist.items):
            where = f"{checklist.path} - at `$.items[{number}]`"
            if item.id in seen:
                raise ChecklistError(
                    f"item id {item.id!r} is used twice", where=where, got=str(seen[item.id])
                )
            seen[item.id] = checklist.path
            _validate(item, where, known, checklist.template)
    return lists


def checklist_names(folder: Path | None = None) -> tuple[str, ...]:
    """Names of the checklists in `folder` (None: the packaged ones)."""
    return tuple(sorted(path.stem for path in (folder or packaged() / "checklists").glob("*.toml")))


def _load(path: Path) -> Checklist:
    file = load_toml(path, _ChecklistFile, ChecklistError)
    lines = [n for n, text in enumerate(path.read_text("utf-8").splitlines(), 1) if HEADER.match(text)]
    lines = lines if len(lines) == len(file.items) else [1] * len(file.items)
    if file.id != path.stem or not file.items:
        what = "a checklist needs at least one item" if not file.items else "id and file name differ"
        raise ChecklistError(what, where=str(path), expected=repr(path.stem), got=repr(file.id))
    return Checklist(file.id, file.title, file.items, path, tuple(lines), bool(file.each))


def _validate(item: Item, where: str, known: Collection[str], template: bool) -> None:
    blank = [name for name in ("id", "title", "why") if not getattr(item, name).strip()]
    if blank:
        raise ChecklistError(f"{blank[0]} is empty", where=where)
    if bool(item.checks) == (item.manual is not None):
        raise ChecklistError(
            "an item is proven by checks or by a manual signature, by one of them", where=where
        )
    for feature in (*item.needs, *item.lacks):
        look_up(feature, FEATURES, "names a feature that no model has", where=where, error=ChecklistError)
    if item.architecture or (not template and (item.needs or item.lacks)):
        what = "no item names its architecture, and features choose items of a template alone"
        raise ChecklistError(what, where=where, expected='`each = "architecture"` at the top of the file')
    for check in item.checks:
        look_up(check, known, "names a check that no suite declares", where=where, error=ChecklistError)
    manual = item.manual
    if manual is not None:
        if not re.fullmatch(r"[0-9a-f]{64}", manual.evidence_sha256) or not manual.signer.strip():
            raise ChecklistError("a manual item needs a signer and 64 hex digits of evidence", where=where)
        if manual.verify_again <= manual.date:
            raise ChecklistError(
                "verify_again must lie after date", where=where, got=str(manual.verify_again)
            )


class Observed(msgspec.Struct, frozen=True):
    """What the ledgers say, indexed.

    Attributes:
        evidence: the worst record of each check, by cell id and check id.
        planned: check ids each started cell announced, by cell id.
        models: by model spec; a model that is absent, or that no cell of could read, is of no known kind.
        waived: waiver id by (item id, cell id, check id).
        lacking: (cell id, check id) of what the policy lets the cell's engine lack.
    """

    evidence: Mapping[str, Mapping[str, Evidence]]
    planned: Mapping[str, Collection[str]]
    models: Mapping[str, Traits]
    waived: Mapping[tuple[str, str, str], str] = {}
    lacking: Collection[tuple[str, str]] = frozenset()


def carriers(item: Item, cells: Iterable[Cell], models: Mapping[str, Traits]) -> list[tuple[Cell, str]]:
    """(cell, check id) for every planned cell that owes evidence of one of the item's checks.

    A cell of whose model nobody knows the features (it never started) counts, so that it cannot hide an item.
    """
    return [
        (cell, check)
        for check in item.checks
        for cell in cells
        if cell.suite == suite_of(check) and speaks_of(item, models.get(cell.model, Traits()))
    ]


def speaks_of(item: Item, model: Traits) -> bool:
    """Whether cells of such a model owe the item evidence."""
    mine = item.architecture in ("", model.architecture or UNKNOWN)
    return mine and model.suits(item.needs, item.lacks) is not False


def evaluate(
    checklists: Sequence[Checklist], cells: Sequence[Cell], observed: Observed, as_of: dt.date
) -> tuple[ItemResult, ...]:
    """Every item against the evidence of the planned cells; proven only when all of it passed."""
    return tuple(
        _item(checklist, item, line, cells, observed, as_of)
        for checklist in checklists
        for item, line in zip(checklist.items, checklist.lines, strict=True)
    )


def _item(
    checklist: Checklist, item: Item, line: int, cells: Sequence[Cell], seen: Observed, as_of: dt.date
) -> ItemResult:
    if item.manual is not None:
        status, sentence = _manual(item.manual, as_of)
        by_cell: dict[str, str] = {}
        used: set[str] = set()
    else:
        owed = carriers(item, cells, seen.models)
        orphans = sorted(set(item.checks) - {check for _, check in owed})
        found = [f for cell, check in owed for f in _findings(item, cell, check, seen)]
        findings, lacking = _without(seen.lacking, found)
        findings.sort(key=lambda f: (badness(f[0]), f[1].id, f[2]))
        by_cell = {}
        for state, cell, _, _ in findings:
            by_cell.setdefault(cell.id, state)
        used = {seen.waived[key] for _, c, k, _ in findings if (key := (item.id, c.id, k)) in seen.waived}
        status, sentence = _conclude(findings, orphans)
        if lacking and status is ItemStatus.PROVEN:
            sentence += f"; lacking: {', '.join(sorted({check for _, _, check, _ in lacking}))}"
    return ItemResult(
        checklist=checklist.id,
        id=item.id,
        title=item.title,
        why=item.why,
        severity=item.severity,
        status=status,
        sentence=sentence,
        checks=item.checks,
        cells=dict(sorted(by_cell.items())),
        docs=item.docs,
        waivers=tuple(sorted(used)),
        file=shown(checklist.path),
        line=line,
        warns=item.warns,
    )


Found = tuple[str, Cell, str, str]  # state, cell, check, sentence


def _findings(item: Item, cell: Cell, check: str, seen: Observed) -> list[Found]:
    """State of each parameter of `check` in `cell`; a planned one without evidence is missing."""
    evidence = seen.evidence.get(cell.id, {})
    names = {n for n in (*seen.planned.get(cell.id, ()), *evidence) if base_of(n) == check}
    found: list[Found] = []
    for name in sorted(names):
        record = evidence.get(name)
        if record is None:
            found.append(("missing", cell, name, "planned, but it left no evidence"))
        elif record.status is Status.FAILED and (item.id, cell.id, name) in seen.waived:
            waiver = seen.waived[item.id, cell.id, name]
            found.append(("waived", cell, name, f"waived by {waiver}: {record.sentence}"))
        else:
            found.append((record.status.value, cell, name, record.sentence))
    if seen.models.get(cell.model, Traits()).suits(item.needs, item.lacks) is None:
        told = "what the model has is not known, so it may owe something else"
        found = [("missing", *f[1:3], told) if f[0] == "passed" else f for f in found]
    return found or [("missing", cell, check, "the cell left no evidence of this check")]


def _without(lacking: Collection[tuple[str, str]], found: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """The findings that count, and those that the policy lets an engine lack. A cell in which the item would
    count nothing else owes them all the same: nothing is proven by lacks."""
    others = {cell.id for _, cell, check, _ in found if (cell.id, check) not in lacking}
    excused = [f for f in found if (f[1].id, f[2]) in lacking and f[1].id in others]
    return [f for f in found if f not in excused], excused


def _conclude(findings: Sequence[Found], orphans: Sequence[str]) -> tuple[ItemStatus, str]:
    if orphans and not (findings and findings[0][0] == "failed"):
        return ItemStatus.UNPROVEN, f"no planned cell carries {', '.join(orphans)}"
    state, cell, check, sentence = findings[0]
    told = f"{check} {state} in {cell.id}: {sentence}"
    if state == "passed":
        cells = len({f[1] for f in findings})
        return ItemStatus.PROVEN, f"{len(findings)} checks passed in {cells} cells"
    if state == "failed":
        return ItemStatus.FAILED, told
    return (ItemStatus.WAIVED if state == "waived" else ItemStatus.UNPROVEN), told


def _manual(manual: Manual, as_of: dt.date) -> tuple[ItemStatus, str]:
    signed = f"signed by {manual.signer} on {manual.date}"
    if manual.date > as_of:
        return ItemStatus.UNPROVEN, f"{signed}, which is after {as_of}"
    if manual.verify_again <= as_of:
        return ItemStatus.UNPROVEN, f"{signed}, to be verified again since {manual.verify_again}"
    return ItemStatus.PROVEN, f"{signed}, evidence {manual.evidence_sha256[:12]}"
