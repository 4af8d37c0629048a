"""Instantiate checklist templates, one for each architecture among the models of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from prill_harness.decide.checklist import UNKNOWN, Checklist, Item, speaks_of
from prill_harness.engines.features import Traits, in_words
from prill_harness.records.evidence import Cell, CellStarted

ANY = "ARCH"  # stands for an architecture's name where a template is shown


def models_of(cells: Iterable[Cell], starts: Iterable[CellStarted]) -> dict[str, Traits]:
    """Every model of the cells by name, in order, as its own cells recorded it."""
    found = {cell.model: Traits() for cell in cells}
    for start in sorted(starts, key=lambda start: start.cell):
        recorded = Traits.of_record(start.versions)
        if recorded.architecture:
            found[start.cell.model] = recorded
    return found


def instances(checklists: Iterable[Checklist], models: Mapping[str, Traits]) -> tuple[Checklist, ...]:
    """Lists as they are, and templates once for each architecture among the models, in the models' order."""
    names = dict.fromkeys(model.architecture or UNKNOWN for model in models.values())
    found: list[Checklist] = []
    for checklist in checklists:
        found += [_instance(checklist, name, models) for name in names] if checklist.template else [checklist]
    return tuple(found)


def _instance(template: Checklist, architecture: str, models: Mapping[str, Traits]) -> Checklist:
    """The items whose features some model of the architecture has, or may have."""
    kept: list[tuple[Item, int]] = []
    left_out: Counter[str] = Counter()
    for item, line in zip(template.items, template.lines, strict=True):
        name = f"{architecture}.{item.id}"
        mine = msgspec.structs.replace(item, id=name, architecture=architecture)
        if any(speaks_of(mine, model) for model in models.values()):
            kept.append((mine, line))
        else:
            left_out[of_models(item)] += 1
    items, lines = zip(*kept, strict=True) if kept else ((), ())
    return msgspec.structs.replace(
        template, id=architecture, items=items, lines=lines, template=False, left_out=dict(left_out)
    )


def of_models(item: Item) -> str:
    """The features of the models that an item speaks of, in words; empty for all models."""
    return in_words(item.needs, item.lacks)


def shown_id(checklist: Checklist, item: Item) -> str:
    """An item's id where nobody said of which architecture."""
    return f"{ANY}.{item.id}" if checklist.template else item.id


def checks_by_id(checklists: Sequence[Checklist], architectures: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Id -> checks of every item that there may be, of these architectures."""
    named = {f"{name}.": True for name in architectures} | {"": False}
    return {
        f"{prefix}{item.id}": item.checks
        for checklist in checklists
        for prefix, of_template in named.items()
        for item in checklist.items
        if checklist.template is of_template
    }
