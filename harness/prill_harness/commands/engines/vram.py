"""`prill vram`: a model's ledger of device memory, moment by moment."""

from __future__ import annotations

import click

from prill_harness.commands.shared.declare import command as declare
from prill_harness.commands.shared.declare import vram_option
from prill_harness.console import Console


@declare(
    name="vram", example="prill vram --model fixture:llama-tiny\nprill vram --engine cuda --model m.gguf"
)
@click.option("--engine", default="emu", show_default=True, help="Engine spec, of one on a device.")
@vram_option
@click.option("--model", required=True, help="Path, or fixture:NAME[:TYPE].")
def command(console: Console, engine: str, model: str) -> int:
    """Show what a model takes of a device: planned, loaded, idle, in use, and after.

    Exit code 0 when the ledger stays within its plan, takes what the formulas say and comes back to idle, 1
    when it does not, 10 for an engine without device memory.
    """
    from prill_harness.engines.models import resolve_model
    from prill_harness.faults.opening import open_engine
    from prill_harness.measure.vram import MOMENTS, SESSIONS, account
    from prill_runtime.device.memory.arena import shown
    from prill_runtime.gguf.file import open_gguf

    with open_gguf(resolve_model(model)) as file:
        file_bytes = sum(tensor.nbytes for tensor in file.tensors.values())
    with open_engine(engine, model) as opened:
        config = opened.info.config
        found = account(opened, file_bytes)
    console.emit(found)
    rows = [
        (purpose, shown(size), *(shown(found.held[moment][purpose]) for moment in MOMENTS))
        for purpose, size in found.planned.items()
    ]
    rows.append(("in all", shown(sum(found.planned.values())),
                 *(shown(sum(found.held[moment].values())) for moment in MOMENTS)))  # fmt: skip
    console.table(("purpose", "planned", *MOMENTS), rows)
    weights = found.held["loaded"]["weights"]
    console.line(
        f"weights: {file_bytes} bytes in the file, {weights} on the device ({weights / file_bytes - 1:+.1%})"
    )
    console.line(
        f"cache: 2 x {config['n_layers']} layers x {config['n_kv_heads']} heads x {config['head_dim']} "
        f"values x 4 bytes = {found.position_bytes} bytes a position; room for "
        f"{found.planned['cache'] // found.position_bytes} positions"
    )
    console.line(
        f"pieces: {SESSIONS} sessions of {found.positions} positions, every second closed: "
        f"{shown(found.free)} free, {shown(found.gap)} of it in one piece "
        f"({found.gap / max(1, found.free):.0%})"
    )
    for clause in found.wrong:
        console.line(f"wrong: {clause}", status="failed")
    if not found.wrong:
        console.line("the ledger is within its plan, and back at idle", status="ok")
    return 1 if found.wrong else 0
