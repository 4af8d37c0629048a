"""Start cells in processes forked from a server that has imported everything and run nothing.

The server runs `recording.forked`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from prill_harness.run.children import python

LARGEST_MESSAGE = 1 << 17  # bytes
COMMAND = python("prill_harness.recording.forked")


def watched(pid: int) -> int | None:
    """A descriptor that can be read once the process has ended; None where the system has none."""
    with contextlib.suppress(AttributeError, OSError):
        return os.pidfd_open(pid)
    return None


NOTHING_MORE: Mapping[str, str] = {}


class Forked:
    """A process that the server forked, with the part of `subprocess.Popen` that a pool needs."""

    stdin = None

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.exit_code(self.pid, wait=False)
        return self.returncode

    def wait(self) -> int | None:
        """The exit code, once it has ended."""
        if self.returncode is None:
            self.returncode = self._server.exit_code(self.pid, wait=True)
        return self.returncode


class ForkServer:
    """The server's process; a context manager. When it ends, so do the cells still running."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=dict(environment),
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._ended: dict[int, int] = {}

    @property
    def gone(self) -> bool:
        """Whether the server's process has ended."""
        return self._process.poll() is not None

    def fileno(self) -> int:
        """A descriptor that can be read when a process has ended."""
        return self._channel.fileno()

    def start(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] = NOTHING_MORE
    ) -> Forked:
        """Run `cells.main(arguments)` in a new process that leads its own group; output goes to `log`.

        Args:
            environment: what is set in the process besides the server's own.

        Raises:
            ChildProcessError: the server has ended.
        """
        try:
            self._channel.send(json.dumps([dict(environment), str(log), *arguments]).encode())
        except OSError:
            raise self._gone() from None
        while (pid := self._receive()) is None:
            pass
        return Forked(self, pid)

    def exit_code(self, pid: int, *, wait: bool) -> int | None:
        """The exit code of a started process; None while it runs, unless `wait` is set."""
        while pid not in self._ended and (wait or select.select([self._channel], [], [], 0)[0]):
            try:
                self._receive()
            except ChildProcessError:  # and with it every process that it had started
                self._ended[pid] = -signal.SIGKILL
        return self._ended.pop(pid, None)

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._process.wait()

    def _receive(self) -> int | None:
        """Receive one message: the id of the process just started, or a process that ended."""
        try:
            message = self._channel.recv(LARGEST_MESSAGE)
        except ConnectionError:
            message = b""
        if not message:
            raise self._gone()
        pid, code = json.loads(message)
        if code is None:
            return int(pid)
        self._ended[pid] = code
        return None

    def _gone(self) -> ChildProcessError:
        return ChildProcessError(f"the process that starts cells ended with exit code {self._process.wait()}")
