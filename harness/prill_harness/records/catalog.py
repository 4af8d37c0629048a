"""Find suites and the ids of their checks, without importing any of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from prill_harness.records.names import look_up
from prill_harness.records.parsed import kept
from prill_runtime.errors import UsageError


def packaged() -> Path:
    """The folder of the packaged suites, checklists and gates (located, not imported).

    Raises:
        UsageError: the package `prill_suites` is not installed.
    """
    spec = importlib.util.find_spec("prill_suites")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the packaged suites are missing", hint="install prill again")
    return Path(next(iter(spec.submodule_search_locations)))


def repository() -> Path:
    """The root of the repository that the current folder lies in; outside of any, the current folder."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)


def shown(path: Path) -> str:
    """A file as reports and CI services name it: relative to the repository that the current folder lies in
    (outside of any: to the current folder) if it lies inside, else to its package or the folder that holds
    it; never an absolute path of this machine."""
    absolute = path.resolve()
    for base in (repository(), packaged().parent):
        if absolute.is_relative_to(base):
            return absolute.relative_to(base).as_posix()
    return f"{absolute.parent.name}/{absolute.name}"


def suite_file(name: str, folder: Path | None = None) -> Path:
    """The file of suite `name` in `folder` (None: the packaged suites).

    Raises:
        UsageError: no such suite.
    """
    folder = folder or packaged()
    file = folder / f"{name}.py"
    if not name.isidentifier() or not file.is_file():
        look_up(name, suites(folder), "no such suite", where=str(folder))
    return file


def suites(folder: Path | None = None) -> tuple[str, ...]:
    """Names of the suites in `folder` that hold at least one check."""
    return tuple(sorted({file.stem for file, _ in _declared(folder or packaged()).values()}))


def check_ids(folder: Path | None = None) -> dict[str, tuple[Path, int]]:
    """Every check id declared with a literal name, and the file and line that declare it."""
    return _declared(folder or packaged())


def takes(suite: str, argument: str, folder: Path | None = None) -> bool:
    """Whether a function of the suite's file takes an argument, or a fixture, of that name."""
    return argument in kept().read(suite_file(suite, folder)).arguments


def _declared(folder: Path) -> dict[str, tuple[Path, int]]:
    found: dict[str, tuple[Path, int]] = {}
    for file in sorted(folder.glob("*.py")):
        try:
            checks = kept().read(file).checks
        except (SyntaxError, ValueError) as error:
            raise UsageError("a suite is not valid Python", where=str(file), got=str(error)) from error
        for name, line in checks:
            found.setdefault(name, (file, line))
    kept().save()
    return found
