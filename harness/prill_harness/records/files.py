"""Write text files atomically, and read those that a user names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from prill_runtime.errors import OutputError, UsageError
from prill_runtime.files import refuse_pipe


def write_file(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new, never half of it.

    A link is followed and stays a link; a file keeps its mode; anything but a regular file (a device, a pipe)
    is written to, not replaced.

    Raises:
        OutputError: it cannot be written; the old file is as it was.
    """
    content = text.encode("utf-8", "backslashreplace")
    try:
        place = path.resolve() if path.is_symlink() else path
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.is_file():
            with place.open("wb") as out:
                out.write(content)
            return
        fresh = place.with_name(f".{place.name}.{os.getpid()}.new")
        try:
            with fresh.open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            if place.exists():
                shutil.copymode(place, fresh)
            fresh.replace(place)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError("cannot write", where=str(path), got=error.strerror or str(error)) from None


def read_text(path: Path, what: str) -> str:
    """The text of a file that the caller named.

    Raises:
        UsageError: absent, unreadable or not UTF-8.
    """
    try:
        refuse_pipe(path)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise UsageError(f"cannot read the {what}", where=str(path), got=reason) from error
