"""`exec:COMMAND`: an engine in a child process that answers JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prill_harness.engines.channels.lines import PROTOCOL, error_of, packed, unpacked
from prill_harness.engines.channels.texts import Texts, end_of, last_line
from prill_harness.engines.remote import Channel, Hello, OnToken, Remote, Target
from prill_runtime.errors import EngineError, ProcessLost, UsageError

LONGEST = 1 << 30
"""Bytes of one answer: the logits of 4,096 positions over a vocabulary of 32,000 are 700 MB in base64."""
REMEMBERED = 4096  # bytes of a worker's stderr to keep
LOADING = 600.0  # seconds for the answer to hello, which comes once the model is loaded
GRACE = 5.0  # seconds that a worker has to end once its input is closed
FIELDS = ("name", "version", "device", "arithmetic", "config", "draws")


class Worker:
    """A child process and its three pipes; `call` sends one call and returns the answer.

    A worker that dies, hangs, floods the pipe or writes something that is not JSON raises an EngineError and
    is ended.
    """

    def __init__(self, command: Sequence[str], timeout: float, name: str) -> None:
        self._name, self._timeout, self._number = name, timeout, 0
        self._buffer = bytearray()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
        except OSError as error:
            raise EngineError("cannot start the command", where=name, got=error.strerror) from error
        self._said: deque[int] = deque(maxlen=REMEMBERED)
        self._listener = threading.Thread(target=self._listen, name="stderr of a worker", daemon=True)
        self._listener.start()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _listen(self) -> None:
        assert self._process.stderr is not None
        while piece := self._process.stderr.read(1 << 16):
            self._said.extend(piece)

    def call(
        self,
        name: str,
        arguments: Mapping[str, Any],
        on_token: OnToken | None = None,
        *,
        patience: float | None = None,
    ) -> Any:
        """The result of a call; every token reported on the way is answered with what `on_token` returns.

        Args:
            patience: seconds for an answer; None: the worker's own.
        """
        patience = self._timeout if patience is None else patience
        number, until = self._number, time.monotonic() + patience
        self._number += 1
        streams = {} if on_token is None else {"stream": True}
        self._send({"id": number, "call": name, **packed(arguments), **streams}, name, until)
        while True:
            answer = self._receive(name, until)
            if answer.get("id") != number:
                raise self._broken(name, "an answer to another call", f"id {number}", repr(answer.get("id")))
            if "error" in answer:
                raise error_of(answer["error"], f"{self._name}, {name}")
            if "result" in answer:
                try:
                    return unpacked(answer["result"])
                except ValueError as error:
                    raise self._broken(name, "a result that is none", "as the protocol says", error) from None
            if on_token is None or not {"token", "logprob"} <= answer.keys():
                raise self._broken(name, "neither a result nor an error", "one of them", sorted(answer))
            go = on_token(int(answer["token"]), float(answer["logprob"])) is not False
            until = time.monotonic() + patience
            self._send({"id": number, "go": go}, name, until)

    def _send(self, message: Mapping[str, Any], call: str, until: float) -> None:
        assert self._process.stdin is not None
        rest = memoryview(json.dumps(message).encode() + b"\n")
        while rest:
            self._wait(call, until, writes=True)
            try:
                rest = rest[os.write(self._process.stdin.fileno(), rest) :]
            except BlockingIOError:
                continue
            except OSError:
                raise self._ended(call) from None

    def _receive(self, call: str, until: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        searched = 0
        while (at := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > LONGEST:
                raise self._broken(call, "a line without an end", f"at most {LONGEST} bytes", f"{searched}")
            self._wait(call, until, writes=False)
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise self._ended(call)
            self._buffer += piece
        line = bytes(self._buffer[:at])
        del self._buffer[: at + 1]
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(answer := json.loads(line), dict):
                return answer
        raise self._broken(call, "a line that is no JSON object", "a JSON object", repr(line[:80]))

    def _wait(self, call: str, until: float, *, writes: bool) -> None:
        pipe = self._process.stdin if writes else self._process.stdout
        assert pipe is not None
        reading, writing = ([], [pipe]) if writes else ([pipe], [])
        ready = select.select(reading, writing, [], max(until - time.monotonic(), 0))
        if not any(ready):
            raise self._broken(call, "no answer", "one in time", "none")

    def _broken(self, call: str, what: str, expected: object, got: object) -> EngineError:
        """End a worker that is no longer usable; the error to raise."""
        self.close(grace=0)
        return ProcessLost(
            what, where=f"{self._name}, {call}", expected=expected, got=got, hint=self._last_words()
        )

    def _ended(self, call: str) -> EngineError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        code = self._process.poll()
        self.close(grace=0)
        lost = ProcessLost(
            f"the process {end_of(code)}", where=f"{self._name}, {call}", hint=self._last_words()
        )
        lost.crashed = code is not None and code < 0
        return lost

    def _last_words(self) -> str:
        self._listener.join(1.0)
        return last_line(bytes(self._said))

    def close(self, grace: float = GRACE) -> None:
        """Close the worker's input, and kill it if it does not end by itself."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(1.0)
        if self._process.stderr is not None and not self._listener.is_alive():
            self._process.stderr.close()


