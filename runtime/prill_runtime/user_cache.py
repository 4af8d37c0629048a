"""The user's cache folder: each file is stored with its digest and used only while the two agree.

Its files are loaded as code or judge an engine, so no other user may be able to write them, and a file left
broken by a crash, a full disk or a stray hand is made anew.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import platformdirs
from filelock import FileLock

from prill_runtime.errors import UsageError

CACHE_VARIABLE: Final = "PRILL_CACHE"
DIGEST_SUFFIX: Final = ".sha256"  # of the file beside a kept one that holds its digest


def root() -> Path:
    """$PRILL_CACHE, or the user's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("prill"))


def folder(name: str) -> Path:
    """A folder of the cache, made on first use for the user alone.

    Raises:
        UsageError: it cannot be made, or other users can write to it.
    """
    wanted = root() / name
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in (wanted.parent, wanted):
            _refuse_shared(place)
    except OSError as error:
        raise UsageError(
            "the cache folder cannot be used",
            where=str(wanted),
            got=error.strerror or str(error),
            hint=f"set {CACHE_VARIABLE} to a folder that you can write",
        ) from error
    return wanted


def _refuse_shared(place: Path) -> None:
    if not hasattr(os, "geteuid"):
        return
    found = place.stat()
    mode, own = stat.S_IMODE(found.st_mode), os.geteuid()
    # A group with the user's own number is the user's private group.
    by_group = bool(mode & stat.S_IWGRP) and found.st_gid != found.st_uid
    if mode & stat.S_IWOTH or by_group or found.st_uid not in (own, 0):
        whose = "" if found.st_uid in (own, 0) else f", owned by user {found.st_uid}"
        raise UsageError(
            "others may write the cache folder, and what lies there is run",
            where=str(place),
            expected="a folder that you alone can write",
            got=f"mode {mode:o}{whose}",
            hint=f"chmod go-w it, or set {CACHE_VARIABLE} to a folder of your own",
        )


def whole(file: Path) -> bool:
    """Whether a kept file is there and its bytes still match its digest."""
    try:
        wanted = file.with_name(file.name + DIGEST_SUFFIX).read_text(encoding="ascii").strip()
        return wanted == _digest(file)
    except (OSError, ValueError):
        return False


def kept(file: Path, make: Callable[[Path], None]) -> Path:
    """`file`, made by `make(path)` unless it is there and intact; processes that want the same take turns.

    Raises:
        UsageError: it cannot be written.
    """
    if whole(file):
        return file
    try:
        with FileLock(f"{file}.lock"):
            if not whole(file):
                put(file, make)
    except OSError as error:
        raise UsageError(
            "a file of the cache cannot be written",
            where=str(file),
            got=error.strerror or str(error),
            hint=f"free some space, or set {CACHE_VARIABLE} to another folder",
        ) from error
    return file


def put(file: Path, make: Callable[[Path], None]) -> None:
    """Have `make(path)` write a temporary file, sync it, then rename it and write its digest beside it."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    fresh, mark = Path(name), file.with_name(file.name + DIGEST_SUFFIX)
    try:
        make(fresh)
        mark.unlink(missing_ok=True)  # never leave an old digest beside new bytes
        digest = _digest(fresh)
        _settle(fresh, file)
        fresh.write_text(digest + "\n", encoding="ascii")
        _settle(fresh, mark)
    finally:
        fresh.unlink(missing_ok=True)


def _settle(fresh: Path, file: Path) -> None:
    """Rename a file once its bytes are on the disk."""
    with fresh.open("rb+") as out:
        os.fsync(out.fileno())
    fresh.replace(file)
    _sync(file.parent)


def _sync(place: Path) -> None:
    if os.name == "posix":
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
