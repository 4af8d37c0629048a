"""Compile the C libraries beside this module, once per source, flags and compiler."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prill_harness.run.outcomes import one_line
from prill_runtime import user_cache
from prill_runtime.errors import Inconclusive

FLAGS = ("-std=c17", "-fPIC", "-shared", "-pthread", "-fno-builtin", "-Wall", "-Wextra")
INTERPOSER = (*FLAGS, "-O2", "-fvisibility=hidden")
CONTROL = (*FLAGS, "-O1", "-g", "-fno-omit-frame-pointer", "-fno-inline")
TIMEOUT_S = 120


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
    compiler = _compiler()
    parts = [file.read_bytes(), " ".join(flags).encode(), _version(compiler), platform.machine().encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    library = user_cache.folder("leaks") / f"{file.stem}-{digest}.so"
    return user_cache.kept(library, lambda fresh: _compile(compiler, file, flags, fresh))


def _compiler() -> str:
    """The system's C compiler: $CC, cc, gcc or clang."""
    wanted = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    for name in filter(None, wanted):
        if found := shutil.which(name):
            return found
    raise Inconclusive(
        "no C compiler: the host ledger is a small library compiled on first use",
        expected="cc, gcc or clang on the PATH, or $CC",
        hint="install gcc (Debian: apt install gcc libc6-dev)",
    )


def _version(compiler: str) -> bytes:
    done = subprocess.run([compiler, "--version"], capture_output=True, timeout=TIMEOUT_S, check=False)
    return compiler.encode() + done.stdout


def _compile(compiler: str, file: Path, flags: Sequence[str], fresh: Path) -> None:
    words = [compiler, *flags, "-o", str(fresh), str(file), "-ldl"]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False
    )
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise Inconclusive(
            "the C compiler refuses the leak library", where=compiler, got=one_line(said) or "no message"
        )
