"""Compile the C libraries beside this module, once per source, flags and compiler."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prill_harness.engines.others.capi import compiler
from prill_runtime.errors import Inconclusive

FLAGS = ("-std=c17", "-fPIC", "-shared", "-pthread", "-fno-builtin", "-Wall", "-Wextra")
INTERPOSER = (*FLAGS, "-O2", "-fvisibility=hidden")
CONTROL = (*FLAGS, "-O1", "-g", "-fno-omit-frame-pointer", "-fno-inline")


def interposer() -> Path:
    """The library to preload into the probed process.

    Raises:
        Inconclusive: not 64-bit Linux, no C compiler, or the compiler fails.
    """
    return compiled("interposer.c", INTERPOSER)


def control() -> Path:
    """The library of planted leaks and of clean but busy controls.

    Raises:
        Inconclusive: as for `interposer`.
    """
    return compiled("control.c", CONTROL)


@contextmanager
def preloaded(own: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """LD_PRELOAD with the library and, behind it, those in `own`; and the descriptors to pass on.

    LD_PRELOAD is split at blanks and colons, which a path may contain; /proc/self/fd/N has neither.
    """
    with interposer().open("rb") as library:
        number = library.fileno()
        yield ":".join(filter(None, (f"/proc/self/fd/{number}", own))), (number,)


def compiled(source: str, flags: Sequence[str]) -> Path:
    """The library of a C file of this package, from the cache folder or compiled now under a lock."""
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        raise Inconclusive(
            "the host ledger needs 64-bit Linux", got=f"{platform.system()} {platform.machine()}"
        )
    file = Path(__file__).with_name(source)
    return compiler.compiled("the host ledger's small library", [file], flags, f"{file.stem}.so", "leaks")
