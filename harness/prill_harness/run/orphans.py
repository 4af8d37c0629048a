"""End the processes that a finished cell started and left behind, in whatever session they are."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

CELL_VARIABLE = "PRILL_CELL"
"""Set to the cell's log in the environment of all it starts: a daemon leaves the group but keeps this."""


def end(log: Path) -> None:
    """Kill every process that has the cell's mark or its log open; only Linux can tell."""
    if sys.platform.startswith("linux"):
        for pid in _of(log):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _of(log: Path) -> Iterator[int]:
    mark = f"{CELL_VARIABLE}={log}".encode("utf-8", "surrogateescape")
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if folder.stat().st_uid == os.geteuid() and (_marked(folder, mark) or _holds(folder, log)):
                    yield int(folder.name)


def _marked(folder: Path, mark: bytes) -> bool:
    return mark in (folder / "environ").read_bytes().split(b"\0")


def _holds(folder: Path, log: Path) -> bool:
    return any(link.readlink() == log for link in (folder / "fd").iterdir())
