"""Render verdicts by the installed reporters, which are found by entry points alone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import msgspec

from prill_harness.records.files import read_text
from prill_harness.records.names import look_up
from prill_harness.records.verdict import Verdict
from prill_runtime.errors import VerdictError

GROUP = "prill.reporters"
FILES = {"junit": "junit.xml", "markdown": "report.md", "html": "report.html"}
"""The files that a gate writes besides its ledger and verdict.json."""


def names() -> tuple[str, ...]:
    """Names of the installed reporters."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def render(name: str, verdict: Verdict, options: Mapping[str, str] | None = None) -> str:
    """Render a verdict by the reporter of that name.

    Raises:
        UsageError: no such reporter is installed.
    """
    text: str = _find(name).load()(verdict, options=options or {})
    return text


def _find(name: str) -> EntryPoint:
    look_up(name, names(), "no such reporter")
    return next(iter(entry_points(group=GROUP, name=name)))


def read_verdict(path: Path) -> Verdict:
    """Read a verdict that a gate wrote.

    Raises:
        UsageError: the file cannot be read.
        VerdictError: it is not a verdict of this version, or was altered.
    """
    text = read_text(path, "verdict")
    try:
        verdict = msgspec.json.decode(text.encode("utf-8", "replace"), type=Verdict, strict=True)
    except (msgspec.DecodeError, RecursionError) as error:
        raise VerdictError("not a verdict of this version", where=str(path), got=str(error)) from error
    if verdict.digest != (expected := verdict.digest_of_all()):
        raise VerdictError(
            "the verdict was altered after the gate wrote it",
            where=str(path),
            expected=f"digest {expected[:16]}…",
            got=f"{verdict.digest[:16]}…" if verdict.digest else "none",
            hint="run prill gate again, or decide anew with prill gate --from",
        )
    return verdict
