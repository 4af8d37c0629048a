"""The shell command that runs the same thing again."""

from __future__ import annotations

import shlex

from prill_harness.records.evidence import Cell, builtin
from prill_harness.records.names import suite_of
from prill_harness.witness.second import asked


def words(command: str, *names: str, **options: object) -> list[str]:
    """The words of `prill COMMAND --option value ... NAME ...`, without `prill`.

    Args:
        options: by their long names; those that are None or empty are left out.
    """
    said = {f"--{option}": str(value) for option, value in options.items() if value not in (None, "")}
    return [command, *(word for pair in said.items() for word in pair), *names]


def shell(command: list[str]) -> str:
    """The words of a command, quoted for a shell."""
    return str(builtin(shlex.join(["prill", *command])))


def line(command: str, *names: str, **options: object) -> str:
    """`shell` of `words`."""
    return shell(words(command, *names, **options))


def cell(cell: Cell, spec: str, *checks: str) -> str:
    """The command that runs checks of a cell alone, in the folder where the cell ran.

    Args:
        spec: opens the cell's model here; empty where that is its name.
        checks: those of other suites are dropped; if there are none, the cell's whole suites are run.
    """
    suites = cell.suite.split("+")
    mine = [check for check in checks if suite_of(check) in suites]
    device = "" if cell.device == "cpu" else cell.device
    return line(
        "run",
        *dict.fromkeys(mine or suites),
        engine=cell.engine,
        model=spec or cell.model,
        device=device,
        second=asked(),
    )
