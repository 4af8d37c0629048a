"""Model specs as they were given in; the name that cells, reports and ledgers carry for each out.

A name is the same on every machine: a file inside the current folder is called by its path from there, any
other by its file name, with as many of the folders above it as tell it from the rest. Links are not followed,
because the name that was given is the name that a person knows.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path, PurePath

PACKAGED = ("fixture:", "synth:")


def named(specs: Collection[str]) -> dict[str, str]:
    """Spec -> name of every model, in order; two specs of one path have one name."""
    here = Path.cwd()
    paths = {
        spec: Path(os.path.normpath(here / Path(spec).expanduser()))
        for spec in specs
        if not spec.startswith(PACKAGED)
    }
    inside = {p: p.relative_to(here).as_posix() for p in paths.values() if p.is_relative_to(here)}
    outside = list(dict.fromkeys(p for p in paths.values() if p not in inside))
    taken = set(inside.values())
    names = inside | {path: _shortest(path, outside, taken, here) for path in outside}
    return {spec: names[paths[spec]] if spec in paths else spec for spec in specs}


def _shortest(path: Path, others: Iterable[Path], taken: set[str], here: Path) -> str:
    """The shortest end of a path that no other path ends in, and that no file of the current folder has."""
    for length in range(1, len(path.parts)):
        end = path.parts[-length:]
        shared = any(other.parts[-length:] == end for other in others if other != path)
        if not shared and (name := PurePath(*end).as_posix()) not in taken:
            return name
    return Path(os.path.relpath(path, here)).as_posix()
