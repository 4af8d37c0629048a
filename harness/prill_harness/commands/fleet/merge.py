"""`prill merge`: one ledger from those of several shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from prill_harness.commands.shared.declare import command as declare
from prill_harness.commands.shared.merged import merged
from prill_harness.console import Console
from prill_harness.plan.plan import build
from prill_harness.plan.policy import load_policy
from prill_harness.records.evidence import CellEnded, Evidence


@declare(
    name="merge",
    example="prill merge out/1/ledger.jsonl out/2/ledger.jsonl\n"
    "prill merge shards/*/ledger.jsonl -o out/ledger.jsonl --gate architectures",
)
@click.argument("ledgers", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False),
              default=Path("out/ledger.jsonl"), show_default=True,
              help="The one ledger; it may be among those given.")  # fmt: skip
@click.option("--gate", metavar="NAME", help="Refuse a cell that this gate's plan lacks or asks for in vain.")
@click.option(
    "--policy",
    type=click.Path(path_type=Path),
    help="Of --gate; default: ci/gates.toml, or the packaged one.",
)
def command(
    console: Console, ledgers: Sequence[Path], output: Path, gate: str | None, policy: Path | None
) -> int:
    """Put the ledgers of several shards together; the same one twice counts once.

    Two that differ about one cell are refused. `prill gate --from` decides on what is written.
    """
    plan = None
    if gate is not None:
        found = load_policy(policy)
        plan = build(found.gate(gate), folder=found.folder)
    records = merged(ledgers, output, plan)
    cells = {record.cell for record in records if isinstance(record, CellEnded)}
    checks = sum(isinstance(record, Evidence) for record in records)
    console.emit({"ledger": str(output), "cells": sorted(cell.id for cell in cells), "checks": checks})
    console.line(f"{len(cells)} cells that ended, {checks} checks; decide with `prill gate --from {output}`")
    console.line(f"written: {output}")
    return 0
