"""Stage traces: captured from an engine or read from a file, by cupel's stage names, in execution order."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cupel_harness.engines.base import Engine
from cupel_harness.stages import canonical
from cupel_runtime.errors import UsageError

Array = NDArray[np.float64]
# llama.cpp names the projection and its rotated form alike: the second one seen is the rotated one.
_SECOND = {"q": "q_rope", "k": "k_rope"}


@dataclass(frozen=True)
class Trace:
    """One pass over `ids`: stage name -> array, in execution order; `unknown` holds names no table has."""

    ids: tuple[int, ...]
    stages: Mapping[str, Array]
    unknown: tuple[str, ...] = ()


def capture(engine: Engine, ids: Sequence[int], replace: Mapping[str, Array] | None = None) -> Trace:
    """Run `ids` through the engine and keep a copy of every stage.

    Args:
        replace: the stage's array is kept as computed, then this one is handed on in its place: with the
            oracle's trace here, every stage is computed from the oracle's inputs.
    """
    return _collect(ids, engine.trace(ids, replace))


def _collect(ids: Sequence[int], pairs: Iterable[tuple[str, NDArray[np.floating]]]) -> Trace:
    stages: dict[str, Array] = {}
    unknown: list[str] = []
    for name, array in pairs:
        stage = canonical(name)
        if stage in stages:
            block, _, kind = stage.rpartition(".")
            stage = f"{block}.{_SECOND[kind]}" if kind in _SECOND else None
        if stage is None:
            unknown.append(name)
        else:
            stages[stage] = np.array(array, dtype=np.float64)
    return Trace(tuple(int(i) for i in ids), stages, tuple(unknown))


def save(trace: Trace, path: str | Path) -> None:
    """Write a trace as .npz: `ids`, and one array per stage under its own name, in order."""
    with Path(path).open("wb") as file:
        np.savez(file, allow_pickle=False, ids=np.array(trace.ids, dtype=np.int64), **trace.stages)


def load(path: str | Path) -> Trace:
    """Read a trace; the arrays may carry cupel's, llama.cpp's or transformers' names.

    Raises:
        UsageError: not an .npz of plain arrays, or without `ids`.
    """
    return _collect(*_read(Path(path)))


def _read(path: Path) -> tuple[list[int], list[tuple[str, NDArray[np.floating]]]]:
    hint = "write it with `cupel trace -o t.npz` or numpy.savez(path, ids=…, **stages)"
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise UsageError("not a trace", where=str(path), expected="an .npz archive", hint=hint)
            if "ids" not in archive.files:
                raise UsageError("trace has no ids", where=str(path), got=archive.files[:5], hint=hint)
            ids = [int(i) for i in np.atleast_1d(archive["ids"])]
            return ids, [(name, archive[name]) for name in archive.files if name != "ids"]
    except FileNotFoundError:
        raise UsageError("no such trace file", where=str(path)) from None
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError("not a trace", where=str(path), got=str(error), hint=hint) from error


def rows(array: Array) -> Array:
    """The array as (token, everything else), so that (n, heads, d) and (n, heads*d) compare alike."""
    return array.reshape(array.shape[0], -1) if array.ndim else array.reshape(1, 1)


def pairs(candidate: Trace, oracle: Trace) -> Iterator[tuple[str, Array, Array]]:
    """Stages both traces have, in the oracle's order: (name, candidate's array, oracle's array)."""
    for name, reference in oracle.stages.items():
        if name in candidate.stages:
            yield name, candidate.stages[name], reference
