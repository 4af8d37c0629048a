"""`prill new`: begin an engine, an architecture or a suite; nothing passes until it is filled."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

import click

from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.records.catalog import suites
from prill_harness.records.files import write_file
from prill_runtime.errors import UsageError

TEMPLATES = Path(__file__).parents[1] / "templates"
SUFFIX, NEXT = ".tmpl", "next.txt"
INTO = click.option("--into", type=click.Path(path_type=Path, file_okay=False), default=Path(),
                    help="Folder that gets the folder NAME; default: the current one.")  # fmt: skip


@click.group(name="new", epilog="\b\nExample:\n  prill new engine py mine")
def command() -> None:
    """Write the beginning of an engine, an architecture or a suite; its gate fails until it is filled."""


@declare(parent=command, name="engine", example="prill new engine py mine\nprill new engine capi mine")
@click.argument("kind", type=click.Choice(["py", "exec", "capi"]))
@click.argument("name")
@INTO
def engine(console: Console, kind: str, name: str, into: Path) -> int:
    """Begin the engine NAME: a class in Python, a program that answers JSON lines, or a library in C."""
    return generate(console, f"engine-{kind}", name, into)


@declare(parent=command, name="adapter", example="prill new adapter magpie")
@click.argument("name")
@INTO
def adapter(console: Console, name: str, into: Path) -> int:
    """Begin a package that describes the architecture NAME, with the second reading that judges it."""
    return generate(console, "adapter", name, into)


@declare(parent=command, name="suite", example="prill new suite mine")
@click.argument("name")
@INTO
def suite(console: Console, name: str, into: Path) -> int:
    """Begin the suite NAME: a check, its checklist, and the policy by which they enter a gate."""
    if name in suites():
        raise UsageError("a suite of prill has this name", where="prill new suite", got=repr(name))
    return generate(console, "suite", name, into)


def generate(console: Console, template: str, name: str, into: Path) -> int:
    """Write a template's files into the folder `into`/`name`, and print what to do next.

    Raises:
        UsageError: a name that cannot be one of a module, or a folder that is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        expected = "small letters, digits and _, a letter first, no keyword of Python"
        raise UsageError("not a name for a module", where="prill new", expected=expected, got=repr(name))
    target, source = into / name, TEMPLATES / template
    if target.exists() or target.is_symlink():
        hint = "choose another name, or another --into"
        raise UsageError("is there already, and nothing is overwritten", where=str(target), hint=hint)
    class_name = "".join(part.capitalize() for part in name.split("_"))

    def filled(text: str) -> str:
        return text.replace("@NAME@", name).replace("@CLASS@", class_name)

    files = []
    for file in sorted(source.rglob(f"*{SUFFIX}")):
        written = target / filled(str(file.relative_to(source))).removesuffix(SUFFIX)
        written.parent.mkdir(parents=True, exist_ok=True)
        write_file(written, filled(file.read_text("utf-8")))
        files.append(str(written))
    steps = filled((source / NEXT).read_text("utf-8")).splitlines()
    console.emit({"files": files, "next": steps})
    console.line(f"written: {', '.join(files)}")
    for step in steps:
        console.line(f"next: {step}")
    return 0
