"""`prill show`: open what one check found, as it was recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from prill_harness.commands.ledgers import parting
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.records.evidence import Evidence, Metric, badness, checks
from prill_harness.records.ledger import audited
from prill_harness.records.names import look_up
from prill_runtime.errors import UsageError

CASES = "divergences"
"""Where a check's detail holds a list of places at which texts part."""


@declare(name="show", example="prill show tokens.greedy\nprill show tokens.greedy --cell gpt2 --all")
@click.argument("check")
@click.option(
    "--ledger",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("out/ledger.jsonl"),
    show_default=True,
    help="What the cells saw.",
)
@click.option("--cell", "part", default="", metavar="TEXT", help="Only cells with this in their name.")
@click.option("--all", "every", is_flag=True, help="All cells and all places, not only the worst.")
def command(console: Console, check: str, ledger: Path, part: str, every: bool) -> int:
    """Show what CHECK found where it is worst: texts with the place where they part, tokens, best candidates.

    Runs nothing. The exit code tells whether there was something to show.
    """
    if not ledger.is_file():
        raise UsageError("no such ledger", where=str(ledger), hint="run prill gate first, or name one")
    records = [record for record in audited(ledger) if isinstance(record, Evidence)]
    found = _chosen(records, check, part, ledger)
    shown = found if every else found[:1]
    attempts = {id(each): _attempts(records, each) for each in shown}
    console.emit(
        {
            "shown": [{"evidence": each, "attempts": attempts[id(each)]} for each in shown],
            "others": [
                {"cell": e.cell.id, "check": e.check, "status": e.status} for e in found[len(shown) :]
            ],
        }
    )
    for each in shown:
        _show(console, each, attempts[id(each)], every)
    for other in found[len(shown) :]:
        console.line(
            f"also {other.status.value} in {other.cell.id}: {other.check}", status=other.status.value
        )
    return 0


def _chosen(records: Sequence[Evidence], check: str, part: str, ledger: Path) -> list[Evidence]:
    """The evidence that counts of a check, of every parameter if none is named, the worst first.

    Raises:
        UsageError: the ledger knows no such check, or not in such a cell.
    """
    counted = checks(records).values()
    mine = [each for each in counted if check in (each.check, each.base)]
    if not mine:
        look_up(
            check, sorted({each.base for each in counted}), "no evidence of this check", where=str(ledger)
        )
    held = [each for each in mine if part in each.cell.id]
    if not held:
        raise UsageError(
            "no such cell",
            where=f"--cell, {check} in {ledger}",
            expected=" or ".join(sorted({each.cell.id for each in mine})[:6]),
            got=repr(part),
        )
    return sorted(held, key=lambda each: (badness(each.status), each.cell, each.check))


def _attempts(records: Sequence[Evidence], counted: Evidence) -> list[Evidence]:
    """Every record of the check in its cell, where there are several."""
    mine = [each for each in records if (each.cell, each.check) == (counted.cell, counted.check)]
    return mine if len(mine) > 1 else []


def _show(console: Console, found: Evidence, attempts: Sequence[Evidence], every: bool) -> None:
    console.line(f"{found.status.value}  {found.check}  {found.cell.id}", status=found.status.value)
    console.line(found.sentence)
    for number, each in enumerate(attempts, 1):
        console.line(f"  attempt {number}: {each.status.value}: {each.sentence}", status=each.status.value)
    against = f" with {found.oracle}" if found.oracle else ""
    console.line(f"{found.observed} values compared{against}")
    if found.metrics:
        console.table(("figure", "value", "bound"), [_row(metric) for metric in found.metrics])
    rest = _unsaid(found.detail, found)
    cases = rest.pop(CASES, None) or []
    if rest:
        parting.show(console, rest)
    for number, case in enumerate(cases if every else cases[:1], 1):
        console.line()
        console.line(f"place {number} of {len(cases)}")
        parting.show(console, _unsaid(case, found))
    if len(cases) > 1 and not every:
        console.line(f"... and {len(cases) - 1} more; --all shows them")
    console.line(f"reproduce: {found.reproduce}")


def _unsaid(detail: Mapping[str, Any], found: Evidence) -> dict[str, Any]:
    """The detail without texts that the sentence has already."""
    return {k: v for k, v in detail.items() if not (isinstance(v, str) and v and v in found.sentence)}


def _row(metric: Metric) -> tuple[str, str, str]:
    value = "not finite" if metric.value is None else f"{metric.value:.6g}"
    return metric.name, value, "" if metric.bound is None else f"{metric.relation} {metric.bound:.6g}"
