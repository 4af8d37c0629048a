"""Checklists of a user's own, in the folder `checklists` of the suites that a policy names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from prill_harness.decide.checklist import Checklist, checklist_names, load_checklists
from prill_harness.faults.catalogue import known
from prill_harness.faults.trial.matrix import claims
from prill_harness.plan.beside import check_ids
from prill_harness.records.names import look_up
from prill_runtime.errors import ChecklistError, PolicyError


def own_names(folder: Path | None) -> tuple[str, ...]:
    """Names of the checklists of the folder of suites."""
    return checklist_names(folder / "checklists") if folder else ()


def checklists(names: Collection[str] | None, folder: Path | None) -> tuple[Checklist, ...]:
    """Read the packaged checklists and those of the folder; None: all of both.

    Raises:
        UsageError, ChecklistError: as `load_checklists`; a name or an item id that prill has already.
    """
    own = own_names(folder)
    if not own or folder is None:
        return load_checklists(names)
    for name in sorted(set(own) & set(checklist_names())):
        raise ChecklistError("prill has a checklist of this name", where=str(folder), got=repr(name))
    packaged = load_checklists(None if names is None else [name for name in names if name not in own])
    wanted = [name for name in own if names is None or name in names]
    mine = load_checklists(wanted, folder=folder / "checklists", known=check_ids(folder))
    taken = {item.id for checklist in load_checklists() for item in checklist.items}
    for checklist in mine:
        for item in checklist.items:
            if item.id in taken:
                raise ChecklistError(
                    "prill has an item of this id", where=str(checklist.path), got=repr(item.id)
                )
    return (*packaged, *mine)


def claimed(folder: Path) -> dict[str, tuple[str, ...]]:
    """Check id -> the planted faults that it claims to kill, of the folder's suites.

    Raises:
        PolicyError: a claim that cannot be read from the source, or that names no planted fault.
    """
    try:
        found = claims(folder)
    except ValueError:
        expected = 'kills=("NAME", ...) in the source, or a constant of the module'
        raise PolicyError("kills= is not written out", where=str(folder), expected=expected) from None
    faults, hint = known(), "`prill faults list` shows them"
    for check, names in found.items():
        for name in names:
            what = f"the check {check} claims to kill {name!r}, which is no planted fault"
            look_up(name, faults, what, where=str(folder), hint=hint, error=PolicyError)
    return found
