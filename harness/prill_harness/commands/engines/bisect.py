"""`prill bisect`: the first wrong stage of an engine or a trace file, and the mistake that explains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prill_harness.commands.shared import door
from prill_harness.commands.shared.declare import SPECS, vram_option
from prill_harness.commands.shared.declare import command as declare
from prill_harness.commands.shared.texts import checked_ids, ids_for, text_options
from prill_harness.console import Console
from prill_runtime.errors import UsageError

if TYPE_CHECKING:
    from prill_harness.stages.bisect import Report, StageResult

WHOLE = 80  # stages up to which the table shows all
HALF, DECADES = 10, 5  # marks, and powers of ten, on either side of the bound in the chart


@declare(
    name="bisect",
    example="prill bisect --engine numpy+fault:rope_pairing --model fixture:llama-tiny\n"
    "prill bisect --trace t.npz --arithmetic half --model model.gguf",
    judges=True,
)
@click.option("--engine", help=f"{SPECS}; default numpy.")
@vram_option
@click.option(
    "--trace",
    "file",
    type=click.Path(path_type=Path),
    help="In place of an engine: an .npz of `ids` and stages, named as prill, llama.cpp or transformers do.",
)
@click.option("--against", default="numpy64", show_default=True, help="The oracle, an embedded engine.")
@click.option("--model", required=True, help="Path, or fixture:NAME[:TYPE].")
@text_options
@click.option(
    "--arithmetic",
    type=click.Choice(("float32", "half", "int8")),
    default="float32",
    show_default=True,
    help="What a trace file was computed in; it chooses the lane.",
)
@click.option("--all", "whole", is_flag=True, help=f"Show every stage, also of more than {WHOLE}.")
def command(
    console: Console,
    engine: str | None,
    file: Path | None,
    against: str,
    model: str,
    prompt: str | None,
    ids: str | None,
    tokens: int | None,
    arithmetic: str,
    whole: bool,
) -> int:
    """Find the first wrong stage of an engine, and say what is wrong with it.

    Two walks: both engines run free, then each stage is computed from the oracle's input, so that no mistake
    hides another. Exit code 0 when every stage agrees, 1 when one is wrong.
    """
    from prill_harness.engines.base import Engine
    from prill_harness.engines.models import resolve_model
    from prill_harness.faults.opening import open_engine
    from prill_harness.numbers import lanes
    from prill_harness.stages import trace
    from prill_harness.stages.bisect import bisect
    from prill_harness.stages.bounds import stage_bounds
    from prill_harness.stages.subject import open_subject
    from prill_harness.tokens.golden import file_type
    from prill_runtime.gguf.file import open_gguf

    if file is not None and (engine or prompt or ids or tokens):
        raise UsageError(
            "a trace file brings its own ids", where="--trace", expected="no --engine and no text beside it"
        )
    if file is None:
        door.judged([engine or "numpy"], against)
    path = resolve_model(model)
    with open_gguf(path) as opened:
        kind = file_type(opened)
    with ExitStack() as stack:
        candidate: Engine | trace.Trace
        if file is None:
            candidate = stack.enter_context(open_engine(engine or "numpy", model))
            arithmetic = candidate.info.arithmetic
        else:
            candidate = trace.load(file)
        oracle = stack.enter_context(open_engine(against, model))
        subject = stack.enter_context(open_subject(path))
        if isinstance(candidate, trace.Trace):
            vocab_size = int(oracle.info.config["vocab_size"])
            wanted = checked_ids(candidate.ids, vocab_size, f"{file}, ids")
        else:
            wanted = ids_for(oracle, model, prompt=prompt, ids=ids, tokens=tokens)
        lane = lanes.lane_for(kind, arithmetic)
        limits = stage_bounds(path, lane, wanted, trace.capture(oracle, wanted).stages)
        report = bisect(candidate, oracle, wanted, subject, limits)
    console.emit(
        {
            "candidate": str(file or engine or "numpy"),
            "against": against,
            "model": model,
            "lane": lane.name,
            "ids": wanted,
            "sentence": report.sentence,
            "observed": report.observed,
            "findings": [
                {
                    "stages": finding.stages,
                    "nmse": _number(finding.nmse),
                    "where": finding.where,
                    "explanation": finding.explanation.clause if finding.explanation else None,
                    "sentence": finding.sentence,
                }
                for finding in report.findings
            ],
            "stages": [
                {
                    "stage": stage.stage,
                    "free": _number(stage.free),
                    "isolated": _number(stage.isolated),
                    "bound": stage.bound,
                    "ok": stage.ok,
                }
                for stage in report.stages
            ],
            "missing": report.missing,
        }
    )
    _show(console, report, whole)
    return 0 if report.ok else 1


def _show(console: Console, report: Report, whole: bool) -> None:
    """Print the table with its chart, one line for each finding, and the sentence."""
    shown, left = _chosen(report.stages, whole)
    rows = [
        (
            "ok" if stage.ok else "wrong",
            stage.stage,
            _figure(stage.free),
            _figure(stage.isolated),
            f"{stage.bound:.1e}",
            chart(stage.isolated / stage.bound),
        )
        for stage in shown
    ]
    head = "isolated over bound: | is the bound, a mark is a factor of " + f"{10 ** (DECADES / HALF):.1f}"
    console.table(("", "stage", "free", "isolated", "bound", head), rows)
    if left:
        console.line(f"{left} right stages are left out; --all shows them")
    for finding in report.findings if len(report.findings) > 1 else ():
        console.line(finding.sentence, status="failed")
    console.line(report.sentence, status="ok" if report.ok else "failed")


def _chosen(stages: Sequence[StageResult], whole: bool) -> tuple[Sequence[StageResult], int]:
    """The stages to show, of many: the wrong ones, each with the stage before it."""
    if whole or len(stages) <= WHOLE:
        return stages, 0
    wrong = {at for at, stage in enumerate(stages) if not stage.ok}
    kept = [stage for at, stage in enumerate(stages) if {at, at + 1} & wrong]
    return kept, len(stages) - len(kept)


def chart(ratio: float) -> str:
    """A bar for the logarithm of figure over bound; the | in the middle is the bound."""
    if math.isnan(ratio):
        return "?"
    decades = math.log10(ratio) if 0 < ratio < math.inf else math.copysign(DECADES, ratio - 1)
    marks = round(min(max(decades, -DECADES), DECADES) * HALF / DECADES)
    below, above = HALF + min(marks, 0), max(marks, 0)
    return f"{'#' * below:{HALF}}|{'#' * above}"


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2e}"


def _number(value: float) -> float | str | None:
    """A float for JSON; NaN, a walk that could not be made, becomes null."""
    return None if math.isnan(value) else str(value) if math.isinf(value) else value
