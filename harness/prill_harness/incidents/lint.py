"""Findings of linters, from a SARIF file, which ruff, clippy, clang-tidy and others write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from prill_harness.records.files import read_text
from prill_runtime.errors import UsageError


class _Driver(msgspec.Struct):
    name: str


class _Tool(msgspec.Struct):
    driver: _Driver


class _Result(msgspec.Struct):
    level: str = "warning"
    suppressions: list[Any] | None = None


class _Run(msgspec.Struct):
    tool: _Tool
    results: list[_Result] | None = None


class _Sarif(msgspec.Struct):
    version: str
    runs: list[_Run]


class LintFindings(msgspec.Struct, frozen=True):
    """How many errors and warnings the tools of a file found, without those that are suppressed."""

    tools: tuple[str, ...]
    count: int


def read_sarif(path: Path) -> LintFindings:
    """Count what was found.

    Raises:
        UsageError: the file cannot be read, is no SARIF, or no tool ran to its end: then nothing was found
            because nobody looked.
    """
    where, text = str(path), read_text(path, "lint findings")
    try:
        file = msgspec.json.decode(text.encode("utf-8", "replace"), type=_Sarif)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError("not a SARIF file", where=where, got=str(error)) from error
    unfinished = [run.tool.driver.name for run in file.runs if run.results is None]
    if unfinished or not file.runs:
        got = f"none of {unfinished[0]}" if unfinished else "no run of a tool"
        raise UsageError("no results", where=where, expected="those of each tool", got=got)
    counted = [
        result
        for run in file.runs
        for result in run.results or ()
        if result.level in ("error", "warning") and not result.suppressions
    ]
    return LintFindings(tuple(dict.fromkeys(run.tool.driver.name for run in file.runs)), len(counted))
