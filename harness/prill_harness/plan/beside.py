"""Suites of a user's own, in a folder that a policy names, beside the packaged ones."""

from __future__ import annotations

from pathlib import Path

from prill_harness.records import catalog
from prill_harness.records.names import suite_of
from prill_runtime.errors import PolicyError


def holds(folder: Path | None, suite: str) -> bool:
    """Whether the suite is one of the folder's own."""
    return folder is not None and (folder / f"{suite}.py").is_file()


def suite_file(name: str, folder: Path | None) -> Path:
    """The file of a suite: the folder's own, else the packaged one.

    Raises:
        UsageError: no such suite.
    """
    return catalog.suite_file(name, folder if holds(folder, name) else None)


def suites(folder: Path | None) -> tuple[str, ...]:
    """The names of the packaged suites and of the folder's."""
    return (*catalog.suites(), *(catalog.suites(folder) if folder else ()))


def check_ids(folder: Path | None) -> dict[str, tuple[Path, int]]:
    """Every check of the packaged suites and of the folder's, with its file and line."""
    return {**catalog.check_ids(), **(catalog.check_ids(folder) if folder else {})}


def examine(folder: Path | None) -> None:
    """Look at the folder that a policy names.

    Raises:
        PolicyError: no such folder, no check in it, or a suite or check that has the name of a packaged one.
    """
    if folder is None:
        return
    own = catalog.check_ids(folder) if folder.is_dir() else {}
    if not own:
        expected = "a folder of suites, each with a function under @check"
        raise PolicyError("no check in the folder of suites", where=str(folder), expected=expected)
    packaged = {*catalog.suites(), *catalog.check_ids()}
    for name in sorted(packaged & {*catalog.suites(folder), *own}):
        raise PolicyError(
            "prill has this name already", where=str(own.get(name, (folder, 0))[0]), got=repr(name)
        )
    for name, (file, line) in sorted(own.items()):
        if suite_of(name) != file.stem:
            where, expected = f"{file}, line {line}", f"{file.stem}.NAME"
            raise PolicyError(
                "a check is not named after its suite", where=where, expected=expected, got=repr(name)
            )
