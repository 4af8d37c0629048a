"""A model file goes in; its header, metadata and tensor table come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from prill_harness.commands import command as declare
from prill_harness.console import Console, printable
from prill_harness.evidence import builtin

SHOWN = 6  # elements of a long array that are worth a line
LONGEST = 72  # characters of a string value on a terminal


@declare(name="inspect", example="prill inspect fixture:llama-tiny\nprill inspect model.gguf --json --full")
@click.argument("model")
@click.option("--full", is_flag=True, help="Show whole arrays and strings.")
def command(console: Console, model: str, full: bool) -> int:
    """Show the header, metadata and tensors of MODEL, a path or fixture:NAME[:TYPE].

    A malformed file gives one sentence and exit code 4.
    """
    from prill_harness.engines import resolve_model
    from prill_runtime.assumptions import assumptions
    from prill_runtime.gguf import open_gguf

    path = resolve_model(model)
    with open_gguf(path) as file:
        metadata = {key: _abridged(builtin(value), full) for key, value in file.metadata.items()}
        tensors: list[dict[str, Any]] = [
            {
                "name": t.name,
                "type": t.type.name,
                "shape": list(t.shape),
                "nbytes": t.nbytes,
                "offset": t.offset,
            }
            for t in file.tensors.values()
        ]
        head: dict[str, Any] = {
            "path": str(path),
            "version": file.version,
            "architecture": file.architecture,
            "alignment": file.alignment,
            "sha256": file.sha256,
        }
        assumed = assumptions(file)
    by_type: dict[str, int] = {}
    for tensor in tensors:
        by_type[tensor["type"]] = by_type.get(tensor["type"], 0) + tensor["nbytes"]
    console.emit(
        {
            **head,
            "metadata": metadata,
            "tensors": tensors,
            "bytes_by_type": by_type,
            "assumptions": [each._asdict() for each in assumed],
        }
    )
    for key, value in head.items():
        console.line(f"{key:14}{value}")
    for each in assumed:
        console.line(f"{'assumed':14}{each}")
    console.line()
    console.table(("key", "value"), [(key, _shown(value, full)) for key, value in metadata.items()])
    console.line()
    console.table(
        ("tensor", "type", "shape", "bytes", "offset"),
        [
            (t["name"], t["type"], " x ".join(map(str, t["shape"])) or "scalar", t["nbytes"], t["offset"])
            for t in tensors
        ],
    )
    console.line()
    sizes = ", ".join(f"{size:,} bytes of {name}" for name, size in sorted(by_type.items()))
    console.line(f"{len(tensors)} tensors: {sizes or 'no data'}")
    return 0


def _abridged(value: Any, full: bool) -> Any:
    """A long array as its length and first elements."""
    if full or not isinstance(value, Sequence) or isinstance(value, str) or len(value) <= SHOWN:
        return value
    return {"length": len(value), "first": list(value[:SHOWN])}


def _shown(value: Any, full: bool) -> str:
    if isinstance(value, dict):
        return f"{value['length']} values: {_shown(value['first'], full)[1:-1]}, ..."
    text = printable(repr(value) if isinstance(value, str | list) else value)
    return text if full or len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"
