"""Command lines go in; what the command said and its exit code come out, in process or from a child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from click.testing import CliRunner, Result

from prill_harness import cli

PRILL = [sys.executable, "-c", "from prill_harness.cli import main; main()"]


def interruptible() -> None:
    """Run in a child before its program: a shell that starts tests in the background has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
