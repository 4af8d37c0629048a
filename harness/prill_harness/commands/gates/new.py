"""`prill new`: begin an engine, an architecture, a suite or a policy; nothing passes until it is filled."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

import click

from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.plan.policy import LOCAL_POLICY
from prill_harness.records.catalog import suites
from prill_harness.records.files import write_file
from prill_runtime.errors import UsageError

TEMPLATES = Path(__file__).parents[1] / "templates"
SUFFIX, NEXT = ".tmpl", "next.txt"
INTO = click.option("--into", type=click.Path(path_type=Path, file_okay=False), default=Path(),
                    help="Folder that gets the folder NAME; default: the current one.")  # fmt: skip


@click.group(name="new", epilog="\b\nExample:\n  prill new engine py mine")
def command() -> None:
    """Write the beginning of an engine, an architecture, a suite or a policy; nothing is overwritten."""


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


@declare(parent=command, name="gate", example="prill new gate merge")
@click.argument("name", default="merge")
def gate(console: Console, name: str) -> int:
    """Write ci/gates.toml, a policy of the gates NAME and release, every key of it explained."""
    if name == "release":
        hint = "the policy has a gate of this name, which builds on yours"
        raise UsageError("not a name for a gate", where="prill new", got=repr(name), hint=hint)
    return _written(console, "gate", name, LOCAL_POLICY.parent, LOCAL_POLICY)


def generate(console: Console, template: str, name: str, into: Path) -> int:
    """Write a template's files into the folder `into`/`name`, and print what to do next.

    Raises:
        UsageError: a name that cannot be one of a module, or a folder that is there already.
    """
    return _written(console, template, name, into / name, into / name)


def _written(console: Console, template: str, name: str, target: Path, new: Path) -> int:
    """As `generate`, into the folder `target`; `new` must not be there."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        expected = "small letters, digits and _, a letter first, no keyword of Python"
        raise UsageError("not a name for a module", where="prill new", expected=expected, got=repr(name))
    source = TEMPLATES / template
    if new.exists() or new.is_symlink():
        hint = "choose another name, or another --into" if new == target else "edit it"
        raise UsageError("is there already, and nothing is overwritten", where=str(new), hint=hint)
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
