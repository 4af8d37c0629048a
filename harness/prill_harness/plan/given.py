"""The names that cells, reports and ledgers carry for the models that a user gave.

A name is the same on every machine: a relative path is its own name, an absolute path is named after its
file, and several with one file name by their paths below the folder they share. Links are not followed,
because a person knows the model by the name that was given.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path, PurePath

from prill_harness.records.evidence import builtin

PACKAGED = ("fixture:", "synth:")


def named(specs: Collection[str]) -> dict[str, str]:
    """Spec -> name of every model, in order; two specs of one path share a name."""
    here = Path.cwd()
    given = {spec: Path(spec).expanduser() for spec in specs if not spec.startswith(PACKAGED)}
    paths = {spec: Path(os.path.normpath(here / path)) for spec, path in given.items()}
    names = {paths[spec]: name for spec, path in given.items() if (name := _relative(path))}
    others = sorted({*paths.values()} - {*names}, key=lambda path: (path.name, path))
    for _, alike in groupby(others, key=lambda path: path.name):
        names |= _apart(list(alike), set(names.values()), here)
    # The name of a path that is not UTF-8 must still fit into JSON.
    return {spec: builtin(names[paths[spec]] if spec in paths else spec) for spec in specs}


def _relative(path: Path) -> str:
    """A path below the current folder as it was given, normalised; empty for any other."""
    plain = PurePath(os.path.normpath(path))
    return "" if plain.is_absolute() or ".." in plain.parts else plain.as_posix()


def _apart(alike: Sequence[Path], taken: Collection[str], here: Path) -> dict[Path, str]:
    """Names for paths with one file name: relative to the folder they share, or to the nearest one above it
    for which none of the names is taken."""
    shared = Path(os.path.commonpath([path.parent for path in alike]))
    for base in (shared, *shared.parents):
        found = {path: path.relative_to(base).as_posix() for path in alike}
        if not set(found.values()) & set(taken):
            return found
    return {path: Path(os.path.relpath(path, here)).as_posix() for path in alike}
