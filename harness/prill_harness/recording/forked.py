"""The fork server's process: for each message of the pool it forks a process that runs one cell.

Starting Python and importing pytest and NumPy took two thirds of a second per cell, more than many cells need
for their checks. Imported modules are all that cells share: no cell ever ran in the server.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest
from _pytest.config import default_plugins

from prill_harness.engines import connect
from prill_harness.faults import opening
from prill_harness.faults.catalogue import catalogue
from prill_harness.plan import provenance
from prill_harness.recording import recorder
from prill_harness.records import sources
from prill_harness.run import cells, orphans
from prill_harness.run.forkserver import LARGEST_MESSAGE
from prill_harness.stages import trace
from prill_harness.tokens import golden, judge
from prill_runtime.models import assumptions, parts

PLUGINS = tuple(importlib.import_module(f"_pytest.{name}") for name in default_plugins)
SHARED = (pytest, *PLUGINS, connect, opening, golden, judge, recorder, trace, assumptions, parts)
"""What cells import besides the faults; nothing whose asserts pytest rewrites."""
POLL_S = 0.01


def serve(channel: socket.socket) -> int:
    """Fork for every message until the other side is gone; a child never returns."""
    life = os.pipe()  # only the server holds the write end: when it ends, every cell's stdin does
    running: set[int] = set()
    while True:
        if select.select([channel], [], [], POLL_S if running else None)[0]:
            message = channel.recv(LARGEST_MESSAGE)
            if not message:
                return 0
            pid = os.fork()
            if pid == 0:
                channel.close()
                os.close(life[1])
                os.dup2(life[0], 0)
                *arguments, log = json.loads(message)
                _leave(_cell(arguments, log))
            running.add(pid)
            channel.send(json.dumps([pid, None]).encode())
        for pid in sorted(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                channel.send(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode())


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


if __name__ == "__main__":
    catalogue()
    gc.disable()  # it would look through the trees of 200 files, again and again, for cycles that none has
    sources.warm()
    provenance.sources()
    gc.freeze()  # keep pages shared: a garbage collection would write to all of them
    gc.enable()
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1]))))
