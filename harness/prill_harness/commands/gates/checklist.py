"""`prill checklist`: which items a ledger proves, fails or leaves unproven."""

from __future__ import annotations

import datetime as dt
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from prill_harness.commands.shared import reporters
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console, write
from prill_harness.decide.checklist import Checklist, Observed, evaluate, load_checklists
from prill_harness.decide.templates import instances, models_of
from prill_harness.engines.features import packaged
from prill_harness.records import evidence
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import EXIT_CODES, Cell, CellStarted, Evidence, Record, Status, badness
from prill_harness.records.files import write_file
from prill_harness.records.names import base_of, look_up
from prill_harness.records.verdict import CheckResult, ItemResult, ItemStatus, Verdict
from prill_harness.version import version
from prill_runtime.errors import UsageError

DEFAULT = Path("out/ledger.jsonl")
ALSO = {"contract": ("adapter",)}
"""What people call a list besides its own name."""


@declare(
    name="checklist",
    example="prill checklist llama\nprill checklist integration --from numpy --ledger out/ledger.jsonl",
)
@click.argument("names", nargs=-1)
@click.option(
    "--format", "form", type=click.Choice(["markdown", "json"]), default="markdown", show_default=True
)
@click.option(
    "--ledger", type=click.Path(path_type=Path), help=f"Evidence; default: {DEFAULT}, if it is there."
)
@click.option("--from", "whose", metavar="ENGINE", help="Only evidence of this engine of the ledger.")
@click.option(
    "--docs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the page of what each item means and which command proves it; looks at no ledger.",
)
def command(
    console: Console,
    names: Sequence[str],
    form: str,
    ledger: Path | None,
    whose: str | None,
    docs: Path | None,
) -> int:
    """Show the integration checklists NAME..., all when none is named, beside the evidence of a ledger.

    NAME is a checklist, or an architecture for the list of its own; `gpt` is every architecture of that
    family, `adapter` what every engine promises, `integration` all that the ledger asked about. Waivers, and
    what a policy lets an engine lack, play no part here. Exit code 0 when every item is proven, 1 when one
    failed, else 10.
    """
    if ledger is not None and not ledger.is_file():
        raise UsageError("no such ledger", where=str(ledger))
    if docs is not None:
        from prill_harness.decide.checklist_page import render

        written = load_checklists(names or None)
        write_file(docs, render(written))
        console.emit({"file": str(docs), "items": sum(len(each.items) for each in written)})
        console.line(f"written: {docs}")
        return 0
    path = ledger or DEFAULT
    records = ledgers.audited(path) if path.is_file() else ()
    if whose is not None:
        have = {record.cell.engine for record in records}
        look_up(whose, have, "no evidence of such an engine", where=str(path))
        records = tuple(record for record in records if record.cell.engine == whose)
    cells = sorted({r.cell for r in records if isinstance(r, CellStarted)})
    today = dt.datetime.now(dt.UTC).date()
    observed = _observed(cells, records)
    checklists = _named(names, observed)
    if not records:
        console.remark(f"no evidence in {path}: every item is unproven; run prill gate first")
    items = evaluate(checklists, cells, observed, today)
    verdict = _verdict([*names, *([f"of {whose}"] if whose else [])], items, records, today)
    machine = Console(json=console.json or form == "json", command=console.command)
    left_out = {each.id: each.left_out for each in checklists if each.left_out}
    machine.emit({"status": verdict.status, "counts": verdict.counts, "ledger": str(path), "items": items,
                  "left_out": left_out})  # fmt: skip
    for architecture, counts in left_out.items():
        told = ", ".join(f"{count} of models {which}" for which, count in sorted(counts.items()))
        console.remark(f"{architecture}: left out what none of its models owes: {told}")
    if not machine.json:
        write(sys.stdout, reporters.render("checklist", verdict))
    return verdict.exit_code


def _named(names: Sequence[str], observed: Observed) -> tuple[Checklist, ...]:
    """The lists of these names, an architecture's among them; one without a model in the ledger is known by
    the packaged ones.

    Raises:
        UsageError: neither a checklist nor an architecture has that name.
    """
    seen = {model.architecture for model in observed.models.values()}
    others = {spec: model for spec, model in packaged().items() if model.architecture not in seen}
    lists = instances(load_checklists(), {**others, **observed.models})
    asked = {base_of(check) for planned in observed.planned.values() for check in planned}
    called = {each.id: {each.id, each.path.stem, *ALSO.get(each.id, ())} for each in lists}
    for each in lists:
        if each.id.startswith("gpt"):
            called[each.id].add("gpt")
        if each.id in seen or (each.path.stem != "model" and any(asked & set(i.checks) for i in each.items)):
            called[each.id].add("integration")
    for name in names:
        look_up(name, {"integration"}.union(*called.values()), "no such checklist")
    return tuple(each for each in lists if not names or called[each.id] & set(names))


def _observed(cells: Sequence[Cell], records: Sequence[Record]) -> Observed:
    """The records indexed for the items; of several records of one check in one cell the worst counts."""
    found: dict[str, dict[str, Evidence]] = {}
    for record in records:
        if isinstance(record, Evidence):
            mine = found.setdefault(record.cell.id, {})
            known = mine.get(record.check, record)
            mine[record.check] = min(known, record, key=lambda e: badness(e.status))
    starts = [r for r in records if isinstance(r, CellStarted)]
    return Observed(
        evidence=found,
        planned={s.cell.id: s.planned for s in starts},
        models=models_of(cells, starts),
    )


def _verdict(
    names: Sequence[str], items: Sequence[ItemResult], records: Sequence[Record], today: dt.date
) -> Verdict:
    """The items as a verdict without a policy, for a reporter to render."""
    counts = Counter(item.status for item in items)
    if counts[ItemStatus.FAILED]:
        status = Status.FAILED
    else:
        status = Status.PASSED if items and counts[ItemStatus.PROVEN] == len(items) else Status.INCONCLUSIVE
    told = ", ".join(f"{counts[kind]} {kind.value}" for kind in ItemStatus if kind is not ItemStatus.WAIVED)
    return Verdict(
        gate=", ".join(names) or "all",
        status=status,
        exit_code=EXIT_CODES[status],
        sentence=f"{len(items)} items: {told}",
        as_of=today.isoformat(),
        rules=(),
        items=tuple(items),
        cells=(),
        checks=tuple(_result(r) for r in evidence.checks(records).values()),
        waivers=(),
        counts={kind.value: counts[kind] for kind in ItemStatus},
        policy_sha256="",
        prill_version=version(),
    )


def _result(record: Evidence) -> CheckResult:
    return CheckResult(
        check=record.check,
        cell=record.cell,
        status=record.status,
        sentence=record.sentence,
        observed=record.observed,
        duration_s=record.duration_s,
        reproduce=record.reproduce,
        oracle=record.oracle,
    )
