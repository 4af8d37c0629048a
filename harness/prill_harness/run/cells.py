"""One cell on the command line in; its ledger, written by pytest in this fresh process, out."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from prill_harness.records.catalog import suite_file
from prill_harness.records.evidence import Cell
from prill_harness.run.children import python

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PYTHON = python("prill_harness.run.cells")


def arguments(
    cell: Cell, ledger: Path, folder: Path | None, checks: Sequence[str] = (), spec: str = ""
) -> list[str]:
    """What `main` gets to run `cell`, in a process of its own, and append to `ledger`.

    Args:
        spec: opens the cell's model here; empty where that is its name.
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
    return words + [word for check in checks for word in ("--check", check)]


def command(cell: Cell, ledger: Path, folder: Path | None, checks: Sequence[str] = ()) -> list[str]:
    """The command that does it."""
    return [*PYTHON, *arguments(cell, ledger, folder, checks)]


# glibc: large arrays that are freed stay with the process, which asks for them again at once. A tenth of a
# cell's time was fresh pages. Leaks are looked for in processes of their own, which see memory as it is.
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def environment(jobs: int) -> dict[str, str]:
    """A cell's environment: without the caller's pytest settings, and with one BLAS thread, so that the sums
    of a cell are the same however many run beside it. Alone it may have as many as the caller asks for."""
    # A gate starts dozens of processes: without kept bytecode each compiles everything again. Without
    # docstrings and assertions checks and faults are not what they say.
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
    parser.add_argument("--suite-path", type=Path)
    parser.add_argument("--check", action="append", default=[])
    asked = parser.parse_args(given)
    _end_with_parent()
    # Suites joined by + share the process; each is still a cell of its own, named after its file.
    suites = asked.suite.split("+")
    files = [suite_file(name, asked.suite_path).resolve() for name in suites]
    file = files[0]
    # A lone path, an empty ini file and no folders above it: nothing of the caller's project takes part.
    options = ["-p", "prill_harness.plugin", "-p", "no:cacheprovider", "-c", os.devnull, "-q", "--tb=short"]
    options.append("--capture=no")  # what an engine prints goes to the cell's log, and into nobody's memory
    options += ["--import-mode=importlib", f"--rootdir={file.parent}", f"--confcutdir={file.parent}"]
    for name in ("model", "engine", *("suite",)[: len(suites) == 1], "device", "ledger"):
        options.append(f"--prill-{name}={getattr(asked, name)}")
    options.append(f"--prill-model-name={asked.model_name}")
    options += [f"--prill-check={check}" for check in asked.check]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import pytest

    return int(pytest.main([*options, *map(str, files)]))


def _end_with_parent() -> None:
    """The parent holds the other end of stdin: when it dies, so does the cell, which nobody would read."""
    channel = os.dup(sys.stdin.fileno())  # pytest replaces descriptor 0

    def watch() -> None:
        while os.read(channel, 1):
            pass
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
