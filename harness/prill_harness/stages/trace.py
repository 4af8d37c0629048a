"""Stage traces: captured from an engine or read from a file, by prill's stage names, in execution order."""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Engine
from prill_harness.stages.table import FUSED, Origin, canonical, preferred, rotated
from prill_runtime.errors import UsageError
from prill_runtime.files import refuse_pipe
from prill_runtime.models.base import Stage
from prill_runtime.models.nodes.rope import Rope

Array = NDArray[np.float64]
Named = tuple[str, NDArray[Any]]

PACKED, LARGEST_SMALL = 20, 64 << 20  # most expansion of an array, and bytes that any array may unpack to
_COUNTED = re.compile(r"#\d+$")
_UNREADABLE = (
    ValueError, OSError, EOFError, MemoryError, RuntimeError, KeyError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """One pass over `ids`.

    Attributes:
        stages: stage name -> array, in execution order.
        unknown: names that are in no table, in order.
        names: stage -> its original name, for stages that had another.
        ops: stage -> the op that computed it, where the engine tells.
    """

    ids: tuple[int, ...]
    stages: Mapping[str, Array]
    unknown: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    ops: Mapping[str, str] = field(default_factory=dict)


def capture(engine: Engine, ids: Sequence[int], replace: Mapping[str, Array] | None = None) -> Trace:
    """Run `ids` through the engine and keep a copy of every stage.

    Args:
        replace: each stage's array is kept as computed, then replaced by this one for the rest of the pass:
            with the oracle's trace here, every stage is computed from the oracle's inputs.

    Raises:
        MissingCapability: the engine shows no stages, or accepts no replacements.
    """
    return collect(ids, engine.trace(ids, replace))


def collect(ids: Sequence[int], arrays: Iterable[Named]) -> Trace:
    """A trace from (name, array) pairs in execution order; the names may be prill's, llama.cpp's or
    transformers', may tell the op (`NAME = OP(SOURCES)`), and may occur twice (`NAME#2` is NAME again)."""
    entries = [
        (Origin.read(_COUNTED.sub("", name)), np.array(array, dtype=np.float64)) for name, array in arrays
    ]
    given = [origin.name for origin, _ in entries]
    known = preferred(given)
    found: dict[str, list[int]] = {}
    for at, name in enumerate(given):
        if name in known and (stage := canonical(name, given)) is not None:
            found.setdefault(stage, []).append(at)
    chosen: dict[int, str] = {}
    for stage, places in found.items():
        turned = rotated(given[places[-1]], stage)
        if turned is not None and len(places) > 1 and turned not in found:
            chosen[places[-2]], chosen[places[-1]] = stage, turned
        else:
            # The sum with a bias comes under the product's name, so the last array of a name is the complete
            # one.
            chosen[places[-1] if turned is not None or stage.endswith(".v") else places[0]] = stage
    stages: dict[str, Array] = {}
    names: dict[str, str] = {}
    ops: dict[str, str] = {}
    for at in sorted(chosen):
        for stage, array in _split(chosen[at], entries[at][1]):
            if stage in stages:
                continue
            stages[stage] = array
            origin = entries[at][0]
            if origin.said != stage:
                names[stage] = origin.said
            if origin.op:
                ops[stage] = origin.op
    unknown = tuple(origin.said for at, (origin, _) in enumerate(entries) if at not in chosen)
    return Trace(tuple(int(i) for i in ids), stages, unknown, names, ops)


def _split(stage: str, array: Array) -> Iterator[tuple[str, Array]]:
    """A fused query, key and value (token, width) as three stages; other arrays unchanged.

    They are thirds, whatever the model: `_regrouped` knows how wide each of them is.
    """
    block, _, kind = stage.rpartition(".")
    if kind != FUSED:
        yield stage, array
    elif array.ndim:
        for part, third in zip("qkv", np.array_split(array, 3, axis=-1), strict=True):
            yield f"{block}.{part}", third


def _regrouped(trace: Trace, truth: Mapping[str, Array]) -> dict[str, Array]:
    """The stages, thirds of a fused array divided anew where the oracle's queries are wider than its keys."""
    stages = dict(trace.stages)
    for q in [name for name in stages if name.endswith(".q")]:
        parts = [q[:-1] + part for part in "qkv"]
        fused = {canonical(trace.names.get(name, "")) for name in parts} == {q[:-1] + FUSED}
        if not (fused and truth.keys() >= set(parts)):
            continue
        whole = np.concatenate([stages[name] for name in parts], axis=-1)
        ends = np.cumsum([math.prod(truth[name].shape[1:]) for name in parts])
        if whole.shape[-1] == ends[-1]:
            stages |= zip(parts, np.split(whole, ends[:-1], axis=-1), strict=True)
    return stages


def save(trace: Trace, path: str | Path) -> None:
    """Write a trace as .npz: `ids`, and one array per stage under its name, in order."""
    with Path(path).open("wb") as file:
        np.savez(file, ids=np.array(trace.ids, dtype=np.int64), **trace.stages)  # type: ignore[arg-type]


def load(path: str | Path) -> Trace:
    """Read a trace; the arrays may carry prill's, llama.cpp's or transformers' names.

    Raises:
        UsageError: not an .npz of plain arrays of numbers, or without `ids`.
    """
    where = str(path)
    hint = "write it with `prill trace -o t.npz` or numpy.savez(path, ids=…, **stages)"
    try:
        refuse_pipe(Path(path))
        entries = list(_members(Path(path)))
    except FileNotFoundError:
        raise UsageError("no such trace file", where=where) from None
    except IsADirectoryError:
        raise UsageError("not a trace", where=where, expected="a file", got="a folder", hint=hint) from None
    except _UNREADABLE as error:
        got = str(error) or type(error).__name__
        raise UsageError(
            "not a trace", where=where, expected="an .npz archive", got=got, hint=hint
        ) from error
    ids = next((array for name, array in entries if name == "ids"), None)
    if ids is None:
        got = ", ".join(name for name, _ in entries[:5]) or "nothing"
        raise UsageError("the trace has no ids", where=where, expected="an array `ids`", got=got, hint=hint)
    if ids.dtype.kind not in "iu" or not ids.size:
        raise UsageError("the ids are no token ids", where=where, expected="integers", got=str(ids.dtype))
    for name, array in entries:
        if array.dtype.kind not in "fiub":
            raise UsageError("an array has no numbers", where=f"{where}, {name}", got=str(array.dtype))
    return collect(ids.ravel().tolist(), [(name, array) for name, array in entries if name != "ids"])


def _members(path: Path) -> Iterator[Named]:
    """The arrays of an .npz in the order in which they were written, including those with equal names."""
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            # A stored array is no larger than the file; compressed ones may unpack to a thousand times that.
            if item.file_size > PACKED * max(item.compress_size, LARGEST_SMALL // PACKED):
                raise ValueError(
                    f"{item.filename} unpacks from {item.compress_size} to {item.file_size} bytes"
                )
            with archive.open(item) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
                yield item.filename.removesuffix(".npy"), array


def fit(
    trace: Trace, truth: Mapping[str, Array], table: Mapping[str, Stage]
) -> tuple[dict[str, Array], dict[str, tuple[int, ...]]]:
    """The trace's arrays in the oracle's layout, and the shapes of those that cannot be brought into it.

    Leading axes of size one are dropped, and heads joined or split. An array may have fewer rows than the
    oracle's: engines that need only the last logits drop earlier rows, so its rows are the last ones.

    Args:
        table: the model's stages, which say what is rotated, and in which pairs.

    Returns:
        stage -> array (rows, ...) of the oracle's trailing shape; stage -> shape of what does not fit.
    """
    neighbours = {source for stage in table.values() for source in stage.inputs
                  if isinstance(stage.node, Rope) and stage.node.layout == "norm"}  # fmt: skip
    fitted: dict[str, Array] = {}
    odd: dict[str, tuple[int, ...]] = {}
    for name, array in _placed(trace, truth):
        tail = truth[name].shape[1:]
        heads_first = len(tail) == 2 and array.shape[-3:] == (tail[0], len(truth[name]), tail[1])
        if (
            heads_first and array.shape != truth[name].shape
        ):  # as many tokens as heads: laid out as the oracle's
            array = array.swapaxes(-2, -3)
        count, rest = divmod(array.size, int(np.prod(tail)))
        if rest or not 0 < count <= len(truth[name]):
            odd[name] = array.shape
            continue
        shaped = array.reshape(count, *tail)
        if name in neighbours and trace.names.get(name, "").endswith(("q_proj", "k_proj")):
            # transformers keeps the halves of a rotary pair half a head apart, such a file side by side.
            shaped = shaped.reshape(count, tail[0], 2, -1).swapaxes(-1, -2).reshape(count, *tail)
        fitted[name] = shaped
    return {name: fitted[name] for name in truth if name in fitted}, odd


def _placed(trace: Trace, truth: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Stages that the oracle has too; a single `Qcur` may be the rotated one, which overwrote the first."""
    for name, array in _regrouped(trace, truth).items():
        turned = rotated(trace.names.get(name, ""), name)
        if turned and turned in truth and turned not in trace.stages and array.size == truth[turned].size:
            flat = array.ravel()
            near, far = (float(np.sum((flat - truth[n].ravel()) ** 2)) for n in (turned, name))
            name = turned if near < far else name
        if name in truth:
            yield name, array


def rows(array: Array) -> Array:
    """The array as (token, everything else), so that (n, heads, d) and (n, heads*d) compare equal."""
    return array.reshape(array.shape[0], -1) if array.ndim else array.reshape(1, 1)


def pairs(candidate: Trace, oracle: Trace) -> Iterator[tuple[str, Array, Array]]:
    """Stages that both traces have, in the oracle's order: (name, candidate's array, oracle's array)."""
    stages = _regrouped(candidate, oracle.stages)
    for name, reference in oracle.stages.items():
        if name in stages:
            yield name, stages[name], reference
