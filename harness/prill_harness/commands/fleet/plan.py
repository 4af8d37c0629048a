"""`prill plan`: what a gate would run, why, and for how long, before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
import msgspec

from prill_harness.commands.shared import door
from prill_harness.commands.shared.declare import SPECS, Part
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.decide import entries
from prill_harness.decide.checklist import Item
from prill_harness.decide.own import checklists
from prill_harness.plan.estimate import NEVER, each, estimate, recorded_in
from prill_harness.plan.plan import Plan, build, cells_of, shard
from prill_harness.plan.policy import Gate, Policy, load_policy
from prill_harness.records.evidence import Cell
from prill_harness.records.names import suite_of
from prill_harness.run.executor import ledger_path, resumable
from prill_harness.run.leases import wanted


class PlannedCell(msgspec.Struct, frozen=True):
    """One cell of a plan.

    Attributes:
        gate: the oldest gate of the chain that asks for the suite; empty: the command line alone does.
        items: of its checklists, those that the suite has checks for, whichever its models have features for.
        seconds: expected; None where nobody knows; `by` says by what.
        kept: it has a final record that still stands, and --resume would not run it.
    """

    cell: Cell
    gate: str
    items: tuple[str, ...]
    seconds: float | None
    by: str
    gpu: bool
    kept: bool


@declare(
    name="plan",
    example="prill plan\nprill plan release --engine cuda -j 8 --json\nprill plan --shard 1/4 --resume",
    judges=True,
)
@click.argument("name", required=False)
@click.option(
    "--engine", "engines", multiple=True, metavar="SPEC", help=f"{SPECS}; replaces the plan's; repeatable."
)
@click.option("--model", "models", multiple=True, metavar="SPEC", help="Replaces the plan's; repeatable.")
@click.option("-j", "--jobs", type=click.IntRange(min=0), default=0, help="Cells at a time; 0: one per core.")
@click.option("--shard", "part", type=Part(), help="Part I of N only.")
@click.option("--resume", is_flag=True, help="Leave out what --resume would keep.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("out"),
              show_default=True, help="Where earlier runs left their ledgers.")  # fmt: skip
@click.option("--policy", "policy_file", type=click.Path(path_type=Path),
              help="Default: ci/gates.toml, or the packaged one.")  # fmt: skip
def command(
    console: Console,
    name: str | None,
    engines: Sequence[str],
    models: Sequence[str],
    jobs: int,
    part: tuple[int, int] | None,
    resume: bool,
    out: Path,
    policy_file: Path | None,
) -> int:
    """Show the cells of gate NAME, why each is run, and the time to expect; run nothing, write nothing."""
    policy = load_policy(policy_file)
    entries.examine(policy)
    gate = policy.gate(name)
    work = build(gate, engines, models, folder=policy.folder)
    door.examine((), () if models else work.given.values())
    work = shard(work, *part) if part else work
    planned = tuple(_planned(policy, gate, work, out, resume))
    todo = [one.cell for one in planned if not one.kept]
    jobs = jobs or os.cpu_count() or 2
    time = estimate(todo, recorded_in(out), jobs)
    console.emit({
        "gate": gate.name, "cells": planned, "jobs": jobs, "run": len(todo),
        "expected_s": time.seconds, "unknown": time.unknown,
    })  # fmt: skip
    columns = ("cell", "asked for by", "items", "expected", "known by")
    console.table(columns, [_row(one) for one in planned])
    kept = f", {len(planned) - len(todo)} of {len(planned)} kept" if resume else ""
    console.line(f"gate {gate.name}: {len(todo)} cells{kept}, {jobs} at a time; {time}")
    return 0


def _planned(policy: Policy, gate: Gate, work: Plan, out: Path, resume: bool) -> Iterator[PlannedCell]:
    expected = each(work.cells, recorded_in(out))
    items = [item for listed in checklists(gate.checklists, policy.folder) for item in listed.items]
    by_suite = {suite: tuple(_items(items, suite)) for suite in {cell.suite for cell in work.cells}}
    asking = _asking(policy, gate)
    for cell in work.cells:
        kept = resume and resumable(ledger_path(out, cell), cell, work)
        seconds, by = expected[cell]
        on_gpu = wanted(cell) is not None
        yield PlannedCell(cell, asking[cell.suite], by_suite[cell.suite], seconds, by, on_gpu, kept)


def _items(items: Sequence[Item], suite: str) -> Iterator[str]:
    return (item.id for item in items if any(suite_of(check) == suite for check in item.checks))


def _asking(policy: Policy, gate: Gate) -> Mapping[str, str]:
    """Suite -> the oldest gate of the chain whose plan has it."""
    oldest_first = [policy.gates[link] for link in reversed(gate.chain)]
    return {cell.suite: link.name for link in reversed(oldest_first) for cell in cells_of(link)}


def _row(one: PlannedCell) -> tuple[str, ...]:
    told = "kept" if one.kept else "?" if one.seconds is None else f"{one.seconds:.1f} s"
    more = f" and {len(one.items) - 1} more" if len(one.items) > 1 else ""
    items = f"{one.items[0]}{more}" if one.items else "none"
    return one.cell.id, one.gate, items, told, one.by if one.by != NEVER and not one.kept else ""
