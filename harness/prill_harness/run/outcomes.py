"""The rules that turn what a check raised and observed into a status and one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import pytest

from prill_harness.records.evidence import Status, badness, builtin
from prill_harness.run.checks import CheckFailed, Observer
from prill_runtime.errors import EngineError, Inconclusive, ModelFileError, UnsupportedModel

NOTHING_SEEN = "the check ended without having observed anything"


def raised(error: BaseException, *, phase: str, oracle: object = None) -> tuple[Status, str]:
    """Status and sentence of a check that raised `error` in phase "setup", "call" or "teardown".

    Errors of the engine under test and a file that does not load are findings; so is a failed assertion, but
    only in the check itself; errors of the oracle or a fixture, and unknown ones, are errors of the harness.
    """
    if isinstance(error, BaseExceptionGroup):
        verdicts = [raised(inner, phase=phase, oracle=oracle) for inner in error.exceptions]
        return min(verdicts, key=lambda verdict: badness(verdict[0]))
    text = one_line(str(error))
    if isinstance(error, pytest.skip.Exception | pytest.xfail.Exception):
        return Status.INCONCLUSIVE, f"skipped: {text or 'no reason given'}; a skip is no evidence"
    if isinstance(error, Inconclusive):
        return Status.INCONCLUSIVE, text
    if passed_through(error.__traceback__, oracle):
        return Status.ERROR, f"the oracle broke: {type(error).__name__}: {text}"
    if isinstance(error, CheckFailed | EngineError | ModelFileError | UnsupportedModel):
        return Status.FAILED, text or f"{type(error).__name__} at {place(error)}"
    if isinstance(error, AssertionError) and phase == "call":
        return Status.FAILED, text or f"assertion failed at {place(error)}"
    return Status.ERROR, f"{phase} broke with {type(error).__name__}: {text or 'no message'} ({place(error)})"


def finished(observer: Observer) -> tuple[Status, str]:
    """Status and sentence of a check that raised nothing: passed only with an oracle and something seen."""
    if observer.observed <= 0 or not observer.oracle:
        return Status.INCONCLUSIVE, NOTHING_SEEN
    seen = f"{observer.observed} values compared with {observer.oracle}"
    return Status.PASSED, one_line(observer.sentence) or one_line(seen)


def one_line(text: str) -> str:
    """The first line with text in it, free of lone surrogates and control characters."""
    clean: str = builtin(text)
    lines = [line.strip() for line in clean.splitlines() if line.strip()]
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in lines[0]) if lines else ""


def passed_through(trace: TracebackType | None, owner: object) -> bool:
    """Whether a frame of the traceback is a method call on `owner`."""
    return owner is not None and any(f.tb_frame.f_locals.get("self") is owner for f in _frames(trace))


def place(error: BaseException) -> str:
    """`file:line` of the innermost frame, without the file's folder."""
    frames = list(_frames(error.__traceback__))
    if not frames:
        return "no traceback"
    return f"{frames[-1].tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frames[-1].tb_lineno}"


def _frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next
