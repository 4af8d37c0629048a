"""Command lines go in; what the command said and its exit code come out, in process or from a child."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from click.testing import CliRunner, Result

from prill_harness import cli
from prill_harness.version import version

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"
PRILL = [sys.executable, "-c", "from prill_harness.cli import main; main()"]


def interruptible() -> None:
    """Run in a child before its program: a shell that starts tests in the background has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def emitted(printed: str) -> Any:
    """What a command printed with --json: the data in its envelope, both as their schema says.

    The published schema is open to new keys; here each key has to be in it, or the page is not whole.
    """
    document = json.loads(printed)
    closed_schema(document["command"]).validate(document)
    assert document["prill"] == version()
    return document["data"]


@cache
def closed_schema(command: str) -> jsonschema.Draft202012Validator:
    """The published schema of a command, with no key that it does not name."""
    (file,) = SCHEMAS.rglob(f"{command.replace(' ', '-')}.json")
    schema = json.loads(file.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(_closed(schema))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items()}
    return made | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else made


def invoke(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.cli, list(args), input=stdin)


def child(*args: str, safe: bool = False, **options: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, with pipes for its streams.

    Args:
        safe: without the current folder among the places modules come from, as an installed script has it.
    """
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    options = {"input": "", "timeout": 120, **options}
    return subprocess.run(
        [PRILL[0], *(["-P"] if safe else []), *PRILL[1:], *args],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        **options,
    )  # type: ignore[call-overload, no-any-return]
