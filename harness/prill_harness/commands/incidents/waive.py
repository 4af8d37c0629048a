"""`prill waive`: failures that somebody answers for until a day."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

import click

from prill_harness.commands.shared.declare import SPECS
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.decide import entries, waivers
from prill_harness.decide.waivers import LOCAL, Conditions, Waiver
from prill_harness.incidents import writing
from prill_harness.plan.policy import load_policy
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Evidence, checks
from prill_harness.records.verdict import WaiverResult
from prill_runtime.errors import UsageError, WaiverError

UNSEEN = "unseen"
FILE = click.option(
    "--waivers", "file", type=click.Path(path_type=Path, dir_okay=False), default=LOCAL, show_default=True
)
LEDGER = click.option(
    "--ledger", type=click.Path(path_type=Path, dir_okay=False), default=Path("out/ledger.jsonl"),
    show_default=True, help="What the cells saw.",
)  # fmt: skip
AS_OF = click.option(
    "--as-of", type=click.DateTime(["%Y-%m-%d"]), help="Day on which waivers are looked at; default: today."
)
GATE = click.option(
    "--gate", default=None, metavar="NAME", help="Its never-list holds; default: the policy's own."
)


@click.group(name="waive", epilog="\b\nExample:\n  prill waive check")
def command() -> None:
    """Keep the file of waivers: each must still see the failure that it was written for."""


@declare(parent=command, name="check", example="prill waive check --ledger out/ledger.jsonl")
@FILE
@LEDGER
@AS_OF
@GATE
def check(console: Console, file: Path, ledger: Path, as_of: dt.datetime | None, gate: str | None) -> int:
    """Hold each waiver against what the cells saw.

    It is used, unused, expired or refused; or unseen, where no cell has evidence of its check. Exit code 0
    when every waiver is used, 10 when some are unseen and the others used, else 1.
    """
    found = _looked_at(file, ledger, as_of, gate)
    console.emit({"waivers": found})
    rows = [(w.state, w.id, w.item, w.owner, w.expires, w.days_left, w.sentence) for w in found]
    console.table(("state", "waiver", "item", "owner", "expires", "days left", "sentence"), rows)
    states = {w.state for w in found} - {"used"}
    console.line(f"{len(found)} waivers, {sum(w.state == 'used' for w in found)} used",
                 status="failed" if states else "ok")  # fmt: skip
    return 0 if not states else 10 if states == {UNSEEN} else 1


@declare(
    parent=command,
    name="add",
    example="prill waive add --item llama.tokens.exact --check tokens.teacher_forced --engine numpy "
    "--signature 'regressed in the exact lane' --owner ada --issue https://tracker.example/17 "
    "--reason 'the fix ships in March' --expires 2027-03-31",
)
@click.option("--item", required=True, help="Checklist item.")
@click.option("--check", "name", required=True, help="Check id; with [parameter], that one alone.")
@click.option("--engine", required=True, metavar="SPEC", help=f"{SPECS}, exactly as in the cell.")
@click.option("--device", default="cpu", show_default=True, help="Of the cell.")
@click.option("--on", "place", default="", metavar="MODEL", help="The cell's model; default: any.")
@click.option("--signature", required=True, help="Text of the failure's sentence.")
@click.option("--owner", required=True, help="Who answers for it.")
@click.option("--issue", required=True, help="Where it is followed.")
@click.option("--reason", required=True, help="Why it may fail for now.")
@click.option(
    "--expires", type=click.DateTime(["%Y-%m-%d"]), required=True, help="The last day on which it holds."
)
@FILE
@LEDGER
@GATE
def add(
    console: Console, item: str, name: str, engine: str, device: str, place: str, signature: str, owner: str,
    issue: str, reason: str, expires: dt.datetime, file: Path, ledger: Path, gate: str | None,
) -> int:  # fmt: skip
    """Add a waiver for a failure that the ledger holds, under the next free number."""
    known = _load(file) if file.exists() else ()
    numbers = [int(w.id[2:]) for w in known if w.id.startswith("W-") and w.id[2:].isdecimal()]
    waiver = Waiver(
        id=f"W-{max(numbers, default=0) + 1}",
        item=item,
        conditions=Conditions(engine, device, place),
        check=name,
        signature=signature,
        owner=owner,
        issue=issue,
        reason=reason,
        created=_day(None),
        expires=expires.date(),
    )
    waivers.validate([*known, waiver], file)
    entries.examine_waivers([waiver], file, load_policy().folder)
    (state,) = _states([waiver], _evidence(ledger), _day(None), gate)
    if state.state != "used":
        raise WaiverError("waives nothing that was seen", where=str(ledger), got=state.sentence)
    writing.add_table(file, "waivers", waiver)
    console.emit({"id": waiver.id, "file": str(file), "covers": state.sentence})
    console.line(f"written: {waiver.id} in {file}; {state.sentence}")
    return 0


@declare(parent=command, name="prune", example="prill waive prune --ledger out/ledger.jsonl")
@FILE
@LEDGER
@AS_OF
@GATE
def prune(console: Console, file: Path, ledger: Path, as_of: dt.datetime | None, gate: str | None) -> int:
    """Take out the waivers that have expired, and those whose failure the cells no longer show.

    One that no cell has evidence for stays.
    """
    found = [w for w in _looked_at(file, ledger, as_of, gate) if w.state in ("expired", "unused")]
    if found:
        writing.drop_tables(file, "waivers", {w.id for w in found})
    console.emit({"removed": found})
    for waiver in found:
        console.line(f"removed {waiver.id} ({waiver.state}): {waiver.sentence}")
    console.line(f"{len(found)} waivers removed from {file}")
    return 0


def _looked_at(file: Path, ledger: Path, as_of: dt.datetime | None, gate: str | None) -> list[WaiverResult]:
    return _states(_load(file), _evidence(ledger), _day(as_of), gate)


def _load(file: Path) -> tuple[Waiver, ...]:
    found = waivers.load_waivers(file)
    entries.examine_waivers(found, file, load_policy().folder)
    return found


def _evidence(ledger: Path) -> list[Evidence]:
    if not ledger.is_file():
        hint = "run prill gate first, or name one with --ledger"
        raise UsageError("no such ledger", where=str(ledger), hint=hint)
    return list(checks(ledgers.audited(ledger)).values())


def _states(
    known: Sequence[Waiver], seen: Sequence[Evidence], day: dt.date, gate: str | None
) -> list[WaiverResult]:
    """The state of each waiver; unseen where nothing in the ledger is what it speaks of."""
    from msgspec.structs import replace

    failures = [(item, each) for item in {waiver.item for waiver in known} for each in seen]
    never = load_policy().gate(gate).never_waive
    _, found = waivers.apply(known, failures, never=never, as_of=day)
    return [
        replace(result, state=UNSEEN, sentence=f"no cell of the ledger has evidence of {waiver.check} there")
        if result.state == "unused" and not any(waiver.speaks_of(each) for each in seen)
        else result
        for waiver, result in zip(known, found, strict=True)
    ]


def _day(given: dt.datetime | None) -> dt.date:
    return given.date() if given else dt.datetime.now(dt.UTC).date()
