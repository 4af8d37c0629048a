"""`prill gate`: run a gate's cells, decide, and write verdict and reports."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from prill_harness.commands.shared import door, goldens, past, reporters, runs
from prill_harness.commands.shared.declare import (
    SPECS,
    Part,
    cell_timeout_option,
    second_option,
    vram_option,
)
from prill_harness.commands.shared.declare import command as declare
from prill_harness.commands.shared.merged import merged
from prill_harness.commands.shared.outfolder import taken
from prill_harness.console import Console
from prill_harness.incidents.history import FILE
from prill_harness.plan.estimate import Ahead, recorded_in
from prill_harness.plan.plan import Plan, build, shard
from prill_harness.plan.provenance import file_digest
from prill_harness.records import catalog
from prill_harness.records.evidence import CauseFound, Evidence, Record, Status
from prill_harness.records.files import write_file
from prill_harness.records.ledger import Ledger
from prill_harness.records.verdict import ItemStatus, Verdict
from prill_harness.run.executor import run
from prill_runtime.errors import UsageError

LONGEST = 120  # characters of a sentence in a table; reports have all of it
SHOWN = 20  # items and checks shown on a terminal


def _day(ctx: click.Context, param: click.Parameter, value: dt.datetime | None) -> dt.date:
    return value.date() if value else dt.datetime.now(dt.UTC).date()


@declare(
    name="gate",
    example="prill gate -j 2\nprill gate foundation --shard 1/4 --out out/1\n"
    "prill gate --engine numpy --model ./my-llama.gguf",
    judges=True,
)
@click.argument("name", required=False)
@click.option(
    "--engine", "engines", multiple=True, metavar="SPEC", help=f"{SPECS}; replaces the plan's; repeatable."
)
@vram_option
@second_option
@cell_timeout_option
@click.option("--model", "models", multiple=True, metavar="SPEC", help="Replaces the plan's; repeatable.")
@click.option("-j", "--jobs", type=click.IntRange(min=0), default=0, help="Cells at a time; 0: one per core.")
@click.option("--shard", "part", type=Part(), help="Run part I of N only; the verdict comes with --from.")
@click.option("--from", "ledgers", multiple=True, type=click.Path(path_type=Path), metavar="LEDGER",
              help="Run nothing: decide on the ledgers of all shards; repeatable.")  # fmt: skip
@click.option("--speed", "speeds", multiple=True, type=click.Path(path_type=Path), metavar="RESULT",
              help="What `prill bench --baseline FILE -o RESULT` wrote; repeatable.")  # fmt: skip
@click.option("--rerun", type=click.IntRange(0, 9), default=0, metavar="N",
              help="Run again what failed, at most N times; every attempt is kept.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Keep cells that finished with the same code and model.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("out"), show_default=True
)
@click.option(
    "--as-of", type=click.DateTime(["%Y-%m-%d"]), callback=_day, help="Day for waivers; default today."
)
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(path_type=Path),
    help="Default: ci/gates.toml, or the packaged one.",
)
@click.option("--waivers", "waivers_file", type=click.Path(path_type=Path), help="Default: ci/waivers.toml.")
@click.option("--incidents", "log_folder", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Incident log; default: ci/incidents.")  # fmt: skip
@click.option("--history", "history_place", type=click.Path(path_type=Path), metavar="FILE|FOLDER",
              help="Earlier gates, to which this one is added; default: history.jsonl in --out.")  # fmt: skip
@click.option("--kills", "kills_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Kill matrix, from `prill faults matrix -o`; default: the packaged one.")  # fmt: skip
def command(
    console: Console,
    name: str | None,
    engines: Sequence[str],
    models: Sequence[str],
    jobs: int,
    cell_timeout: float | None,
    part: tuple[int, int] | None,
    ledgers: Sequence[Path],
    speeds: Sequence[Path],
    rerun: int,
    resume: bool,
    out: Path,
    as_of: dt.date,
    policy_file: Path | None,
    waivers_file: Path | None,
    log_folder: Path | None,
    history_place: Path | None,
    kills_file: Path | None,
) -> int:
    """Run the cells of gate NAME and decide whether the merge may go through.

    Writes ledger.jsonl, verdict.json, junit.xml, report.md, report.html, report.sarif, ctrf.json and
    in-toto.json into --out, and a line of history.
    """
    from prill_harness.decide import entries
    from prill_harness.decide.gate import decide
    from prill_harness.decide.own import checklists as asked_of
    from prill_harness.decide.own import claimed
    from prill_harness.decide.waivers import LOCAL, load_waivers
    from prill_harness.faults.catalogue import catalogue
    from prill_harness.faults.opening import foreign
    from prill_harness.faults.trial import connector
    from prill_harness.faults.trial import forgotten as oblivion
    from prill_harness.faults.trial import kills as matrix
    from prill_harness.measure import baseline
    from prill_harness.plan.beside import check_ids
    from prill_harness.plan.policy import load_policy

    if ledgers and (part or resume or rerun):
        raise UsageError("--from runs nothing, so it goes without --shard, --resume and --rerun")
    measured = baseline.results(speeds)
    policy = load_policy(policy_file)
    gate = policy.gate(name)
    entries.examine(policy)
    checklists = asked_of(gate.checklists, policy.folder)
    waivers = load_waivers(waivers_file)
    entries.examine_waivers(waivers, waivers_file or LOCAL, policy.folder)
    incidents = past.incidents(log_folder, check_ids(policy.folder))
    kills, forgotten = matrix.fresh(matrix.load(kills_file), catalogue()), oblivion.load()
    if policy.folder:
        claimed(policy.folder)
        own = matrix.fresh(matrix.load(None, policy.folder), catalogue())
        kills = matrix.with_own(kills, own, catalog.check_ids(policy.folder))
    plan = build(gate, engines, models, folder=policy.folder)
    door.examine((), () if models else plan.given.values(), opened=not ledgers)
    door.together(() if ledgers else ((cell.engine, plan.spec(cell)) for cell in plan.cells))
    click.get_current_context().with_resource(taken(out))
    forget(out)
    how = How(jobs, resume, cell_timeout, rerun)
    if part:
        return _shard(console, shard(plan, *part), out, how)
    records = merged(ledgers, out / "ledger.jsonl") if ledgers else _run(console, plan, out, how)
    others = {cell.engine for cell in plan.cells if foreign(cell.engine)}
    seen = {spec: connector.load(spec) for spec in others}
    counted = connector.counted(records, seen)
    earlier = past.Past(console, history_place or out / FILE, gate.name, counted, incidents)
    deciding = partial(
        decide,
        policy,
        plan,
        checklists=checklists,
        kills=kills,
        waivers=waivers,
        as_of=as_of,
        sources=check_ids(policy.folder),
        forgotten=forgotten,
        standings=earlier.standings,
        incidents=incidents,
        speeds=measured,
        documents=_there(gate.documents),
    )
    verdict = deciding(counted)
    if found := cause(verdict, records, plan.given):
        with Ledger(out / "ledger.jsonl") as ledger:
            ledger.append(found)
        verdict = deciding(connector.counted((*records, found), seen))
    verdict = verdict.sealed(file_digest(out / "ledger.jsonl"))
    written = [out / "ledger.jsonl", *write_reports(verdict, out)]
    earlier.keep()
    console.emit(verdict)
    show(console, verdict, written)
    lead(console, verdict)
    return verdict.exit_code


def _there(documents: Sequence[str]) -> tuple[str, ...]:
    """Those that are files with something in them."""
    return tuple(name for name in documents if Path(name).is_file() and Path(name).read_bytes().strip())


def forget(out: Path) -> None:
    """Remove the verdict and reports of an earlier run, which must not pass for this one's."""
    for file in ("verdict.json", *reporters.files().values()):
        (out / file).unlink(missing_ok=True)


