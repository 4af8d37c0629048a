"""The code mapped into this process in; the stretches of it that are a library's or the engine's own out.

An allocation, or a death, belongs to whoever asked for it. The interpreter and libc ask on behalf of their
callers and are left out: what Python code of the engine asks for is the engine's.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("site-packages", "dist-packages")
SYSTEM = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")
# Of what lies there: these work for their callers ...
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
FOREIGN_CALLS = ("libffi.", "_ctypes.")  # ... and by these Python code of the engine calls C.
# A GPU's driver is its maker's, wherever it lies: what it forgets then is not the engine's to mend.
DRIVERS = ("libcuda.so", "libnvidia-")


class Owner(IntEnum):
    """Whose code it is, as interposer.c numbers them; NOBODY: it works for its caller."""

    NOBODY = 0
    LIBRARY = 1
    ENGINE = 2


class Code(NamedTuple):
    """Addresses from `low` up to `high`."""

    low: int
    high: int
    owner: Owner


def owner(path: Path) -> Owner:
    """Whose code a mapped file holds: the engine's, unless it is known to be somebody else's."""
    name = path.name
    if name.startswith(DRIVERS):
        return Owner.LIBRARY
    if name.startswith(FOREIGN_CALLS):
        return Owner.ENGINE
    if name.startswith((*CALLED, "interposer-")) or path == Path(sys.executable).resolve():
        return Owner.NOBODY
    if not set(PACKAGES).isdisjoint(path.parts):
        return Owner.LIBRARY
    if path.is_relative_to(Path(sysconfig.get_path("platstdlib")).resolve()):
        return Owner.NOBODY
    return Owner.LIBRARY if any(path.is_relative_to(folder) for folder in SYSTEM) else Owner.ENGINE


def mapped(lines: Iterable[str]) -> set[Code]:
    """Executable stretches of files among lines of /proc/self/maps that are somebody's."""
    found = set()
    for line in lines:
        span, rights, *_, path = line.rstrip().split(maxsplit=5)
        if "x" in rights and path.startswith("/") and (whose := owner(Path(path))) is not Owner.NOBODY:
            low, _, high = span.partition("-")
            found.add(Code(int(low, 16), int(high, 16), whose))
    return found
