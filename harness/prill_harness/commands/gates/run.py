"""`prill run`: run suites or checks in fresh cells, and print what each check saw."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from prill_harness.commands.shared import door, goldens, runs
from prill_harness.commands.shared.declare import SPECS, cell_timeout_option, second_option, vram_option
from prill_harness.commands.shared.declare import command as declare
from prill_harness.commands.shared.outfolder import taken
from prill_harness.console import Console
from prill_harness.plan import beside, provenance
from prill_harness.plan.estimate import Ahead, estimate, recorded, recorded_in
from prill_harness.plan.given import named
from prill_harness.plan.plan import Plan, openers
from prill_harness.plan.policy import LOCAL_POLICY, load_policy
from prill_harness.records import catalog
from prill_harness.records.evidence import Cell, Status
from prill_harness.records.names import base_of, look_up, suite_of
from prill_harness.run.executor import run as run_plan
from prill_runtime.errors import NothingSelected


def complete(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """The suites and checks whose names begin with `begun`."""
    names = sorted({*catalog.suites(), *catalog.check_ids()})
    return [CompletionItem(name) for name in names if name.startswith(begun)]


@declare(
    name="run",
    example="prill run tokens\nprill run --engine numpy --model fixture:gpt2-tiny tokens.greedy cache",
    judges=True,
)
@click.argument("names", nargs=-1, metavar="[SUITE|CHECK]...", shell_complete=complete)
@click.option(
    "--engine", "engines", multiple=True, default=("numpy",), show_default=True, help=f"{SPECS}; repeatable."
)
@vram_option
@second_option
@cell_timeout_option
@click.option("--model", "models", multiple=True, metavar="SPEC", help="Default: those of the default gate.")
@click.option("--device", default="cpu", show_default=True, help="Device of the cells.")
@click.option("-j", "--jobs", type=click.IntRange(min=0), default=0, help="Cells at a time; 0: one per core.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("out/run"), show_default=True
)
def command(
    console: Console,
    names: Sequence[str],
    engines: Sequence[str],
    models: Sequence[str],
    device: str,
    jobs: int,
    cell_timeout: float | None,
    out: Path,
) -> int:
    """Run suites or single checks, all when none is named, and print what each check saw.

    The exit code is that of the worst check: 1 failed, 3 error, 10 inconclusive.
    """
    folder = _own()
    suites, checks = selected(names, folder)
    called = named(models or _default_models())
    cells = tuple(
        Cell(model, engine, suite, device)
        for model, engine, suite in product(called.values(), engines, suites)
    )
    plan = Plan("run", tuple(dict.fromkeys(cells)), checks, folder, openers(called))
    if not names:
        console.remark(_foresight(plan, len(called), engines, suites, jobs, out))
    door.together((cell.engine, plan.spec(cell)) for cell in plan.cells)
    click.get_current_context().with_resource(taken(out))
    goldens.prepare(plan.cells, plan.given, plan.folder, quiet=console.quiet)
    ahead = None if checks else Ahead(plan.cells, recorded_in(out), jobs or os.cpu_count() or 2)
    with console.progress(len(plan.cells), "cells") as bar:
        outcome = runs.outcome(
            plan, run_plan(plan, out, jobs, progress=runs.teller(bar, ahead), timeout_s=cell_timeout)
        )
    if not outcome.evidence and not outcome.lost:
        raise NothingSelected("no check was carried out", got=" ".join(names) or "all suites")
    console.emit(
        {
            "evidence": outcome.evidence,
            "lost": outcome.lost,
            "counts": outcome.counts,
            "exit_code": outcome.exit_code,
        }
    )
    rows = [(e.status.value, e.check, e.cell.model, e.cell.engine, e.sentence) for e in outcome.evidence]
    rows += [("missing", check or "-", cell, "", "left no evidence") for cell, check in outcome.lost]
    console.table(("status", "check", "model", "engine", "sentence"), rows, status=0)
    for record in outcome.evidence:
        if record.status in (Status.FAILED, Status.ERROR):
            console.line(f"reproduce {record.check}: {record.reproduce}")
    for spec, name in called.items():
        for key, assumed, why in provenance.assumed(spec):
            console.remark(f"{name}: assumed {key}: {assumed}, for {why}")
    told = ", ".join(f"{count} {status}" for status, count in outcome.counts.items())
    console.line(
        f"{told}; evidence in {out / 'ledger.jsonl'}", status="ok" if not outcome.exit_code else "failed"
    )
    return outcome.exit_code


def _foresight(
    plan: Plan, models: int, engines: Sequence[str], suites: Sequence[str], jobs: int, out: Path
) -> str:
    """What a run of everything is about to do, and how long it will take."""
    jobs = jobs or os.cpu_count() or 2
    times = recorded((out / "ledger.jsonl", Path("out/ledger.jsonl")))
    return (
        f"{len(plan.cells)} cells: {models} models x {len(suites)} suites with {', '.join(engines)}, "
        f"{jobs} at a time, into {out}; {estimate(plan.cells, times, jobs)}; "
        "name suites or checks to run fewer"
    )


def _own() -> Path | None:
    """The folder of the user's own suites, if the policy of the current folder names one."""
    return load_policy().folder if LOCAL_POLICY.is_file() else None


def selected(names: Sequence[str], folder: Path | None = None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(suites, check ids) that the names mean; next to single checks, a suite stands for all of its checks.

    Raises:
        NothingSelected: a name is neither a suite nor a check.
    """
    suites, declared = beside.suites(folder), beside.check_ids(folder)
    for name in names:
        look_up(base_of(name), [*suites, *declared], "no such suite or check", error=NothingSelected)
    chosen = dict.fromkeys(suite_of(name) for name in names or suites)
    if all(name in suites for name in names):
        return tuple(chosen), ()
    checks = [name for name in names if name not in suites]
    checks += [check for check in declared if suite_of(check) in names]
    return tuple(chosen), tuple(dict.fromkeys(checks))


def _default_models() -> tuple[str, ...]:
    models = tuple(dict.fromkeys(model for entry in load_policy().gate().plan for model in entry.models))
    door.examine((), models)
    return models
