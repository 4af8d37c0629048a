"""Render verdicts by the installed reporters, which are found by entry points alone."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from prill_harness.records import catalog
from prill_harness.records.names import look_up
from prill_harness.records.verdict import Verdict

GROUP = "prill.reporters"


@dataclass(frozen=True)
class Reporter:
    """A format of reports. `file` is what each gate writes it into; empty where it is only asked for."""

    name: str
    render: Callable[..., str]
    file: str = ""


@cache
def installed() -> Mapping[str, Reporter]:
    """Name -> reporter. An entry point of the group names a package, of which each module is a format by its
    name, or one function, which is a format by the name of the entry point."""
    found = (reporter for point in entry_points(group=GROUP) for reporter in _of(point.name, point.load()))
    return {reporter.name: reporter for reporter in sorted(found, key=lambda each: each.name)}


def _of(name: str, loaded: ModuleType | Callable[..., str]) -> Iterator[Reporter]:
    if not isinstance(loaded, ModuleType):
        yield Reporter(name, loaded)
        return
    for entry in pkgutil.iter_modules(loaded.__path__):
        module = import_module(f"{loaded.__name__}.{entry.name}")
        yield Reporter(entry.name.replace("_", "-"), module.render, getattr(module, "FILE", ""))


def files() -> dict[str, str]:
    """Name of a format -> the file that each gate writes, besides its ledger and verdict.json."""
    return {name: reporter.file for name, reporter in installed().items() if reporter.file}


def render(name: str, verdict: Verdict, options: Mapping[str, str] | None = None) -> str:
    """Render a verdict in the format of that name.

    Raises:
        UsageError: no such reporter is installed.
    """
    look_up(name, tuple(installed()), "no such reporter")
    return installed()[name].render(verdict, options=options or {})


def beside(folder: Path) -> dict[str, str]:
    """The option that names the folder of a gate's files: from the root of the repository where it lies in
    it, so that a forge finds what it is to attach."""
    absolute, root = folder.resolve(), catalog.repository()
    inside = absolute.is_relative_to(root)
    return {"folder": (absolute.relative_to(root) if inside else absolute).as_posix()}
