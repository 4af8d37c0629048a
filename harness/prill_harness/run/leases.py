"""GPUs, leased to cells: a lock file for each, inside what the caller may see, taken before CUDA starts.

The driver is asked which GPUs those are, in a process of its own: it alone knows what CUDA_VISIBLE_DEVICES
comes to, a subset in any order, by number or by UUID, and it may not start in a process that forks.
A lock belongs to the operating system, so that whoever is killed gives its GPU back.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from prill_harness.engines.spec import EngineSpec
from prill_harness.records.evidence import Cell
from prill_harness.run.children import python

VISIBLE = "CUDA_VISIBLE_DEVICES"
FOLDER = "PRILL_LEASES"
"""Names the folder of the lock files; containers that share GPUs have to share it."""
LONGEST_S = 60.0  # that a driver may take to start
ANY = -1


def wanted(cell: Cell) -> int | None:
    """The number of the GPU that a cell asks for, ANY for whichever is free, None for none."""
    spec = EngineSpec.parse(cell.engine)
    on_gpu = spec.name == "cuda" or (spec.name == "hf" and spec.argument.startswith("cuda"))
    told = spec.argument if spec.name == "cuda" else spec.argument.removeprefix("cuda:")
    for asks, number in ((on_gpu, told), (cell.device.startswith("cuda"), cell.device.partition(":")[2])):
        found = re.match(r"\d+", number)
        if asks:
            return int(found[0]) if found else ANY
    return None


def visible() -> tuple[str, ...]:
    """UUIDs of the GPUs that CUDA shows this process, in its order; none without a driver."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        told = subprocess.run(
            python("prill_harness.run.leases"), capture_output=True, timeout=LONGEST_S, check=True
        )
        return tuple(json.loads(told.stdout))
    return ()


@dataclass(frozen=True)
class Lease:
    """What a cell may use: variables of its environment, and the lock that says so to everybody else."""

    environment: Mapping[str, str]
    lock: FileLock | None = None

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        if self.lock is not None:
            self.lock.release()


FREE = Lease({})
"""The lease of a cell that needs no GPU, or for which there is none: it will say so itself."""


class Gpus:
    """The GPUs that cells take turns on.

    Args:
        uuids: as CUDA numbers them.
        each: cells at a time on one GPU.
        folder: of the lock files; None: as PRILL_LEASES says, else one for each user of this machine.
    """

    def __init__(self, uuids: Sequence[str] = (), each: int = 1, folder: Path | None = None) -> None:
        self.uuids, self._each = tuple(uuids), each
        default = Path(tempfile.gettempdir(), f"prill-leases-{os.getuid()}")
        self._folder = folder or Path(os.environ.get(FOLDER) or default)

    def lease(self, cell: Cell) -> Lease | None:
        """A lease for the cell; None: all that it could have are taken.

        A cell that asks for a GPU by its number keeps the numbers it has, and any other sees its own alone.
        """
        number = wanted(cell)
        if number is None or not self.uuids or number >= len(self.uuids):
            return FREE
        for found in self.uuids if number == ANY else (self.uuids[number],):
            lock = self._take(found)
            if lock is not None:
                return Lease({VISIBLE: found} if number == ANY else {}, lock)
        return None

    def _take(self, found: str) -> FileLock | None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for slot in range(self._each):
            lock = FileLock(self._folder / f"{found}.{slot}", timeout=0)
            with contextlib.suppress(Timeout):
                lock.acquire()
                return lock
        return None


def _ask(driver: ctypes.CDLL) -> list[str]:
    """UUIDs as CUDA_VISIBLE_DEVICES takes them; a part of a GPU (MIG) has one of its own."""
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for number in range(count.value):
        whole, part = (ctypes.c_char * 16)(), (ctypes.c_char * 16)()
        driver.cuDeviceGet(ctypes.byref(device), number)
        driver.cuDeviceGetUuid(whole, device)
        driver.cuDeviceGetUuid_v2(part, device)
        kind = "GPU" if whole.raw == part.raw else "MIG"
        found.append(f"{kind}-{uuid.UUID(bytes=part.raw)}")
    return found


def main() -> None:
    """Print the UUIDs as JSON."""
    try:
        found = _ask(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        found = []
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