class Spoken:
    """A worker that has answered `hello`."""

    def __init__(self, worker: Worker, path: str, name: str) -> None:
        self._worker: Worker | None = worker
        try:
            self.hello = self._greet(worker, path, name)
        except BaseException:
            worker.close(grace=0)
            raise

    def _greet(self, worker: Worker, path: str, name: str) -> Hello:
        said = worker.call("hello", {"protocol": PROTOCOL, "model": path}, patience=LOADING)
        calls = said.get("calls") if isinstance(said, dict) else None
        if not isinstance(calls, list):
            raise EngineError(
                "hello without the calls that it answers", where=name, expected='{"name": …, "calls": […]}',
                got=repr(said)[:80],
            )  # fmt: skip
        own = {field: said[field] for field in FIELDS if field in said}
        return Hello(**{"name": name, **own}, calls=frozenset(map(str, calls)), pid=worker.pid)

    def call(self, name: str, arguments: Mapping[str, Any], on_token: OnToken | None = None) -> Any:
        if self._worker is None:
            raise EngineError("engine is closed", expected="an open engine", hint="open it again")
        return self._worker.call(name, arguments, on_token)

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


class Exec(Remote, spec="exec"):
    """A user's command; `{model}` in it stands for the model's path, which `hello` also carries. With
    `adapter=text` it is started for each text, and takes and writes nothing else (`texts.py`)."""

    connector = "exec"
    takes = ("adapter", "skip")

    @classmethod
    def accepts(cls, argument: str) -> None:
        target = cls.target(argument)
        words = cls._words(target.what)
        if shutil.which(words[0]) is None:
            raise UsageError(
                "no such command", where=repr(f"exec:{argument}"), expected="an executable file or a name on "
                "PATH", got=repr(words[0]),
            )  # fmt: skip
        if "skip" in target.declared and "adapter" not in target.declared:
            raise UsageError("skip goes with adapter=text alone", where=repr(f"exec:{argument}"))

    @staticmethod
    def _words(command: str) -> list[str]:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UsageError("bad command", where=repr(f"exec:{command}"), got=str(error)) from None
        if not words:
            raise UsageError("bad command", where=repr(f"exec:{command}"), expected="a command", got="none")
        return words

    @classmethod
    def connect(cls, target: Target, path: str) -> Channel:
        if "adapter" in target.declared:
            skip = int(target.declared.get("skip", 0))
            return Texts(cls._words(target.what), path, target.timeout, skip)
        words = [word.replace("{model}", path) for word in cls._words(target.what)]
        return Spoken(Worker(words, target.timeout, Path(words[0]).name), path, words[0])
