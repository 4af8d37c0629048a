"""End the processes that a finished cell started and left behind, in whatever session they are.

Whatever ran before the first cell is nobody's orphan and is not looked at again: on a host with a hundred
processes, looking at all of them took longer than many a cell.
"""

# A Path for each of a thousand descriptors takes longer than reading them.
# ruff: noqa: PTH115, PTH116, PTH123, PTH208
from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

CELL_VARIABLE = "PRILL_CELL"
"""Set to the cell's log in the environment of all it starts: a daemon leaves the group but keeps this."""


def bystanders() -> set[int]:
    """The ids of all processes that run now; only Linux can tell."""
    if not sys.platform.startswith("linux"):
        return set()
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def end(log: Path, others: set[int]) -> None:
    """Kill every process that has the cell's mark or its log open.

    Args:
        others: `bystanders` of a time when no cell ran; those that have ended since are taken out, for their
            ids will be given to new processes.
    """
    running = bystanders()
    others &= running
    mark = f"{CELL_VARIABLE}={log}".encode("utf-8", "surrogateescape")
    for pid in running - others - {os.getpid()}:
        with contextlib.suppress(OSError):
            mine = os.stat(f"/proc/{pid}").st_uid == os.geteuid()
            if mine and (_marked(pid, mark) or _holds(pid, str(log))):
                os.kill(pid, signal.SIGKILL)


def _marked(pid: int, mark: bytes) -> bool:
    with open(f"/proc/{pid}/environ", "rb") as environment:
        return mark in environment.read().split(b"\0")


def _holds(pid: int, log: str) -> bool:
    folder = f"/proc/{pid}/fd"
    return any(os.readlink(f"{folder}/{name}") == log for name in os.listdir(folder))
