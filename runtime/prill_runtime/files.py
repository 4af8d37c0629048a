"""A path that somebody named goes in; whether it can be read to an end comes out."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def refuse_pipe(path: Path) -> None:
    """Refuse what is no regular file: opening a pipe without a writer would block forever.

    Raises:
        OSError: it is one, or it cannot be looked at.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a file", str(path))
