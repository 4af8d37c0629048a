"""The process in which a probed engine runs: its messages, its output, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Self

import msgspec

from prill_harness.leaks.probed.protocol import Message
from prill_harness.leaks.reports.report import Probe
from prill_harness.run.children import python

DROPPED_VARIABLES = ("PYTHONMALLOC", "PYTHONTRACEMALLOC", "MALLOC_")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Hosted:
    """The process that hosts the engine: own group, one BLAS thread, fixed hashes; killed when late."""

    def __init__(self, wanted: Probe, module: str, extra: dict[str, str], files: Sequence[int] = ()) -> None:
        lost = (*lost_settings(), "LD_PRELOAD")
        inherited = {name: value for name, value in os.environ.items() if name not in lost}
        fixed = dict.fromkeys(THREADS, "1") | {"PYTHONHASHSEED": "0"}
        words = python(module, "-X", "faulthandler")
        reading, writing = os.pipe()
        ordered, ordering = os.pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*words, msgspec.json.encode(wanted).decode(), str(writing), str(ordered)],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            pass_fds=(writing, ordered, *files),
            env=inherited | fixed | extra,
            start_new_session=True,
        )
        os.close(writing)
        os.close(ordered)
        self._messages, self._ordering = os.fdopen(reading, "rb"), ordering
        self.late = False
        self._timer = threading.Timer(wanted.timeout_s, self._expire)

    def _expire(self) -> None:
        self.late = True
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def messages(self) -> Iterator[Message]:
        """The messages of the process, until it ends."""
        decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
        for line in self._messages:
            with contextlib.suppress(msgspec.DecodeError):  # a killed writer leaves a partial line
                yield decoder.decode(line)

    def command(self, order: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._ordering, order)

    def ended(self) -> int:
        """Wait for the exit code; negative for a signal."""
        return self._process.wait()

    def said(self) -> list[str]:
        """What the process printed, line by line."""
        self._said.seek(0)
        text = self._said.read().decode("utf-8", "backslashreplace")
        return [line for line in text.splitlines() if line.strip()]

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if error[0] is None:
                self._process.wait(1)
        self._kill()
        self._process.wait()
        self._messages.close()
        self._said.close()
        os.close(self._ordering)


def lost_settings() -> tuple[str, ...]:
    """The caller's variables that the probed process does not inherit: they change what it allocates."""
    return tuple(sorted(name for name in os.environ if name.startswith(DROPPED_VARIABLES)))
