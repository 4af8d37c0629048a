"""`prill inspect`: header, metadata and tensors of a model file, or the differences of two."""

from __future__ import annotations

import hashlib
from typing import Any

import click

from prill_harness.commands.shared.declare import command as declare
from prill_harness.commands.shared.values import abridged, shaped, shown
from prill_harness.console import Console
from prill_harness.records.evidence import builtin
from prill_runtime.errors import UsageError


@declare(
    name="inspect",
    example="prill inspect fixture:llama-tiny\nprill inspect model.gguf --json --full --sha\n"
    "prill inspect model-f16.gguf model-q8_0.gguf",
)
@click.argument("first", metavar="MODEL")
@click.argument("other", required=False)
@click.option("--full", is_flag=True, help="Show whole arrays and strings.")
@click.option("--sha", is_flag=True, help="Show the sha256 of each tensor's bytes.")
def command(console: Console, first: str, other: str | None, full: bool, sha: bool) -> int:
    """Show the header, features, metadata and tensors of MODEL, a path or fixture:NAME[:TYPE].

    With OTHER, compare the two tensor by tensor: types, shapes, NMSE of the dequantised weights; and the
    metadata that differ.

    Exit code 0 when the files could be read, whatever the figures say; a malformed file gives one sentence
    and exit code 4.
    """
    from prill_harness.engines.features import features_of
    from prill_harness.engines.models import resolve_model
    from prill_runtime.gguf.file import open_gguf
    from prill_runtime.models.assumptions import assumptions

    path = resolve_model(first)
    if other is not None:
        if sha:
            raise UsageError("digests are shown of one file", where="--sha", expected="no second file")
        from prill_harness.commands.engines.differences import show

        with open_gguf(path) as a, open_gguf(resolve_model(other)) as b:
            return show(console, a, b, full)
    with open_gguf(path) as file:
        metadata = {key: abridged(builtin(value), full) for key, value in file.metadata.items()}
        tensors: list[dict[str, Any]] = [
            {
                "name": t.name,
                "type": t.type.name,
                "shape": list(t.shape),
                "nbytes": t.nbytes,
                "offset": t.offset,
                **({"part": t.part + 1} if file.further else {}),
                **({"sha256": hashlib.sha256(file.raw(t.name).data).hexdigest()} if sha else {}),
            }
            for t in file.tensors.values()
        ]
        head: dict[str, Any] = {
            "path": str(path),
            **({"parts": len(file.paths)} if file.further else {}),
            "version": file.version,
            "architecture": file.architecture,
            "alignment": file.alignment,
            "sha256": file.sha256,
        }
        assumed, features = assumptions(file), features_of(file)
    by_type: dict[str, int] = {}
    for tensor in tensors:
        by_type[tensor["type"]] = by_type.get(tensor["type"], 0) + tensor["nbytes"]
    console.emit(
        {
            **head,
            "features": None if features is None else sorted(features),
            "metadata": metadata,
            "tensors": tensors,
            "bytes_by_type": by_type,
            "assumptions": [each._asdict() for each in assumed],
        }
    )
    for key, value in head.items():
        console.line(f"{key:14}{value}")
    told = "not known: nothing here describes this file" if features is None else ", ".join(sorted(features))
    console.line(f"{'features':14}{told}")
    for each in assumed:
        console.line(f"{'assumed':14}{each}")
    console.line()
    console.table(("key", "value"), [(key, shown(value, full)) for key, value in metadata.items()])
    console.line()
    columns = [name for name in tensors[0] if name != "name"] if tensors else ["type"]
    console.table(
        ("tensor", *(name.replace("nbytes", "bytes") for name in columns)),
        [(t["name"], *(shaped(t[c]) if c == "shape" else t[c] for c in columns)) for t in tensors],
    )
    console.line()
    sizes = ", ".join(f"{size:,} bytes of {name}" for name, size in sorted(by_type.items()))
    console.line(f"{len(tensors)} tensors: {sizes or 'no data'}")
    return 0
