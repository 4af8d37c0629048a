"""Have raw calls made on a library in a process of its own; a process that dies or hangs is an answer too."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MODULE = "prill_harness.engines.capi.script"
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
    """

    again: str
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    ended: str = ""
    unusable: str = ""
    printed: str = ""
    at: int = 0


def environment() -> dict[str, str]:
    """What the process inherits."""
    return dict(os.environ)


def played(
    library: str, steps: Sequence[Step], timeout: float, preload: str = "", files: Sequence[int] = ()
) -> Played:
    """Make the calls of `steps` (see `script`), at most `timeout` seconds long.

    Args:
        preload: libraries to be loaded before all others; files: descriptors that they are read from.
    """
    words = ["-P", "-m", MODULE, library, json.dumps(steps)]
    own = {"LD_PRELOAD": preload} if preload else {}
    found = Played(shlex.join(["python", *words]))
    late = False
    with subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment() | own, pass_fds=tuple(files), start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            out, said = process.communicate()
    over = False
    for line in out.splitlines():
        message = json.loads(line)
        found.at = message.get("at", found.at)
        if "step" in message:
            found.answers[message["step"]] = message
        over |= "printed" in message or "unusable" in message
        found.printed, found.unusable = message.get("printed", ""), message.get("unusable", "")
    if not over:
        code = process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        words_of = f"; it wrote: {_last(said)}" if said.strip() else ""
        how = f"gave no answer within {timeout:g} s" if late else f"{how}{words_of}"
        found.ended = f"{told(steps[found.at])}: the process {how}"
    return found


def told(step: Step) -> str:
    """A step as a person reads it: `session_free(session=$s)`."""
    given = ", ".join(
        f"{k}={json.dumps(v)[:60]}" for k, v in step.items() if k not in ("call", "expect", "as")
    )
    return f"{step.get('call', 'wait')}({given})"


def _last(said: bytes) -> str:
    return said.decode("utf-8", "replace").strip().splitlines()[-1][:200]
