"""The plan of a gate: its cells in order, with the user's overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import msgspec

from prill_harness.plan import beside
from prill_harness.plan.given import named
from prill_harness.plan.policy import Gate
from prill_harness.records.evidence import Cell
from prill_harness.records.names import suite_of
from prill_runtime.errors import NothingSelected, UsageError


class Plan(msgspec.Struct, frozen=True):
    """The cells of one run, in order.

    Attributes:
        checks: run these check ids alone; empty for all.
        folder: where suites of the user's own lie, beside the packaged ones; None: there are none.
        given: the spec that opens a model here, by the name in its cells; absent if they are equal.
        cells_per_gpu: how many may run on one GPU at a time.
    """

    gate: str
    cells: tuple[Cell, ...]
    checks: tuple[str, ...] = ()
    folder: Path | None = None
    given: Mapping[str, str] = {}
    cells_per_gpu: int = 1

    def spec(self, cell: Cell) -> str:
        """The spec that opens the cell's model on this machine."""
        return self.given.get(cell.model, cell.model)


def build(
    gate: Gate,
    engines: Sequence[str] = (),
    models: Sequence[str] = (),
    suites: Sequence[str] = (),
    *,
    checks: Sequence[str] = (),
    folder: Path | None = None,
) -> Plan:
    """The gate's cells, with engines and models replaced and suites and checks restricted, if given.

    Cells carry the names of their models, which are the same on every machine.

    Raises:
        UsageError: a suite that the gate does not run, or that does not exist.
        NothingSelected: no cell is left.
    """
    offered = dict.fromkeys(s for entry in gate.plan for s in entry.suites)
    wanted = dict.fromkeys([*suites, *(suite_of(check) for check in checks)])
    for suite in wanted:
        if suite not in offered:
            expected = " or ".join(offered)
            raise UsageError(
                "the gate has no such suite", where=gate.name, expected=expected, got=repr(suite)
            )
    names = named(models or [model for entry in gate.plan for model in entry.models])
    cells = [
        msgspec.structs.replace(cell, model=names[cell.model])
        for cell in cells_of(gate, engines, models)
        if not wanted or cell.suite in wanted
    ]
    for suite in dict.fromkeys(cell.suite for cell in cells):
        beside.suite_file(suite, folder)
    if not cells:
        raise NothingSelected("the selection leaves no cell", where=f"gate {gate.name}")
    mine, given = tuple(dict.fromkeys(cells)), openers(names)
    return Plan(gate.name, mine, tuple(checks), folder, given, gate.cells_per_gpu)


def openers(names: Mapping[str, str]) -> dict[str, str]:
    """Name -> its first spec: the inverse of `given.named`."""
    return {name: spec for spec, name in reversed(list(names.items()))}


def cells_of(gate: Gate, engines: Sequence[str] = (), models: Sequence[str] = ()) -> tuple[Cell, ...]:
    """Every cell of the gate once, in order, with engines and models replaced if given."""
    cells = (
        Cell(model, engine, suite, device)
        for entry in gate.plan
        for model, engine, suite, device in product(
            models or entry.models, engines or entry.engines, entry.suites, entry.devices
        )
    )
    return tuple(dict.fromkeys(cells))


def shard(plan: Plan, index: int, count: int) -> Plan:
    """Part `index` (from 1) of `count`: every cell is in exactly one part, independent of the plan's order.

    Raises:
        UsageError: index or count out of range.
        NothingSelected: more parts than cells.
    """
    if not 1 <= index <= count:
        raise UsageError("no such shard", expected=f"1/{count} to {count}/{count}", got=f"{index}/{count}")
    mine = set(sorted(plan.cells, key=lambda cell: cell.id)[index - 1 :: count])
    if not mine:
        raise NothingSelected("the shard is empty", got=f"{index}/{count} of {len(plan.cells)} cells")
    return msgspec.structs.replace(plan, cells=tuple(cell for cell in plan.cells if cell in mine))
