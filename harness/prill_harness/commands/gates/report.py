"""`prill report`: render a verdict in one format."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from prill_harness.commands.shared import reporters
from prill_harness.commands.shared.declare import command as declare
from prill_harness.commands.shared.verdicts import decided, ledger_option
from prill_harness.console import Console, write
from prill_harness.incidents.history import FILE
from prill_harness.records.files import write_file
from prill_runtime.errors import UsageError


@declare(
    name="report",
    example="prill report markdown\nprill report sprint --lint ruff.sarif\n"
    "prill report --ledger out/ledger.jsonl --format junit --dialect jenkins-strict -o junit.xml",
)
@click.argument("named", metavar="[FORMAT]", required=False)
@ledger_option
@click.option(
    "--format", "form", help=f"The same as FORMAT: {', '.join(reporters.installed())}; default: markdown."
)
@click.option("--dialect", default="default", show_default=True, help="Of junit: default or jenkins-strict.")
@click.option("--history", type=click.Path(path_type=Path), metavar="FILE|FOLDER",
              help="Of sprint: earlier gates; default: history.jsonl beside the ledger.")  # fmt: skip
@click.option("--lint", type=click.Path(path_type=Path, dir_okay=False), metavar="SARIF",
              help="Of sprint: what a linter found.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Default: stdout.")
def command(
    console: Console,
    named: str | None,
    ledger: Path,
    verdict_file: Path | None,
    form: str | None,
    dialect: str,
    history: Path | None,
    lint: Path | None,
    output: Path | None,
) -> int:
    """Render the report of a gate that ran in FORMAT. The exit code tells whether it could be rendered."""
    if named and form and named != form:
        raise UsageError(
            "two formats for one report", expected="FORMAT or --format", got=f"{named} and {form}"
        )
    form = named or form or "markdown"
    verdict = decided(ledger, verdict_file)
    past = {"history": str(history or ledger.with_name(FILE)), "lint": str(lint or "")}
    text = reporters.render(form, verdict, {"dialect": dialect, **past, **reporters.beside(ledger.parent)})
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
