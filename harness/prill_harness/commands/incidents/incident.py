"""`prill incident`: the log of what went wrong: what shows it, and that it was seen to be mended."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from prill_harness.commands.shared.declare import SPECS
from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.incidents import log, verify, writing
from prill_harness.incidents.log import DUE, FixSeen, Incident, Reproduction
from prill_harness.plan.beside import check_ids
from prill_harness.plan.policy import load_policy
from prill_harness.records.evidence import Status
from prill_harness.records.verdict import IncidentState, Severity
from prill_runtime.errors import IncidentError, UsageError

FOLDER = click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=log.LOCAL, show_default=True,
    help="Where the log lies, two folders below the root of the repository.",
)  # fmt: skip


@click.group(name="incident", epilog="\b\nExample:\n  prill incident list")
def command() -> None:
    """Keep the log of incidents: what went wrong, what shows it, and that it was seen to be mended."""


@declare(
    parent=command,
    name="new",
    example="prill incident new --severity critical --component cache --symptom 'text repeats' "
    "--check tokens.greedy --signature 'is the first wrong'",
)
@click.option("--severity", type=click.Choice([s.value for s in Severity]), required=True)
@click.option("--component", required=True, help="The part that is wrong.")
@click.option("--symptom", required=True, help="What somebody saw, in one sentence.")
@click.option("--signature", required=True, help="What the reproduction prints if, and only if, it fails.")
@click.option("--check", default="", help="Reproduction: this check.")
@click.option("--engine", default="numpy", show_default=True, metavar="SPEC", help=f"Of the check: {SPECS}.")
@click.option(
    "--model", default="fixture:llama-tiny", show_default=True, metavar="SPEC", help="Of the check."
)
@click.option(
    "--command", "shell", default="", help="Reproduction: this shell command, from the repository's root."
)
@click.option(
    "--file", "files", multiple=True, help="Of the reproduction, and as the fix has it; repeatable."
)
@FOLDER
def new(
    console: Console, severity: str, component: str, symptom: str, signature: str, check: str, engine: str,
    model: str, shell: str, files: Sequence[str], folder: Path,
) -> int:  # fmt: skip
    """Begin the file of an incident, under the next free number."""
    place = (engine, model) if check else ("", "")
    numbers = [int(file.stem) for file in folder.glob("*.toml") if file.stem.isdecimal()]
    incident = Incident(
        id=f"{max(numbers, default=0) + 1:04}",
        severity=Severity(severity),
        component=component,
        symptom=symptom,
        opened=_today(),
        reproduction=Reproduction(signature, check, shell, *place, tuple(files)),
    )
    file = folder / f"{incident.id}.toml"
    log.validate(incident, file)
    log.examine([incident], folder, check_ids(load_policy().folder))
    writing.create(file, incident)
    console.emit({"id": incident.id, "file": str(file), "lacking": incident.lacking})
    console.line(f"written: {file}; due: {DUE[incident.severity]}")
    console.line(f"reproduce: {incident.reproduction.shell}")
    console.line(f"next: mend it, then prill incident verify {incident.id} --fix COMMIT")
    return 0


@declare(parent=command, name="list", example="prill incident list --open")
@click.option("--open", "unsolved", is_flag=True, help="Without those that are closed.")
@FOLDER
def listing(console: Console, unsolved: bool, folder: Path) -> int:
    """List incidents: open ones first, the worst first, and when each is due."""
    found = [i for i in _log(folder) if not unsolved or i.state is not IncidentState.CLOSED]
    console.emit({"incidents": [_described(incident) for incident in found]})
    rows = [(i.state.value, i.severity.value, i.id, i.component, i.opened, _due(i), i.symptom) for i in found]
    console.table(("state", "severity", "id", "component", "opened", "due", "symptom"), rows)
    counts = [f"{sum(i.state is state for i in found)} {state.value}" for state in IncidentState]
    console.line(", ".join(counts))
    return 0


@declare(parent=command, name="show", example="prill incident show 0001")
@click.argument("name", metavar="ID")
@FOLDER
def show(console: Console, name: str, folder: Path) -> int:
    """Show the incident ID, what was seen of it, and what it lacks to be closed."""
    incident = log.find(_log(folder), name)
    console.emit(_described(incident))
    console.line(f"{incident.id} ({incident.severity}, {incident.component}): {incident.symptom}")
    console.line(f"{incident.state}, opened on {incident.opened}; due: {_due(incident)}")
    console.line(f"root cause: {incident.root_cause or 'not known'}")
    console.line(f"reproduce: {incident.reproduction.shell}")
    _tell(console, incident.seen)
    console.line(f"regression check: {incident.regression or 'none'}")
    if incident.state is not IncidentState.CLOSED:
        console.line(f"lacks: {incident.lacking or 'nothing; close it'}")
    return 0


@declare(parent=command, name="verify", example="prill incident verify 0001 --fix HEAD")
@click.argument("name", metavar="ID")
@click.option(
    "--fix", default="", metavar="COMMIT", help="The commit that mends it; default: the one on record."
)
@click.option("--timeout", type=click.FloatRange(min=1), default=verify.TIMEOUT_S, show_default=True,
              metavar="SECONDS", help="Most seconds for the reproduction at one commit.")  # fmt: skip
@FOLDER
def verifying(console: Console, name: str, fix: str, timeout: float, folder: Path) -> int:
    """Run the reproduction of ID at the commit before the fix and at the fix, and record what it did.

    Each commit has a work tree of its own in a temporary folder. Exit code 0 when it failed before and passes
    after, 10 when one of them shows neither, else 1.
    """
    incident = log.find(_log(folder), name)
    if incident.state is IncidentState.CLOSED:
        raise UsageError("the incident is closed", where=str(folder / f"{name}.toml"))
    if not (fix or incident.fix):
        raise UsageError("no commit is known to mend it", where=f"incident {name}", hint="name it with --fix")
    root = verify.repository(folder)
    before, after = verify.commits(root, fix or incident.fix)
    own = incident.reproduction
    seen = FixSeen(
        _today(),
        own.digest(after),
        verify.look(root, before, own, fix=after, timeout_s=timeout),
        verify.look(root, after, own, timeout_s=timeout),
    )
    writing.change(folder / f"{name}.toml", fix=after, seen=seen)
    now = msgspec.structs.replace(incident, fix=after, seen=seen)
    console.emit(_described(now))
    _tell(console, seen)
    right = now.state is IncidentState.FIXED
    told = f"incident {name}: {now.story}"
    console.line(told if right else f"{told}; failed before and passed after is asked for",
                 status="ok" if right else "failed")  # fmt: skip
    outcomes = {seen.before.outcome, seen.after.outcome}
    return 0 if right else 10 if Status.INCONCLUSIVE in outcomes else 1


@declare(
    parent=command,
    name="close",
    example="prill incident close 0001 --root-cause 'a cancelled slot kept its length' "
    "--regression tokens.greedy",
)
@click.argument("name", metavar="ID")
@click.option("--root-cause", default="", help="Why it happened; default: what the file says.")
@click.option("--regression", default="", metavar="CHECK|FILE[::NAME]",
              help="What stays of the reproduction: its check or test file.")  # fmt: skip
@FOLDER
def close(console: Console, name: str, root_cause: str, regression: str, folder: Path) -> int:
    """Close the incident ID, whose reproduction was seen to fail before the fix and to pass after it.

    It needs a root cause, a regression check, and the fix in the commit that is checked out.
    """
    incident, file = log.find(_log(folder), name), folder / f"{name}.toml"
    given = {
        "root_cause": root_cause or incident.root_cause,
        "regression": regression or incident.regression,
        "closed": _today(),
    }
    if incident.closed is not None:
        raise UsageError("it is closed already", where=str(file), got=incident.closed)
    now = msgspec.structs.replace(incident, **given)
    if now.lacking:
        raise IncidentError("cannot be closed", where=str(file), expected=now.lacking)
    log.examine([now], folder, check_ids(load_policy().folder))
    if not verify.holds(verify.repository(folder), now.fix):
        raise IncidentError(
            "cannot be closed", where=str(file), expected=f"{now.fix[:12]} in the present commit"
        )
    writing.change(file, **given)
    console.emit(_described(now))
    console.line(f"incident {name} is closed: {now.story}; {now.regression} stays", status="ok")
    return 0


def _log(folder: Path) -> Sequence[Incident]:
    return log.load(folder) if folder.is_dir() or folder != log.LOCAL else ()


def _today() -> dt.date:
    return dt.datetime.now(dt.UTC).date()


def _due(incident: Incident) -> str:
    return "" if incident.state is IncidentState.CLOSED else DUE[incident.severity]


def _tell(console: Console, seen: FixSeen | None) -> None:
    """What the reproduction did at each commit."""
    for when, at in (("before", seen.before), ("after", seen.after)) if seen else ():
        console.line(
            f"{when} {at.commit[:12]}: {at.outcome}, exit code {at.exit_code}: {at.said}", status=at.outcome
        )


def _described(incident: Incident) -> dict[str, object]:
    """An incident as JSON has it."""
    told = {"state": incident.state, "due": _due(incident), "lacking": incident.lacking}
    return {**msgspec.to_builtins(incident), **told, "reproduce": incident.reproduction.shell}
