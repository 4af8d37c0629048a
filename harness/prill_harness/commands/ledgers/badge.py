"""`prill badge`: what a gate decided, as a badge."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from prill_harness.commands.shared import reporters
from prill_harness.commands.shared.declare import command as declare
from prill_harness.commands.shared.verdicts import decided, ledger_option
from prill_harness.console import Console, write
from prill_harness.records.files import write_file


@declare(name="badge", example="prill badge -o badge.svg\nprill badge --shields -o badge.json")
@ledger_option
@click.option("--shields", is_flag=True, help="The JSON of a shields.io endpoint badge instead of an SVG.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Default: stdout.")
def command(
    console: Console, ledger: Path, verdict_file: Path | None, shields: bool, output: Path | None
) -> int:
    """Show what a gate decided in a picture. The exit code tells whether it could be drawn."""
    verdict = decided(ledger, verdict_file)
    text = reporters.render("shields" if shields else "badge", verdict)
    if output is not None:
        write_file(output, text)
    elif not console.json:
        write(sys.stdout, text)
    console.emit(
        {
            "format": "shields" if shields else "badge",
            "file": str(output) if output else None,
            "text": None if output else text,
            "status": verdict.status,
        }
    )
    return 0