def write_reports(verdict: Verdict, out: Path) -> list[Path]:
    """Write every report of a gate, the verdict last: if it is there, so are the reports."""
    place = reporters.beside(out)
    texts = {file: reporters.render(name, verdict, place) for name, file in reporters.files().items()}
    texts["verdict.json"] = msgspec.json.format(msgspec.json.encode(verdict), indent=1).decode() + "\n"
    for file, text in texts.items():
        write_file(out / file, text)
    return [out / file for file in texts]


def show(console: Console, verdict: Verdict, written: Sequence[Path]) -> None:
    """Print unproven items, broken rules, waivers that cover nothing, the verdict and the files written."""
    open_items = sorted(
        (i for i in verdict.items if i.status is not ItemStatus.PROVEN),
        key=lambda i: (
            i.status is ItemStatus.WAIVED,
            i.status is not ItemStatus.FAILED,
            i.severity.rank,
            i.id,
        ),
    )
    if open_items:
        # The cell is told where there are several: the sentence has room for what is wrong then.
        only = f" in {verdict.cells[0].cell.id}" if len(verdict.cells) == 1 else "\0"
        said = [_cut(i.sentence.replace(only, "")) for i in open_items[:SHOWN]]
        rows = [(i.status.value, i.severity.value, i.id, s) for i, s in zip(open_items, said, strict=False)]
        console.table(("status", "severity", "item", "evidence"), rows, status=0)
        if len(open_items) > SHOWN:
            console.line(f"... and {len(open_items) - SHOWN} more, all of them in the reports")
        console.line()
    for flaky in verdict.flaky:
        console.line(f"flaky: {flaky}", status="inconclusive")
    for rule in verdict.rules:
        if rule.status is not Status.PASSED:
            console.line(f"rule {rule.id} {rule.status.value}: {rule.sentence}", status=rule.status.value)
    for check in verdict.checks:
        if check.lacking:
            console.line(f"not asked: {check.check} in {check.cell.id}: {check.sentence}")
    for assumed in verdict.assumptions:
        console.line(f"assumed {assumed.key}: {assumed.assumed}, for {assumed.why}{_of(assumed.models)}")
    if verdict.forgotten:
        count = f"{len(verdict.forgotten)} kills or amounts that checks no longer owe"
        console.line(f"{count}: the reports give the reason of each")
    say = console.remark if console.json else console.line
    for waiver in verdict.waivers:
        if waiver.state != "used":
            say(f"{waiver.state} waiver: {waiver.sentence}", status="inconclusive")
    console.line(verdict.sentence, status=verdict.status.value)
    say(f"written: {', '.join(map(str, written))}")


