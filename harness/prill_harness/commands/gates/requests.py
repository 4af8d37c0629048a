"""`prill requests`: what an engine elsewhere is to be asked, so that `recorded:FILE` can be judged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from prill_harness.commands.gates.run import complete, selected
from prill_harness.commands.shared import goldens, runs
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.plan.given import named
from prill_harness.plan.plan import Plan, openers
from prill_harness.records.evidence import Cell
from prill_harness.run.executor import run as run_plan
from prill_runtime.errors import EngineError, NothingSelected


@declare(
    name="requests",
    example="prill requests --model fixture:llama-tiny -o requests.jsonl\n"
    "prill requests --model model.gguf tokens contract",
)
@click.argument("names", nargs=-1, metavar="[SUITE|CHECK]...", shell_complete=complete)
@click.option("--model", required=True, help="Path, or fixture:NAME[:TYPE].")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("requests.jsonl"),
    show_default=True,
)  # fmt: skip
@click.option("-j", "--jobs", type=click.IntRange(min=0), default=0, help="Cells at a time; 0: one per core.")
def command(console: Console, names: Sequence[str], model: str, output: Path, jobs: int) -> int:
    """Write the requests that suites or checks make, for an engine that cannot be reached from here.

    They are seen by asking prill's own engine; default: the suite tokens. An engine's answers to them are
    judged by `--engine recorded:FILE`.
    """
    from prill_harness.engines.models import resolve_model
    from prill_harness.engines.others.asked import greeting
    from prill_runtime.gguf.file import open_gguf

    suites, checks = selected(names or ("tokens",))
    called = named((model,))
    with open_gguf(resolve_model(model)) as file:
        first = greeting(file.sha256)
    lines = {first["digest"]: first}
    with TemporaryDirectory(prefix="prill-requests-") as folder:
        asked = {suite: Path(folder) / f"{suite}.jsonl" for suite in suites}
        cells = tuple(Cell(called[model], f"asked:{path}", suite, "cpu") for suite, path in asked.items())
        plan = Plan("requests", cells, checks, given=openers(called))
        goldens.prepare(plan.cells, plan.given, plan.folder)
        with console.progress(len(cells), "cells") as bar:
            seen = runs.outcome(plan, run_plan(plan, Path(folder), jobs, progress=runs.teller(bar)))
        if seen.lost:
            raise EngineError("prill's own engine did not answer everything", got=", ".join(seen.lost[0]))
        for path in asked.values():
            lines |= {line["digest"]: line for line in _read(path)}
    if len(lines) < 2:
        raise NothingSelected("no request was made that could be recorded", got=" ".join(names))
    with output.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines.values())
    count = Counter(str(line["call"]) for line in lines.values())
    console.emit({"file": str(output), "requests": count})
    what = ", ".join(f"{number} {call}" for call, number in count.items())
    console.line(f"{len(lines)} requests in {output}: {what}")
    return 0


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that a cell wrote; none if its checks asked nothing."""
    if file.exists():
        with file.open(encoding="utf-8") as stream:
            yield from map(json.loads, stream)
