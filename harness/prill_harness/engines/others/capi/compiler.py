"""Compile C files of prill's own, once per source, flags and compiler."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from prill_runtime import user_cache
from prill_runtime.errors import Inconclusive

TIMEOUT_S = 120


def compiled(what: str, files: Sequence[Path], flags: Sequence[str], name: str, folder: str) -> Path:
    """The library or program, from the cache or compiled now under a lock.

    Args:
        what: it is, for a sentence. files: sources, and the headers that they include.
        name: of the file to be made; a digest is put into it. folder: of the cache.

    Raises:
        Inconclusive: no C compiler, or the compiler fails.
    """
    compiler = _compiler(what)
    sources = [file for file in files if file.suffix == ".c"]
    parts = [*(file.read_bytes() for file in files), " ".join(flags).encode(), _version(compiler)]
    digest = hashlib.sha256(b"\0".join([*parts, platform.machine().encode()])).hexdigest()[:16]
    kept = user_cache.folder(folder) / f"{Path(name).stem}-{digest}{Path(name).suffix}"
    return user_cache.kept(kept, lambda fresh: _compile(compiler, what, sources, flags, fresh))


def _compiler(what: str) -> str:
    """The system's C compiler: $CC, cc, gcc or clang."""
    wanted = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    for name in filter(None, wanted):
        if found := shutil.which(name):
            return found
    raise Inconclusive(
        f"no C compiler: {what} is compiled on first use",
        expected="cc, gcc or clang on the PATH, or $CC",
        hint="install gcc (Debian: apt install gcc libc6-dev)",
    )


def _version(compiler: str) -> bytes:
    done = subprocess.run([compiler, "--version"], capture_output=True, timeout=TIMEOUT_S, check=False)
    return compiler.encode() + done.stdout


def _compile(compiler: str, what: str, sources: Sequence[Path], flags: Sequence[str], fresh: Path) -> None:
    words = [compiler, *flags, "-o", str(fresh), *map(str, sources), "-ldl", "-lm"]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False
    )
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise Inconclusive(f"the C compiler refuses {what}", where=compiler, got=said[:300] or "no message")
    fresh.chmod(0o700)  # of a program; what is there already was made for a library
