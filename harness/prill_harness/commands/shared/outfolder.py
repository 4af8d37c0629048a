"""Lock an output folder, so that two runs never write into one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from prill_runtime.errors import UsageError

LOCK = ".lock"


@contextmanager
def taken(out: Path) -> Iterator[None]:
    """Create `out` if necessary and lock it; any other prill process that wants it meanwhile is refused.

    The lock belongs to the operating system, so a killed process releases it.

    Raises:
        UsageError: another run holds it, or it cannot be written.
    """
    lock = FileLock(out / LOCK, timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(
            "another run writes into this folder",
            where=str(out),
            expected="a folder of its own for each run",
            got=f"the lock {out / LOCK} is held",
            hint="wait for it, or give this one another --out",
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError("cannot write the output folder", where=str(out), got=reason) from None
    try:
        yield
    finally:
        lock.release()
