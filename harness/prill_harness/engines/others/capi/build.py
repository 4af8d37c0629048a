"""The example engine and the worker in C, compiled on first use."""

from __future__ import annotations

import shlex
from pathlib import Path

from prill_harness.engines.others.capi.compiler import compiled

FLAGS = ("-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra")
ENGINE = ("calls.c", "objects.c", "file.c", "forward.c")
HEADERS = ("prill_engine.h", "engine.h")


def example() -> Path:
    """The example engine as a library.

    Raises:
        Inconclusive: no C compiler, or the compiler fails.
    """
    return compiled(
        "the example engine", _files(*ENGINE, *HEADERS), (*FLAGS, "-shared"), "example.so", "capi"
    )


def worker() -> Path:
    """The example worker, a program that answers JSON lines.

    Raises:
        Inconclusive: as for `example`.
    """
    return compiled("the example worker", _files("worker.c", *ENGINE, *HEADERS), FLAGS, "worker", "capi")


def worker_command() -> str:
    """The worker as a command of `exec:`. Raises Inconclusive: as for `example`."""
    return shlex.quote(str(worker()))


def _files(*names: str) -> list[Path]:
    return [Path(__file__).with_name(name) for name in names]
