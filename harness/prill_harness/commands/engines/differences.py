"""The tables of `prill inspect A B`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from prill_harness.commands.shared.values import abridged, shaped, shown
from prill_harness.console import Console
from prill_harness.measure.filediff import KeyDiff, compare
from prill_harness.records.evidence import builtin
from prill_runtime.gguf.file import GGUFFile


def show(console: Console, a: GGUFFile, b: GGUFFile, full: bool) -> int:
    """Print the differences of two files: a row per tensor, a row per key, and one sentence."""
    found = compare(a, b)
    console.emit(
        builtin(
            {
                "a": {"path": str(a.path), "sha256": a.sha256},
                "b": {"path": str(b.path), "sha256": b.sha256},
                "same": found.same,
                "nmse": found.nmse,
                "tensors": msgspec.to_builtins(found.tensors),
                "metadata": [
                    {
                        "key": k.key,
                        "a": abridged(builtin(k.a), full),
                        "b": abridged(builtin(k.b), full),
                        "first_difference": k.at,
                    }
                    for k in found.metadata
                ],
            }
        )
    )
    for letter, file in (("A", a), ("B", b)):
        console.line(f"{letter}  {file.path}")
    console.line()
    rows = []
    for t in found.tensors:
        sides = [(side.type, shaped(side.shape)) if side else ("-", "-") for side in (t.a, t.b)]
        (left, shape), (right, other) = sides
        shape = " / ".join(dict.fromkeys(each for each in (shape, other) if each != "-"))
        rows.append(
            (t.name, left, right, shape, _figure(t.nmse), _figure(t.largest), t.note or "same" * t.same)
        )
    console.table(("tensor", "A", "B", "shape", "NMSE", "largest difference", ""), rows)
    if found.metadata:
        console.line()
        console.table(("key", "A", "B"), [(k.key, *_values(k, full)) for k in found.metadata])
    console.line()
    equal = sum(t.same for t in found.tensors)
    whole = "" if found.nmse is None else f", NMSE {_figure(found.nmse)} over all weights"
    count = len(found.metadata)
    keys = "1 metadata key differs" if count == 1 else f"{count} metadata keys differ"
    console.line(f"{len(found.tensors)} tensors, {equal} with the same bytes{whole}; {keys}")
    return 0


def _values(key: KeyDiff, full: bool) -> Iterator[str]:
    """Both values; for two arrays their lengths and first different elements, unless `full`."""
    for value in (key.a, key.b):
        if value is None:
            yield "-"
        elif key.at is None or full:
            yield shown(abridged(builtin(value), full), full)
        else:
            part = shown(value[key.at], full) if key.at < len(value) else "ends"
            yield f"{len(value)} values, at {key.at}: {part}"


def _figure(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.2e}"
