"""Refuse policies and waivers with an entry that names something unknown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePath

from prill_harness.decide.checklist import checklist_names
from prill_harness.decide.own import checklists, own_names
from prill_harness.decide.templates import checks_by_id
from prill_harness.decide.waivers import Waiver
from prill_harness.engines.models import check_model
from prill_harness.engines.spec import check_device, check_judged
from prill_harness.faults.opening import check_engine
from prill_harness.plan.beside import check_ids, suites
from prill_harness.plan.policy import Gate, Policy
from prill_harness.records.names import base_of, look_up
from prill_harness.records.strict import line_of
from prill_runtime.errors import PolicyError, UsageError, WaiverError
from prill_runtime.models import registry


def examine(policy: Policy) -> None:
    """Look at every gate of a policy, also at those that are not asked for; no model file is opened.

    Raises:
        PolicyError: an unknown checklist, item of the never-list, suite, engine, fault, packaged model or
            device, or an engine that would be judged by itself.
    """
    items = _items(policy.folder)
    for gate in policy.gates.values():
        _examine_gate(gate, policy.path, items, policy.folder)


def _examine_gate(gate: Gate, path: Path, items: Collection[str], folder: Path | None) -> None:
    def at(word: str) -> str:
        lines = (line_of(path, f'"{word}"', name) for name in (*gate.chain, ""))
        return f"{path}{next(filter(None, lines), '')}, gate {gate.name}"

    for name in gate.checklists:
        what, hint = "names an unknown checklist", "every architecture's is made of `model`"
        look_up(
            name, (*checklist_names(), *own_names(folder)), what, where=at(name), hint=hint, error=PolicyError
        )
    for name in sorted(gate.never_waive):
        look_up(name, items, "the never-list names an unknown item", where=at(name), error=PolicyError)
    for entry in gate.plan:
        for suite in entry.suites:
            look_up(suite, suites(folder), "no such suite", where=at(suite), error=PolicyError)
        for engine in entry.engines:
            _within(at(engine), PolicyError, check_engine, engine)
            _within(at(engine), PolicyError, check_judged, engine)
        for model in entry.models:
            _within(at(model), PolicyError, lambda spec: check_model(spec, opened=False), model)
        for device in entry.devices:
            _within(at(device), PolicyError, check_device, device)


def examine_waivers(waivers: Sequence[Waiver], path: Path, folder: Path | None = None) -> None:
    """Look at what waivers speak of: any packaged checklist's items, whichever the gate asks for, of any
    architecture that is described.

    Raises:
        WaiverError: an unknown item, a check that the item does not count, an unknown engine, fault, packaged
            model or device.
    """
    if not waivers:
        return
    counted = _items(folder)
    for waiver in waivers:
        where = f"{path}, waiver {waiver.id}"
        look_up(waiver.item, counted, "names an unknown item", where=where, error=WaiverError)
        base = base_of(waiver.check)
        look_up(base, check_ids(folder), "names an unknown check", where=where, error=WaiverError)
        what = f"names a check that {waiver.item} does not count"
        look_up(base, counted[waiver.item], what, where=where, error=WaiverError)
        _within(where, WaiverError, check_engine, waiver.conditions.engine)
        _within(where, WaiverError, check_device, waiver.conditions.device)
        model = waiver.conditions.model
        if PurePath(model).is_absolute():
            what = "names a model by a machine's path, which no cell carries"
            raise WaiverError(what, where=where, expected="its name in the reports", got=repr(model))
        if model:
            _within(where, WaiverError, lambda spec: check_model(spec, opened=False), model)


def _items(folder: Path | None) -> dict[str, tuple[str, ...]]:
    return checks_by_id(checklists(None, folder), registry.names())


def _within(where: str, error: type[UsageError], look: Callable[[str], object], word: str) -> None:
    """`look` at a word of a file; what it refuses is said of the file."""
    try:
        look(word)
    except UsageError as found:
        raise error(
            found.what, where=where, expected=found.expected, got=found.got, hint=found.hint
        ) from found