def cause(verdict: Verdict, records: Sequence[Record], specs: Mapping[str, str]) -> CauseFound | None:
    """Look for the cause of a verdict's failures, where none is on record and something failed."""
    from prill_harness.decide.rootcause import find

    failed = {(c.cell, c.check, c.sentence) for c in verdict.checks if c.status is Status.FAILED}
    if not failed or any(isinstance(r, CauseFound) for r in records):
        return None
    return find(
        [r for r in records if isinstance(r, Evidence) and (r.cell, r.check, r.sentence) in failed], specs
    )


def lead(console: Console, verdict: Verdict) -> None:
    """Print the last lines: the root cause, how to reproduce it, and where to look next."""
    say = console.remark if console.json else console.line
    if (first := verdict.lead) is None:
        return
    if first.cause:
        say(f"root cause: {first.cause}", status="failed")
    say(f"reproduce {first.check}: {first.reproduce}")
    say(f"next: {first.following}")


def _of(models: Sequence[str]) -> str:
    """The models of an assumption, unless there is only one model."""
    return f" ({', '.join(models[:3])}{', ...' if len(models) > 3 else ''})"


def _cut(sentence: str) -> str:
    return sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST]}..."


class How(NamedTuple):
    """How a gate runs its cells, as `executor.run` takes it."""

    jobs: int
    resume: bool
    timeout_s: float | None
    rerun: int


def _run(console: Console, plan: Plan, out: Path, how: How) -> tuple[Record, ...]:
    goldens.prepare(plan.cells, plan.given, plan.folder, quiet=console.quiet)
    jobs = how.jobs or os.cpu_count() or 2
    ahead = Ahead(plan.cells, recorded_in(out), jobs)
    with console.progress(len(plan.cells), f"gate {plan.gate}") as bar:
        bar.left = ahead.left
        bar.step(f"gate {plan.gate}: {len(plan.cells)} cells, {jobs} at a time", advance=0)
        try:
            return run(plan, out, progress=runs.teller(bar, ahead), **how._asdict())
        except KeyboardInterrupt:
            console.remark(f"{out}/cells holds what was seen; repeat with --resume to go on from there")
            raise


def _shard(console: Console, plan: Plan, out: Path, how: How) -> int:
    """Run one part: its ledger is the result, and the exit code covers only its own checks."""
    records = _run(console, plan, out, how)
    outcome = runs.outcome(plan, records)
    console.emit({"ledger": str(out / "ledger.jsonl"), "cells": [c.id for c in plan.cells], **outcome.counts})
    told = ", ".join(f"{count} {status}" for status, count in outcome.counts.items())
    console.line(f"{len(plan.cells)} cells: {told or 'no check'}; no verdict: gather all ledgers with --from")
    console.line(f"written: {out / 'ledger.jsonl'}")
    return outcome.exit_code
