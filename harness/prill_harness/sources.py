"""The file of a suite in; every file of prill that decides what its checks see and say out.

What a suite imports judges for it, and what that imports, wherever in a file the import stands; a module or a
file that is named in a text, as those are that a child process runs, is imported too. So does what runs every
check: the plugin, whose fixtures count for the suites that name them, the recorder and the rules of outcomes.
The runtime is not a judge but what is judged; planted faults have digests of their own; commands and reports
come after the evidence: none of them is in.

Imports are read from the text, so that a fault planted in this process, or a module that was never run,
changes nothing.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from prill_harness.catalog import suite_file, suites

ROOMS = ("prill_harness", "prill_suites", "prill_fixtures")
PLUGIN = "prill_harness.plugin"
RUNS_CHECKS = (PLUGIN, "prill_harness.recorder", "prill_harness.outcomes")
CATALOGUE = "prill_harness.faults."  # what is planted is no judge
_MODULE = re.compile(rf"(?:{'|'.join(ROOMS)})(?:\.\w+)+")
_BESIDE = re.compile(r"\w+\.(?!py$)\w+")


@dataclass(frozen=True)
class Text:
    """One file as far as imports go.

    Attributes:
        imports: modules that it names, outside fixtures; files beside it that it names, by their paths.
        fixtures: name of a pytest fixture -> the modules that it names, and its arguments.
        arguments: of all functions.
    """

    imports: frozenset[str]
    fixtures: Mapping[str, tuple[frozenset[str], frozenset[str]]]
    arguments: frozenset[str]

    @property
    def all_imports(self) -> frozenset[str]:
        return self.imports.union(*(imports for imports, _ in self.fixtures.values()))


@cache
def judging(suite: Path) -> Mapping[str, bytes]:
    """Name -> text of the suite's own file and of every file that judges for it, in a fixed order."""
    suite = suite.resolve()
    own = _read(suite)
    found, asked = {suite.name: suite}, set(own.arguments)
    pending = [*RUNS_CHECKS, *own.all_imports]
    while pending:
        name = pending.pop()
        file = _file(name, suite.parent)
        if file is None or name in found or file == suite:
            continue
        found[name] = file
        if file.suffix == ".py" and name != PLUGIN:
            text = _read(file)
            asked |= text.arguments if file.parent == suite.parent else frozenset()
            pending += [*text.all_imports, *_packages(name)]
    plugin = _read(found[PLUGIN])
    more = {each for each in (*plugin.imports, *_of_fixtures(plugin, asked)) if each not in found}
    for name in sorted(more):
        found |= _closure(name)
    return {name: file.read_bytes() for name, file in sorted(found.items())}


@cache
def _closure(name: str) -> Mapping[str, Path]:
    """A module of prill and all that it imports."""
    found: dict[str, Path] = {}
    pending = [name]
    while pending:
        name = pending.pop()
        file = _file(name, Path())
        if file is None or name in found:
            continue
        found[name] = file
        pending += [*_read(file).all_imports, *_packages(name)] if file.suffix == ".py" else ()
    return found


def _packages(name: str) -> tuple[str, ...]:
    """The packages of a module, whose own files run first."""
    return tuple(itertools.accumulate(name.split(".")[:-1], lambda outer, inner: f"{outer}.{inner}"))


def _of_fixtures(plugin: Text, asked: Iterable[str]) -> set[str]:
    """What the fixtures that are asked for import, and those that they ask for."""
    imports: set[str] = set()
    pending, done = list(asked), set[str]()
    while pending:
        name = pending.pop()
        if name in plugin.fixtures and name not in done:
            done.add(name)
            imports |= plugin.fixtures[name][0]
            pending += plugin.fixtures[name][1]
    return imports


def _file(name: str, beside: Path) -> Path | None:
    """The file of a module of prill's rooms, or of one that lies beside the suite; None for all others."""
    if "/" in name:
        return _folder(name.split("/")[0]).parent / name
    room, *parts = name.split(".")
    base = _folder(room).joinpath(*parts) if room in ROOMS else beside.joinpath(room, *parts)
    file = base / "__init__.py" if room in ROOMS and base.is_dir() else base.with_suffix(".py")
    return file if file.is_file() else None


@cache
def _folder(room: str) -> Path:
    spec = importlib.util.find_spec(room)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _read(file: Path) -> Text:
    tree = ast.parse(file.read_bytes(), str(file))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    fixtures = {
        f.name: (frozenset(_named(ast.walk(f), file)), frozenset(_arguments(f)))
        for f in functions
        if any("fixture" in ast.unparse(d) for d in f.decorator_list)
    }
    types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    apart = [*types, *(f for f in functions if f.name in fixtures)]
    inside = {id(n) for each in apart for n in ast.walk(each)}
    outside = (n for n in ast.walk(tree) if id(n) not in inside)
    arguments = frozenset(name for f in functions for name in _arguments(f))
    return Text(frozenset(_named(outside, file)), fixtures, arguments)


def _arguments(function: ast.FunctionDef) -> Iterator[str]:
    return (a.arg for a in (*function.args.args, *function.args.kwonlyargs))


def _named(nodes: Iterable[ast.AST], file: Path) -> Iterator[str]:
    """Modules that imports and texts name, and files beside this one, with their paths from their room.

    Of `from package import name` both, for the name may be a module. A text that ends in a dot is the
    beginning of modules whose last names are texts too.
    """
    texts: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    yield from filter(_MODULE.fullmatch, texts)
    begun = [t for t in texts if t.endswith(".") and t != CATALOGUE and _MODULE.fullmatch(t[:-1])]
    yield from (first + last for first in begun for last in texts if last.isidentifier())
    room = next((folder for folder in file.parents if folder.name in ROOMS), file.parent)
    beside = (file.parent / text for text in texts if _BESIDE.fullmatch(text))
    yield from (found.relative_to(room.parent).as_posix() for found in beside if found.is_file())


def warm() -> int:
    """Read all that the packaged suites are judged by, for processes that are forked from this one; files."""
    return sum(len(judging(suite_file(name))) for name in suites())
