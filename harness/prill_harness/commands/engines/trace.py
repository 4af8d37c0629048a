"""`prill trace`: write every stage of a pass to a file, and print their shapes."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from prill_harness.commands.shared.declare import SPECS, vram_option
from prill_harness.commands.shared.declare import command as declare
from prill_harness.commands.shared.texts import ids_for, text_options
from prill_harness.console import Console


@declare(
    name="trace",
    example="prill trace --engine numpy --model fixture:llama-tiny --ids 1,306,4658 -o t.npz\n"
    "prill bisect --trace t.npz --model fixture:llama-tiny",
)
@click.option("--engine", default="numpy", show_default=True, help=f"{SPECS}.")
@vram_option
@click.option("--model", required=True, help="Path, or fixture:NAME[:TYPE].")
@text_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write `ids` and the stages as .npz.",
)
def command(
    console: Console,
    engine: str,
    model: str,
    prompt: str | None,
    ids: str | None,
    tokens: int | None,
    output: Path | None,
) -> int:
    """Run token ids through an engine and keep every stage, in execution order."""
    from prill_harness.faults.opening import open_engine
    from prill_harness.stages import trace

    with open_engine("numpy", model) as reader:
        wanted = ids_for(reader, model, prompt=prompt, ids=ids, tokens=tokens)
    with open_engine(engine, model) as opened:
        made = trace.capture(opened, wanted)
    if output is not None:
        trace.save(made, output)
    rows: list[tuple[str, ...]] = [
        (name, "x".join(map(str, array.shape)), f"{_rms(array):.4g}", f"{np.abs(array).max():.4g}",
         made.names.get(name, ""), made.ops.get(name, ""))
        for name, array in made.stages.items()
    ]  # fmt: skip
    columns: tuple[str, ...] = ("stage", "shape", "rms", "largest", "named", "op")
    if not (made.names or made.ops):
        rows, columns = [row[:4] for row in rows], columns[:4]
    console.emit(
        {
            "engine": engine,
            "model": model,
            "ids": made.ids,
            "file": None if output is None else str(output),
            "stages": [dict(zip(columns, row, strict=True)) for row in rows],
        }
    )
    console.table(columns, rows)
    kept = f", written to {output}" if output is not None else "; -o t.npz writes them to a file"
    console.line(f"{len(rows)} stages over {len(made.ids)} ids{kept}")
    return 0


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
