"""Which mapped code of this process belongs to libraries and which to the engine.

An allocation, or a crash, belongs to the code that requested it. The interpreter and libc act for their
callers and are skipped: what the engine's Python code requests is the engine's.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("site-packages", "dist-packages")
# ... and wherever else packages were installed to, as by `pip install --target`.
TARGETS = frozenset(
    folder.resolve()
    for folder in map(Path, sys.path)
    if folder.is_dir() and next(folder.glob("*.dist-info"), None) is not None
)
SYSTEM = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")
# Of the files there, these act for their callers ...
CALLED = (
    "ld-linux",
    "libc.",
    "libm.",
    "libdl.",
    "librt.",
    "libpthread.",
    "libgcc_s.",
    "libstdc++.",
    "libpython",
)
FOREIGN_CALLS = ("libffi.", "_ctypes.")  # ... and so do these, by which Python code calls C.
# A GPU driver belongs to its vendor, wherever it is installed: what it leaks the engine cannot fix.
DRIVERS = ("libcuda.so", "libnvidia-")


class Owner(IntEnum):
    """Whose code it is, numbered as in interposer.c; NOBODY: it acts for its caller."""

    NOBODY = 0
    LIBRARY = 1
    ENGINE = 2


class Code(NamedTuple):
    """Addresses from `low` up to `high`."""

    low: int
    high: int
    owner: Owner


def owner(path: Path) -> Owner:
    """Whose code a mapped file holds: the engine's unless it is known to be another's."""
    name = path.name
    if name.startswith(DRIVERS):
        return Owner.LIBRARY
    if name.startswith(FOREIGN_CALLS):
        return Owner.ENGINE
    if name.startswith((*CALLED, "interposer-")) or path == Path(sys.executable).resolve():
        return Owner.NOBODY
    if not set(PACKAGES).isdisjoint(path.parts) or not TARGETS.isdisjoint(path.parents):
        return Owner.LIBRARY
    if path.is_relative_to(Path(sysconfig.get_path("platstdlib")).resolve()):
        return Owner.NOBODY
    return Owner.LIBRARY if any(path.is_relative_to(folder) for folder in SYSTEM) else Owner.ENGINE


def mapped(lines: Iterable[str]) -> set[Code]:
    """The executable ranges among lines of /proc/self/maps that have an owner."""
    found = set()
    for line in lines:
        span, rights, *_, path = line.rstrip().split(maxsplit=5)
        if "x" in rights and path.startswith("/") and (whose := owner(Path(path))) is not Owner.NOBODY:
            low, _, high = span.partition("-")
            found.add(Code(int(low, 16), int(high, 16), whose))
    return found
