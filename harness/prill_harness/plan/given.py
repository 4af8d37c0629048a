"""Model specs as they were given in; the name that cells, reports and ledgers carry for each out.

A name is the same on every machine: a relative path is its own name, an absolute one is called by its file's
name, and several of one file name by where they lie in the folder that they share. Links are not followed,
because the name that was given is the name that a person knows.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path, PurePath

from prill_harness.records.evidence import builtin

PACKAGED = ("fixture:", "synth:")


def named(specs: Collection[str]) -> dict[str, str]:
    """Spec -> name of every model, in order; two specs of one path have one name."""
    here = Path.cwd()
    given = {spec: Path(spec).expanduser() for spec in specs if not spec.startswith(PACKAGED)}
    paths = {spec: Path(os.path.normpath(here / path)) for spec, path in given.items()}
    names = {paths[spec]: name for spec, path in given.items() if (name := _relative(path))}
    others = sorted({*paths.values()} - {*names}, key=lambda path: (path.name, path))
    for _, alike in groupby(others, key=lambda path: path.name):
        names |= _apart(list(alike), set(names.values()), here)
    # A path that is no UTF-8 has a name that JSON can carry.
    return {spec: builtin(names[paths[spec]] if spec in paths else spec) for spec in specs}


def _relative(path: Path) -> str:
    """A path below the current folder as it was given, without detours; empty for any other."""
    plain = PurePath(os.path.normpath(path))
    return "" if plain.is_absolute() or ".." in plain.parts else plain.as_posix()


def _apart(alike: Sequence[Path], taken: Collection[str], here: Path) -> dict[Path, str]:
    """Paths of one file name by where they lie in the folder that they share, or in the nearest above where
    none of these names is taken."""
    shared = Path(os.path.commonpath([path.parent for path in alike]))
    for base in (shared, *shared.parents):
        found = {path: path.relative_to(base).as_posix() for path in alike}
        if not set(found.values()) & set(taken):
            return found
    return {path: Path(os.path.relpath(path, here)).as_posix() for path in alike}
