"""Whether a path that a user names is a regular file."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def refuse_pipe(path: Path) -> None:
    """Refuse anything but a regular file: opening a pipe that has no writer would block forever.

    Raises:
        OSError: it is something else, or its type cannot be read.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a file", str(path))
