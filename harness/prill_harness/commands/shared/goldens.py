"""Record the goldens that a plan's models lack before its cells begin, with progress shown."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from prill_harness.console import Console
from prill_harness.plan.beside import holds
from prill_harness.records.catalog import takes
from prill_harness.records.evidence import Cell
from prill_harness.run.children import prill
from prill_runtime.errors import PrillError

RECORD = prill("golden", "record", "--keep")


def unrecorded(spec: str) -> Path | None:
    """Path of the golden that a user's file lacks; None if it has one, or cannot be read."""
    from prill_harness.engines.models import fixture_name, resolve_model
    from prill_harness.tokens.golden import kept_at

    if fixture_name(spec) is not None:
        return None
    try:
        kept = kept_at(resolve_model(spec))
    except (PrillError, OSError):
        return None
    return None if kept.exists() else kept


def announce(console: Console, model: str, target: Path) -> None:
    """Say what is about to take a while, and where its result will be."""
    console.remark(f"recording the golden of {model}, once for this file: {target}")


def prepare(
    cells: Iterable[Cell], specs: Mapping[str, str], folder: Path | None, *, quiet: bool = False
) -> None:
    """Record the goldens that the cells' suites would otherwise record silently.

    This runs in a process of its own: if it dies nothing else does, and the cells then say what they miss.
    """
    cells = tuple(cells)
    for model in dict.fromkeys(cell.model for cell in cells):
        spec = specs.get(model, model)
        suites = {cell.suite for cell in cells if cell.model == model}
        wanted = (takes(suite, "golden", folder if holds(folder, suite) else None) for suite in suites)
        if unrecorded(spec) is not None and any(wanted):
            words = [*RECORD, *(["--quiet"] if quiet else []), spec]
            subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
