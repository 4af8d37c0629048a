"""Models of a plan in; the goldens that they lack are recorded before the cells begin, in sight."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from prill_harness.console import Console
from prill_harness.records.catalog import takes
from prill_harness.records.evidence import Cell
from prill_harness.run.children import prill
from prill_runtime.errors import PrillError

RECORD = prill("golden", "record", "--keep")


def unrecorded(spec: str) -> Path | None:
    """Where the golden of a user's file will lie that has none yet; None: it has, or cannot be read."""
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
    """Say what is about to take a while, and where its result lands."""
    console.remark(f"recording the golden of {model}, once for this file: {target}")


def prepare(cells: Iterable[Cell], specs: Mapping[str, str], folder: Path | None) -> None:
    """Record what the cells' suites would each have to wait for, silently.

    A process of its own does it: one that dies takes nothing with it, and the cells then say what they miss.
    """
    cells = tuple(cells)
    for model in dict.fromkeys(cell.model for cell in cells):
        spec = specs.get(model, model)
        suites = {cell.suite for cell in cells if cell.model == model}
        if unrecorded(spec) is not None and any(takes(suite, "golden", folder) for suite in suites):
            subprocess.run([*RECORD, spec], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
