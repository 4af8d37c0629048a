"""Run one cell in this fresh process: pytest writes its ledger."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from prill_harness.plan.beside import suite_file
from prill_harness.records.evidence import Cell
from prill_harness.run.children import python

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PYTHON = python("prill_harness.run.cells")


def arguments(
    cell: Cell,
    ledger: Path,
    folder: Path | None,
    checks: Sequence[str] = (),
    spec: str = "",
    attempt: int = 1,
) -> list[str]:
    """The arguments with which `main` runs `cell`, in a process of its own, and appends to `ledger`.

    Args:
        spec: opens the cell's model here; empty if the model's name does.
    """
    words = [
        "--model",
        spec or cell.model,
        "--model-name",
        cell.model,
        "--engine",
        cell.engine,
        "--suite",
        cell.suite,
        "--device",
        cell.device,
    ]
    words += ["--ledger", str(ledger), *(["--suite-path", str(folder)] if folder else [])]
    words += ["--attempt", str(attempt)]
    return words + [word for check in checks for word in ("--check", check)]


def command(cell: Cell, ledger: Path, folder: Path | None, checks: Sequence[str] = ()) -> list[str]:
    """The command that does so."""
    return [*PYTHON, *arguments(cell, ledger, folder, checks)]


# glibc: keep large freed arrays in the process, which will ask for them again at once; fresh pages took a
# tenth of a cell's time. Leak probes have processes of their own, where these are not set.
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def environment(jobs: int) -> dict[str, str]:
    """A cell's environment: without the caller's pytest settings, and with one BLAS thread, so that a cell's
    sums do not depend on how many run beside it. A cell that runs alone may have as many as the caller
    asks."""
    # A gate starts dozens of processes; without cached bytecode each would compile everything again. Without
    # docstrings and assertions (-O, -OO) checks and faults would not be what they say.
    dropped = ("PYTEST_", "PYTHONDONTWRITEBYTECODE", "PYTHONOPTIMIZE")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    threads = dict.fromkeys(THREADS, "1")
    return inherited | threads if jobs > 1 else threads | inherited


def main(given: Sequence[str] | None = None) -> int:
    """Run one cell; pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m prill_harness.run.cells", description=__doc__)
    for name in ("model", "engine", "suite", "device", "ledger"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--attempt", default="1")
    parser.add_argument("--suite-path", type=Path)
    parser.add_argument("--check", action="append", default=[])
    asked = parser.parse_args(given)
    _end_with_parent()
    # Suites joined by + share the process; each is a cell of its own all the same, named after its file.
    suites = asked.suite.split("+")
    files = [suite_file(name, asked.suite_path).resolve() for name in suites]
    file = files[0]
    # One path, an empty ini file and no parent folders: nothing of the caller's project takes part.
    options = ["-p", "prill_harness.plugin", "-p", "no:cacheprovider", "-c", os.devnull, "-q", "--tb=short"]
    options.append("--capture=no")  # what an engine prints goes to the cell's log and is not held in memory
    options += ["--import-mode=importlib", f"--rootdir={file.parent}", f"--confcutdir={file.parent}"]
    for name in ("model", "engine", *("suite",)[: len(suites) == 1], "device", "ledger"):
        options.append(f"--prill-{name}={getattr(asked, name)}")
    options += [f"--prill-model-name={asked.model_name}", f"--prill-attempt={asked.attempt}"]
    options += [f"--prill-check={check}" for check in asked.check]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import pytest

    return int(pytest.main([*options, *map(str, files)]))


def _end_with_parent() -> None:
    """End the cell when its parent, which holds the other end of stdin, dies: nobody reads its ledger."""
    channel = os.dup(sys.stdin.fileno())  # pytest replaces descriptor 0

    def watch() -> None:
        while os.read(channel, 1):
            pass
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
