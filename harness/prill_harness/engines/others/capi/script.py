"""`python -m prill_harness.engines.others.capi.script LIBRARY STEPS`: raw calls, each told before it is made.

STEPS is a list in JSON. A step is {"call": NAME, argument: value, ...}: arguments as in `abi.FUNCTIONS`, "$x"
for what a step with "as": "x" wrote. Further fields:

    "thread": NAME     in a thread of that name; with "wait": false the next step does not wait for it
    "join": NAME       (alone) wait for that thread, and tell what its call gave
    "pause": SECONDS   (alone)
    "file": {"of": PATH, "cut": BYTES, "put": [[OFFSET, HEX], ...]}    the argument `path`, a changed copy
    "fail": N          fail the Nth allocation that the library makes; needs the preloaded ledger

"expect" is for whoever reads the answers. Lines of JSON come out: {"at": step} before each call, {"step": n,
"code": kind, "sentence": …, …} after it, so that it is known which call a crash came from, and at the end
{"printed": …}: what the library wrote on the standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prill_harness.engines.others.capi.abi import CODES, RawLibrary, Unusable

LIBRARY_CODE, ENGINE_CODE = 1, 2  # as the preloaded ledger numbers them
OWN = ("call", "as", "thread", "wait", "file", "fail", "expect")


class Player:
    """Makes the calls, and remembers what they wrote."""

    def __init__(self, library: RawLibrary, output: int) -> None:
        self._library, self._output = library, output
        self._values: dict[str, Any] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._running: dict[str, Future[dict[str, Any]]] = {}

    def say(self, **message: Any) -> None:
        os.write(self._output, json.dumps(message).encode() + b"\n")

    def play(self, steps: list[Mapping[str, Any]]) -> None:
        for number, step in enumerate(steps):
            if "pause" in step:
                time.sleep(step["pause"])
            elif "join" in step:
                self.say(at=number)
                self._told(step, self._running.pop(step["join"]).result())
            else:
                self._step(number, step)

    def _step(self, number: int, step: Mapping[str, Any]) -> None:
        self.say(at=number)
        if (name := step.get("thread")) is None:
            self._told(step, self._made(number, step))
            return
        pool = self._threads.setdefault(name, ThreadPoolExecutor(1))
        self._running[name] = pool.submit(self._made, number, step)
        if step.get("wait", True):
            self._told(step, self._running.pop(name).result())

    def _told(self, step: Mapping[str, Any], answer: dict[str, Any]) -> None:
        if "as" in step:
            self._values[step["as"]] = next((answer[k] for k in ("out", "id") if k in answer), 0)
        self.say(**answer)

    def _made(self, number: int, step: Mapping[str, Any]) -> dict[str, Any]:
        given = {k: self._value(v) for k, v in step.items() if k not in OWN}
        if "file" in step:
            given["path"] = changed(**step["file"])
        call, buffers = self._library.prepared(step["call"], given)
        more: dict[str, Any] = {"began": time.monotonic()}
        code = failing(call, step["fail"], more) if "fail" in step else call()
        more["ended"] = time.monotonic()
        kind = CODES[code] if 0 <= code < len(CODES) else f"code {code}"
        said = {} if not code or step["call"] == "last_error" else {"sentence": self._library.sentence()}
        return {"step": number, "code": kind, **said, **more, **buffers.read(code)}

    def _value(self, value: Any) -> Any:
        return self._values.get(value[1:], 0) if isinstance(value, str) and value.startswith("$") else value


def changed(of: str, cut: int | None = None, put: list[list[Any]] | None = None) -> str:
    """The path of a changed copy, which is nowhere on a disk."""
    data = bytearray(Path(of).read_bytes())
    for offset, value in put or ():
        raw = bytes.fromhex(value)
        data[offset : offset + len(raw)] = raw
    held = os.memfd_create("changed")
    with os.fdopen(os.dup(held), "wb") as out:
        out.write(data if cut is None else data[:cut])
    return f"/proc/self/fd/{held}"


def failing(call: Any, nth: int, told: dict[str, Any]) -> int:
    """Make the call, its nth allocation failed; `told`: whether there was one, and the bytes left behind."""
    ledger = ctypes.CDLL(None)
    ledger.prill_leaks_fail.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_int)
    ledger.prill_leaks_fail_end.restype = ctypes.c_long
    classes = int(ledger.prill_leaks_classes())
    before, after = ((ctypes.c_long * (2 * classes + 1))() for _ in range(2))
    ledger.prill_leaks_read(before)
    ledger.prill_leaks_fail(nth, 0, 0)
    code = int(call())
    seen = int(ledger.prill_leaks_fail_end())
    ledger.prill_leaks_read(after)
    told |= {"failed": seen < 0, "seen": abs(seen), "left": sum(after[classes:]) - sum(before[classes:])}
    return code


def attribute(library: str) -> None:
    """Tell the preloaded ledger, if there is one, that only what the library asks for is to be failed."""
    ledger = ctypes.CDLL(None)
    if not hasattr(ledger, "prill_leaks_code"):
        return
    ledger.prill_leaks_code.argtypes = (ctypes.c_ulong, ctypes.c_ulong, ctypes.c_int)
    own = str(Path(library).resolve())
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            span, rights, *_, path = line.rstrip().split(maxsplit=5)
            if "x" not in rights or not path.startswith("/") or Path(path).name.startswith("libc."):
                continue
            low, _, high = span.partition("-")
            whose = ENGINE_CODE if path == own else LIBRARY_CODE
            if "interposer" not in path:
                ledger.prill_leaks_code(int(low, 16), int(high, 16), whose)


def main() -> int:
    library, steps = sys.argv[1:]
    output, printed = os.dup(1), os.memfd_create("printed")
    os.dup2(printed, 1)  # whatever the library prints is no answer
    try:
        player = Player(RawLibrary(library), output)
    except Unusable as error:
        os.write(output, json.dumps({"unusable": str(error)}).encode() + b"\n")
        return 4
    attribute(library)
    player.play(json.loads(steps))
    ctypes.CDLL(None).fflush(None)
    player.say(printed=os.pread(printed, 200, 0).decode("utf-8", "replace"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
