"""`serve:COMMAND`: a server that is started for each model, watched, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil  # type: ignore[import-untyped]

from prill_harness.engines.channels.http import opened
from prill_harness.engines.remote import Channel, OnToken, Remote, Target
from prill_runtime.errors import EngineError, UsageError
from prill_runtime.gguf.file import open_gguf

GRACE = 5.0  # seconds that a server has to end once it is asked to
DYING = 2.0  # seconds after which a server whose connection broke is seen to have ended
QUOTED = 3  # last lines of its log that a sentence repeats


class Server:
    """A server's process and its log.

    Args:
        log: keeps what it writes; None: only its last lines are read, for errors.

    Raises:
        EngineError: it cannot be started. UsageError: the log cannot be written.
    """

    def __init__(self, command: Sequence[str], log: str | None) -> None:
        self.name = Path(command[0]).name
        try:
            self._log: IO[bytes] = tempfile.TemporaryFile() if log is None else Path(log).open("a+b")  # noqa: SIM115
        except OSError as error:
            raise UsageError("the log cannot be written", where=repr(log), got=error.strerror) from None
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise EngineError("cannot start the command", where=self.name, got=error.strerror) from None

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def ended(self) -> str:
        """How it ended and what it wrote last; empty if it runs."""
        try:
            code = self._process.wait(DYING)
        except subprocess.TimeoutExpired:
            return ""
        how = f"ended with exit status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        size = os.fstat(self._log.fileno()).st_size if not self._log.closed else 0
        tail = os.pread(self._log.fileno(), 4096, max(0, size - 4096)) if size else b""
        lines = tail.decode("utf-8", "replace").strip().splitlines()[-QUOTED:]
        wrote = f"; it wrote: {' | '.join(line.strip()[:200] for line in lines)}" if lines else ""
        return f"the server {how}{wrote}"

    def close(self) -> None:
        """End it and its children, whatever session they are in; calling it twice is harmless."""
        if self._log.closed:
            return
        if self.running():
            with contextlib.suppress(psutil.Error):
                server = psutil.Process(self.pid)
                family = [server, *server.children(recursive=True)]
                _each(family, psutil.Process.terminate)
                _each(psutil.wait_procs(family, GRACE)[1], psutil.Process.kill)
        with contextlib.suppress(ProcessLookupError):  # children of one that had ended before
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def _each(processes: Sequence[Any], end: Callable[[Any], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            end(process)


class Owned:
    """The channel to a server that ends with it."""

    def __init__(self, channel: Channel, server: Server) -> None:
        self._channel, self._server = channel, server
        self.hello = channel.hello

    def call(self, name: str, arguments: Mapping[str, Any], on_token: OnToken | None = None) -> Any:
        return self._channel.call(name, arguments, on_token)

    def close(self) -> None:
        self._channel.close()
        self._server.close()


class Serve(Remote, spec="serve"):
    """A command that serves a model over HTTP: `{model}`, `{port}` and `{ctx}` in it are filled in."""

    connector = "serve"
    takes = ("ctx", "model", "log")

    @classmethod
    def accepts(cls, argument: str) -> None:
        cls._words(cls.target(argument).what)

    @classmethod
    def _words(cls, command: str) -> list[str]:
        where = repr(f"serve:{command}")
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UsageError("bad command", where=where, got=str(error)) from None
        for name in ("{model}", "{port}"):
            if not any(name in word for word in words):
                raise UsageError(
                    f"the command has no {name}", where=where, expected="… {model} … {port} [… {ctx}]",
                    got=repr(command),
                )  # fmt: skip
        if shutil.which(words[0]) is None:
            raise UsageError(
                "no such command", where=where, expected="an executable file or a name on PATH",
                got=repr(words[0]),
            )  # fmt: skip
        return words

    @classmethod
    def connect(cls, target: Target, path: str) -> Channel:
        from prill_harness.engines.channels.link import Link

        port, context = free_port(), target.declared.get("ctx") or str(_context(path))
        filled = {"{model}": path, "{port}": str(port), "{ctx}": context}
        words = cls._words(target.what)
        for name, value in filled.items():
            words = [word.replace(name, value) for word in words]
        server = Server(words, target.declared.get("log"))
        try:
            link = Link(f"http://127.0.0.1:{port}", target.timeout, server.ended)

            def waits() -> bool:
                if server.running():
                    return True
                raise EngineError(
                    f"{link.hidden(server.ended())}",
                    where=server.name,
                    expected="a server that becomes healthy",
                )

            return Owned(opened(link, target, path, server.pid, waits), server)
        except BaseException:
            server.close()
            raise


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _context(path: str) -> int:
    with open_gguf(path) as file:
        return int(str(file.metadata[f"{file.architecture}.context_length"]))
