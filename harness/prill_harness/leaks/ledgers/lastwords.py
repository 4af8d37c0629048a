"""In whose code, and where, a process died of a failed allocation, by what it printed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# interposer.c writes the first, faulthandler the second, the innermost Python line first.
_DIED = re.compile(r"prill: died in (interpreter|library|engine) (.*)")
_FRAME = re.compile(r'File "(?:.*/)?([^"/]+)", line (\d+) in (\S+)')
OWNERS = {
    "interpreter": "in the interpreter, which is not what is under test",
    "library": "in a library that does not survive it",
    "engine": "in the engine",
}


class LastWord(NamedTuple):
    """engine: whether it died in the engine's own code. sentence: whose code, the frame, the Python line."""

    engine: bool
    sentence: str


def read(lines: Iterable[str]) -> LastWord | None:
    """The last word among printed lines; None if the process did not die of a failed allocation."""
    owner, native, python = "", "", ""
    for line in lines:
        if died := _DIED.search(line):
            owner, native = died.groups()
        elif owner and (frame := _FRAME.search(line)):
            file, number, function = frame.groups()
            python = f"{function} ({file}:{number})"
            break
    if not owner:
        return None
    at = ", called by ".join(filter(None, (native.strip(), python)))
    return LastWord(owner == "engine", f"{OWNERS[owner]}: {at or 'nowhere known'}")
