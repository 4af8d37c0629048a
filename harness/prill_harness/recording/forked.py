"""The fork server's process: for each message of the pool it forks a process that runs one cell.

Starting Python and importing pytest and NumPy took two thirds of a second per cell, more than many cells need
for their checks. Imported modules are all that cells share: no cell ever ran in the server.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn

from prill_harness.plan import provenance
from prill_harness.records import sources
from prill_harness.run import cells, orphans
from prill_harness.run.forkserver import LARGEST_MESSAGE, watched

POLL_S = 0.01  # between looks at a process that cannot be watched


def serve(channel: socket.socket) -> int:
    """Fork for every message until the other side is gone; a child never returns."""
    life = os.pipe()  # only the server holds the write end: when it ends, every cell's stdin does
    running: dict[int, int | None] = {}  # by process id: what tells that it has ended
    while True:
        watches: list[int] = [watch for watch in running.values() if watch is not None]
        patience = None if len(watches) == len(running) else POLL_S
        if channel.fileno() in select.select([channel.fileno(), *watches], [], [], patience)[0]:
            message = _received(channel)
            if not message:
                return 0
            pid = os.fork()
            if pid == 0:
                channel.close()
                os.close(life[1])
                os.dup2(life[0], 0)
                for watch in watches:
                    os.close(watch)
                environment, log, *arguments = json.loads(message)
                os.environ.update(environment)
                _leave(_cell(arguments, log))
            running[pid] = watched(pid)
            _tell(channel, pid, None)
        for pid in sorted(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                known = running.pop(pid)
                if known is not None:
                    os.close(known)
                _tell(channel, pid, os.waitstatus_to_exitcode(status))


def _received(channel: socket.socket) -> bytes:
    """A message; empty once the other side is gone, killed with our messages unread or not."""
    with contextlib.suppress(ConnectionError):
        return channel.recv(LARGEST_MESSAGE)
    return b""


def _tell(channel: socket.socket, pid: int, code: int | None) -> None:
    with contextlib.suppress(ConnectionError):  # who is gone is noticed by the next message
        channel.send(json.dumps([pid, code]).encode())


def _cell(arguments: list[str], log: str) -> int:
    os.setsid()
    os.environ[orphans.CELL_VARIABLE] = str(Path(log).absolute())
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["python -m prill_harness.run.cells", *arguments]
    return cells.main(arguments)


def _leave(code: int) -> NoReturn:
    """End this process as the interpreter would, but for taking its modules apart: every page of them that is
    still shared with the server would be copied first."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def share() -> None:
    """Import and read what cells need; nothing whose asserts pytest rewrites."""
    import pytest  # noqa: F401

    from prill_harness.engines import connect  # noqa: F401
    from prill_harness.faults.catalogue import catalogue
    from prill_harness.recording import recorder  # noqa: F401
    from prill_harness.stages import trace  # noqa: F401
    from prill_harness.tokens import golden, judge  # noqa: F401

    catalogue()
    gc.disable()  # it would look through the trees of 200 files, again and again, for cycles that none has
    sources.warm()
    provenance.warm()
    gc.freeze()  # keep pages shared: a garbage collection would write to all of them
    gc.enable()


if __name__ == "__main__":
    share()
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1]))))
