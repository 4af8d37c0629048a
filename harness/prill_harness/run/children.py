"""Commands that run a module of prill in an interpreter of its own."""

from __future__ import annotations

import sys


def prill(*words: str) -> list[str]:
    """The command line of prill itself."""
    return [sys.executable, "-P", "-c", "from prill_harness.cli import main; main()", *words]


def python(module: str, *flags: str) -> list[str]:
    """The beginning of a command line; the module's arguments follow.

    -P: nothing is imported from the current folder. A `random.py` or a `tokenizers/` there would otherwise
    run in every cell, and could write the cell's verdict.
    """
    return [sys.executable, "-P", *flags, "-m", module]
