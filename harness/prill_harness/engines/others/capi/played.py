"""Have raw calls made on a library in a process of its own; a process that dies or hangs is an answer too."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MODULE = "prill_harness.engines.others.capi.script"
Step = Mapping[str, Any]


@dataclass
class Played:
    """What became of the steps.

    Attributes:
        answers: step -> what its call answered.
        ended: how the process ended before the last step, as a clause, with the call; empty if it did not.
        unusable: why the library cannot be called at all; empty if it can.
        printed: what the library wrote on the standard output.
        again: the shell command that makes the same calls. at: the step that was the last to begin.
        late: whether that took too long.
    """

    again: str
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    ended: str = ""
    unusable: str = ""
    printed: str = ""
    at: int = 0
    late: bool = False


def environment() -> dict[str, str]:
    """What the process inherits."""
    return dict(os.environ)


def played(
    library: str, steps: Sequence[Step], timeout: float, preload: str = "", files: Sequence[int] = ()
) -> Played:
    """Make the calls of `steps` (see `script`).

    Args:
        timeout: seconds that one call may take.
        preload: libraries to be loaded before all others; files: descriptors that they are read from.
    """
    words = ["-m", MODULE, library, json.dumps(steps)]
    own = {"LD_PRELOAD": preload} if preload else {}
    found, over = Played(shlex.join(["python", "-P", *words])), False
    with tempfile.TemporaryFile() as said, subprocess.Popen(
        [sys.executable, "-P", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said,
        env=environment() | own, pass_fds=tuple(files), start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in _lines(process.stdout.fileno(), timeout):
            found.late |= line is None
            message = json.loads(line or b"{}")
            found.at = message.get("at", found.at)
            if "step" in message:
                found.answers[message["step"]] = message
            found.printed, found.unusable = message.get("printed", ""), message.get("unusable", "")
            over = "printed" in message or "unusable" in message
        process.kill() if found.late else process.wait()
        process.wait()
        said.seek(0)
        wrote = said.read().decode("utf-8", "replace").strip().splitlines()
    if not over:
        code = process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        how += f"; it wrote: {wrote[-1][:200]}" if wrote else ""
        how = f"gave no answer within {timeout:g} s" if found.late else how
        found.ended = f"{told(steps[found.at])}: the process {how}"
    return found


def _lines(pipe: int, timeout: float) -> Iterator[bytes | None]:
    """The lines of a pipe up to its end; None, the last, when nothing came for so many seconds."""
    held = b""
    while select.select([pipe], [], [], timeout)[0]:
        if not (piece := os.read(pipe, 1 << 20)):
            return
        *whole, held = (held + piece).split(b"\n")
        yield from whole
    yield None


def told(step: Step) -> str:
    """A step as a person reads it: `session_free(session=$s)`."""
    given = ", ".join(
        f"{k}={json.dumps(v)[:60]}" for k, v in step.items() if k not in ("call", "expect", "as")
    )
    return f"{step.get('call', 'wait')}({given})"
