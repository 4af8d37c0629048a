"""`prill report`: render a verdict in one format."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from prill_harness.commands.shared import reporters
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console, write
from prill_harness.plan.provenance import file_digest
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Evidence, Status
from prill_harness.records.files import write_file
from prill_harness.records.verdict import Verdict
from prill_runtime.errors import UsageError, VerdictError


@declare(
    name="report",
    example="prill report --format markdown\n"
    "prill report --ledger out/ledger.jsonl --format junit --dialect jenkins-strict -o junit.xml",
)
@click.option(
    "--ledger",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("out/ledger.jsonl"),
    show_default=True,
    help="What the cells saw.",
)
@click.option(
    "--verdict",
    "verdict_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What the gate decided; default: verdict.json beside the ledger.",
)
@click.option(
    "--format",
    "form",
    default="markdown",
    show_default=True,
    help=f"One of {', '.join(reporters.installed())}.",
)
@click.option("--dialect", default="default", show_default=True, help="Of junit: default or jenkins-strict.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Default: stdout.")
def command(
    console: Console, ledger: Path, verdict_file: Path | None, form: str, dialect: str, output: Path | None
) -> int:
    """Render the report of a gate that ran. The exit code tells whether it could be rendered."""
    if not ledger.is_file():
        raise UsageError(
            "no such ledger", where=str(ledger), hint="run prill gate first, or name one with --ledger"
        )
    verdict = reporters.read_verdict(verdict_file or ledger.with_name("verdict.json"))
    _agree(verdict, ledger)
    text = reporters.render(form, verdict, {"dialect": dialect, **reporters.beside(ledger.parent)})
    if output is not None:
        write_file(output, text)
    elif not console.json:
        write(sys.stdout, text)
    console.emit(
        {
            "format": form,
            "file": str(output) if output else None,
            "text": None if output else text,
            "status": verdict.status,
        }
    )
    return 0


def _agree(verdict: Verdict, ledger: Path) -> None:
    """Check that the verdict was computed from this ledger.

    Raises:
        VerdictError: it is another ledger, or a check in the verdict differs from the ledger.
    """
    digest = file_digest(ledger)
    if verdict.ledger_sha256 != digest:
        raise VerdictError(
            "the verdict is of another ledger",
            where=str(ledger),
            expected=f"sha256 {verdict.ledger_sha256[:16]}…",
            got=f"{digest[:16]}…",
            hint="run prill gate again, or decide anew with prill gate --from",
        )
    records = [r for r in ledgers.audited(ledger) if isinstance(r, Evidence)]
    seen = {(r.cell.id, r.check, r.status, r.sentence) for r in records}
    for result in verdict.checks:
        expected = Status.FAILED if result.status is Status.WAIVED else result.status
        if (result.cell.id, result.check, expected, result.sentence) not in seen:
            found = sorted(
                {s for cell, check, s, _ in seen if (cell, check) == (result.cell.id, result.check)}
            )
            raise VerdictError(
                "the verdict is of another run than the ledger",
                where=f"{ledger}, {result.check} in {result.cell.id}",
                expected=f"{expected}: {result.sentence}",
                got=" and ".join(found) or "no record",
                hint="run prill gate again",
            )
