"""Watch a thread's Python: every call, instruction and return.

From Python 3.12 on, `sys.settrace` reports a function's instructions only from its second call on, since it
cannot instrument running code; `sys.monitoring`, new in 3.12, also reports those of the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import get_ident
from types import CodeType, FrameType
from typing import Any, Protocol

from prill_runtime.errors import Inconclusive

Told = Callable[[CodeType], None]


class Watch(Protocol):
    """Reports on this thread between `start` and `stop`, without allocating memory."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Traced:
    """By `sys.settrace`, whose previous function is restored."""

    def __init__(self, entered: Told, stepped: Told, left: Told, apart: frozenset[str]) -> None:
        def inside(frame: FrameType, event: str, argument: object) -> Any:
            if event == "opcode":
                stepped(frame.f_code)
            elif event == "return":
                left(frame.f_code)
            return inside

        def called(frame: FrameType, event: str, argument: object) -> Any:
            if frame.f_code.co_filename in apart:
                return None
            entered(frame.f_code)
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return inside

        self._called, self._before = called, sys.gettrace()

    def start(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._called)

    def stop(self) -> None:
        sys.settrace(self._before)


NUMBERS = (3, 4, 5, 2, 1, 0)  # of tools; the first two belong to no kind of tool (PEP 669)


class Monitored:
    """By `sys.monitoring`, under an unused tool id."""

    def __init__(self, entered: Told, stepped: Told, left: Told, apart: frozenset[str]) -> None:
        self._monitoring: Any = sys.monitoring  # type: ignore[attr-defined,unused-ignore]
        self._tool: int | None = None
        self._thread = self._depth = 0
        events = self._monitoring.events

        def called(code: CodeType, *_: object) -> None:
            if get_ident() == self._thread and code.co_filename not in apart:
                self._depth += 1
                entered(code)

        def ran(code: CodeType, *_: object) -> None:
            if self._depth and get_ident() == self._thread and code.co_filename not in apart:
                stepped(code)

        def ended(code: CodeType, *_: object) -> None:
            if self._depth and get_ident() == self._thread and code.co_filename not in apart:
                self._depth -= 1
                left(code)

        self._told = dict.fromkeys((events.PY_START, events.PY_RESUME, events.PY_THROW), called)
        self._told |= dict.fromkeys((events.PY_RETURN, events.PY_YIELD, events.PY_UNWIND), ended)
        self._told[events.INSTRUCTION] = ran
        self._events = sum(self._told)

    def start(self) -> None:
        free = [n for n in NUMBERS if self._monitoring.get_tool(n) is None]
        if not free:
            raise Inconclusive(
                "all six numbers of tools are taken",
                where="sys.monitoring",
                expected="one that is free",
                got=", ".join(str(self._monitoring.get_tool(n)) for n in sorted(NUMBERS)),
                hint="run it without a debugger or profiler",
            )
        self._thread, self._depth, self._tool = get_ident(), 0, free[0]
        self._monitoring.use_tool_id(self._tool, __name__)
        for event, function in self._told.items():
            self._monitoring.register_callback(self._tool, event, function)
        self._monitoring.set_events(self._tool, self._events)

    def stop(self) -> None:
        if self._tool is None:
            return
        self._monitoring.set_events(self._tool, 0)
        for event in self._told:
            self._monitoring.register_callback(self._tool, event, None)
        self._monitoring.free_tool_id(self._tool)
        self._tool = None


def profile_again(before: Any) -> None:
    """Set the profiler that `sys.getprofile` gave. One in C is no function, and is enabled instead."""
    if hasattr(before, "enable"):
        before.enable()
    else:
        sys.setprofile(before)


def watch(entered: Told, stepped: Told, left: Told, *apart: str) -> Watch:
    """A watch that reports each call, instruction and return (or resumption and yield) once started.

    Functions that are already running are reported from their next call on. Code in the files `apart` is left
    out, and so is whatever the callbacks do.
    """
    kind = Monitored if sys.version_info >= (3, 12) else Traced
    return kind(entered, stepped, left, frozenset((*apart, __file__)))
