"""Which files of prill judge for a suite: all that decide what its checks see and say.

Whatever a suite imports judges for it, directly or not and wherever in a file the import is; a module or file
named in a string counts as imported, for a child process may run it. So does whatever runs every check: the
plugin, its fixtures for the suites that name them, the recorder and the rules of outcomes.
Left out are the runtime, which is judged and does not judge; planted faults, which have digests of their own;
commands, reports and the stamp of a build, which come after the evidence or do not bear on it. A module of
prill that is named but does not exist is an error.

Imports are read from the source, so the result does not depend on what this process has imported or planted.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from prill_harness.records.catalog import suite_file, suites
from prill_harness.records.parsed import BESIDE, MODULE, ROOMS, Named, kept
from prill_harness.version import STAMP
from prill_runtime.errors import PrillError

FIXTURES = "prill_harness.recording.fixtures"
RUNS_CHECKS = (
    FIXTURES,
    "prill_harness.plugin",
    "prill_harness.recording.recorder",
    "prill_harness.run.outcomes",
)


@dataclass(frozen=True)
class SourceText:
    """What one file imports.

    Attributes:
        imports: modules that it names, outside fixtures; files beside it that it names, by path.
        fixtures: name of a pytest fixture -> the modules that it names, and its arguments.
        arguments: of all functions.
    """

    imports: frozenset[str]
    fixtures: Mapping[str, tuple[frozenset[str], frozenset[str]]]
    arguments: frozenset[str]

    @cached_property
    def all_imports(self) -> frozenset[str]:
        return self.imports.union(*(imports for imports, _ in self.fixtures.values()))


@cache
def judging(suite: Path) -> Mapping[str, bytes]:
    """Name -> text of the suite's file and of every file that judges for it, in a fixed order."""
    found = {name: file.read_bytes() for name, file in sorted(_judges(suite.resolve()).items())}
    kept().save()
    return found


@cache
def _judges(suite: Path) -> Mapping[str, Path]:
    """Name -> the suite's file and every file that judges for it."""
    own = _read(suite)
    found, asked, seen = {suite.name: suite}, set(own.arguments), {suite.name}
    pending = [*RUNS_CHECKS, *own.all_imports]
    while pending:
        if (name := pending.pop()) in seen:
            continue
        seen.add(name)
        if (file := _file(name, suite.parent)) is None or file == suite:
            continue
        found[name] = file
        if file.suffix == ".py" and name != FIXTURES:
            text = _read(file)
            asked |= text.arguments if file.parent == suite.parent else frozenset()
            pending += text.all_imports - seen
            pending += _packages(name)
    given = _read(found[FIXTURES])
    more = {each for each in (*given.imports, *_of_fixtures(given, asked)) if each not in found}
    for name in sorted(more):
        found |= _closure(name)
    return found


@cache
def _closure(name: str) -> Mapping[str, Path]:
    """A module of prill and everything that it imports, directly or not."""
    found: dict[str, Path] = {}
    pending = [name]
    while pending:
        name = pending.pop()
        if name in found or (file := _file(name, None)) is None:
            continue
        found[name] = file
        pending += [*_read(file).all_imports, *_packages(name)] if file.suffix == ".py" else ()
    return found


def _packages(name: str) -> tuple[str, ...]:
    """The packages of a module, whose `__init__` files run first."""
    return tuple(itertools.accumulate(name.split(".")[:-1], lambda outer, inner: f"{outer}.{inner}"))


def _of_fixtures(given: SourceText, asked: Iterable[str]) -> set[str]:
    """What the requested fixtures import, and the fixtures that they request."""
    imports: set[str] = set()
    pending, done = list(asked), set[str]()
    while pending:
        name = pending.pop()
        if name in given.fixtures and name not in done:
            done.add(name)
            imports |= given.fixtures[name][0]
            pending += given.fixtures[name][1]
    return imports


@cache
def _file(name: str, beside: Path | None) -> Path | None:
    """The file of a module in prill's rooms, or beside the suite; None for any other module."""
    if "/" in name:
        return _folder(name.split("/")[0]).parent / name
    room, *parts = name.split(".")
    folder = _folder(room) if room in ROOMS else beside and beside / room
    if folder is None:
        return None
    base = folder.joinpath(*parts)
    file = base / "__init__.py" if room in ROOMS and base.is_dir() else base.with_suffix(".py")
    return file if file.is_file() else None


@cache
def _folder(room: str) -> Path:
    spec = importlib.util.find_spec(room)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _whole(named: Named, file: Path) -> frozenset[str]:
    """The modules that a part of a file names, and the files beside it, by their paths from their room.

    Raises:
        PrillError: a file of prill's own names a module, or the beginning of one, that does not exist: a
            judge would go uncounted.
    """
    modules = named.modules | {text for text in named.texts if MODULE.fullmatch(text)}
    rooms = [folder for folder in file.parents if folder.name in ROOMS]
    if not rooms:  # a suite of the user's own
        return modules | named.members
    begun = {text for text in named.texts if text.endswith(".")}
    own = {name for name in modules if name.partition(".")[0] in ROOMS}
    for name in sorted(begun | {name for name in own if _file(name, file.parent) is None}):
        raise PrillError(
            "names a module that is not there", where=str(file), expected="its whole name", got=repr(name)
        )
    beside = [file.parent / text for text in named.texts - {STAMP} if BESIDE.fullmatch(text)]
    paths = {found.relative_to(rooms[0].parent).as_posix() for found in beside if found.is_file()}
    return modules | named.members | paths


@cache
def _read(file: Path) -> SourceText:
    found = kept().read(file)
    fixtures = {name: (_whole(named, file), own) for name, (named, own) in found.fixtures.items()}
    return SourceText(_whole(found.outside, file), fixtures, found.arguments)


def warm() -> int:
    """Find every file that judges for a packaged suite, for processes forked from this one; how many."""
    found = sum(len(_judges(suite_file(name).resolve())) for name in suites())
    kept().save()
    return found
