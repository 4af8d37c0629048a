"""The incident log: one TOML file for each under ci/incidents.

```toml
id = "0001"                          # the file's name
severity = "critical"                # critical, high, medium, low
component = "cache"
symptom = "text after a cancelled request repeats"
opened = 2026-01-31
root_cause = ""                      # before it is closed
fix = ""                             # commit that mends it; set by `prill incident verify --fix`
regression = ""                      # what stays: the check, or FILE or FILE::NAME that the command runs
closed = 2026-02-02                  # only `prill incident close` writes it

[reproduction]                       # one of check and command
check = "cache.after_cancel"         # `prill run CHECK`, with engine and model; or
command = "pytest -q tests/test_cancel.py"
engine = "numpy"                     # of a check
model = "fixture:llama-tiny"         # of a check
signature = "is the first wrong"     # in what it prints when it fails, and not when it passes
files = ["tests/test_cancel.py"]     # as the fix has them, where they came with it

[seen]                               # written by `prill incident verify`
```
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from prill_harness.records.catalog import shown
from prill_harness.records.evidence import Status
from prill_harness.records.names import base_of, look_up
from prill_harness.records.strict import load_toml
from prill_harness.records.verdict import IncidentResult, IncidentState, Severity
from prill_harness.run import reproduce
from prill_runtime.errors import IncidentError, UsageError

LOCAL = Path("ci/incidents")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SHORTEST_SIGNATURE = 8  # a shorter text is in other outputs too
DUE = {
    Severity.CRITICAL: "fix immediately",
    Severity.HIGH: "fix this sprint",
    Severity.MEDIUM: "fix if time allows",
    Severity.LOW: "document for later",
}
"""When an incident is due, by its severity."""
MENDED = "failed before, passed after"


class Reproduction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What shows the symptom: exit code 1 with the signature in what it prints; 0 without it, when mended."""

    signature: str
    check: str = ""
    command: str = ""
    engine: str = ""
    model: str = ""
    files: tuple[str, ...] = ()

    @property
    def shell(self) -> str:
        """The shell command that runs it."""
        return self.command or reproduce.shell(self.words)

    @property
    def words(self) -> list[str]:
        """The words behind `prill` that run its check."""
        return reproduce.words("run", self.check, engine=self.engine, model=self.model)

    def digest(self, fix: str) -> str:
        """sha256 (hex) of it and of the fix: what was seen of another one says nothing of this."""
        return hashlib.sha256(msgspec.json.encode((self, fix), order="sorted")).hexdigest()


class Sighting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the reproduction did at one commit; `said` is the line with the signature, or its last one."""

    commit: str
    outcome: Status
    exit_code: int
    said: str = ""


class FixSeen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What it did before the fix and after; `reproduction` is the digest of what was run."""

    at: dt.date
    reproduction: str
    before: Sighting
    after: Sighting


class Incident(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the log, as its file has it."""

    id: str
    severity: Severity
    component: str
    symptom: str
    opened: dt.date
    reproduction: Reproduction
    root_cause: str = ""
    fix: str = ""
    regression: str = ""
    closed: dt.date | None = None
    seen: FixSeen | None = None

    @property
    def lacking(self) -> str:
        """What it cannot be closed without, the first of it; empty if nothing is lacking."""
        again = f"prill incident verify {self.id}"
        if not self.root_cause.strip():
            return "a root cause"
        if not self.fix:
            return f"the commit that mends it: {again} --fix COMMIT"
        if self.seen is None:
            return (
                f"a reproduction that was seen to fail before {self.fix[:12]} and to pass after it: {again}"
            )
        if not self._fresh:
            return f"a look at the reproduction as it is now: {again}"
        if self.story != MENDED:
            return f"a failure before and a pass after the fix; seen was {self.story}"
        if not self.regression.strip():
            return "a regression check"
        return (
            "" if self._kept else "a regression check that is what was seen to fail: the reproduction's own"
        )

    @property
    def _fresh(self) -> bool:
        """Whether what was seen is of the reproduction and the fix that the file has now."""
        return self.seen is not None and self.seen.reproduction == self.reproduction.digest(self.fix)

    @property
    def _kept(self) -> bool:
        own, (file, name) = self.reproduction, self.place
        run = {word.partition("::")[0] for word in own.command.split()}
        return self.regression == own.check or (file in run and name in own.command)

    @property
    def place(self) -> tuple[str, str]:
        """File and name of a regression check that is none of prill's: FILE, or FILE::NAME."""
        file, _, rest = self.regression.partition("::")
        return file, base_of(rest.rpartition("::")[2])

    @property
    def story(self) -> str:
        """What was seen before the fix and after, in words."""
        if self.seen is None:
            return "nothing"
        return f"{self.seen.before.outcome} before, {self.seen.after.outcome} after"

    @property
    def state(self) -> IncidentState:
        if self.closed is not None:
            return IncidentState.CLOSED
        return IncidentState.FIXED if self._fresh and self.story == MENDED else IncidentState.OPEN


def load(folder: Path | None = None) -> tuple[Incident, ...]:
    """Every incident of a folder, the first due first; None: ci/incidents, if it is there.

    Raises:
        IncidentError: no such folder, or a file that is malformed, or closed without what closing needs.
    """
    if folder is None and not LOCAL.is_dir():
        return ()
    folder = folder or LOCAL
    if not folder.is_dir():
        raise IncidentError("no such folder", where=str(folder))
    return tuple(in_order(_load(file) for file in sorted(folder.glob("*.toml"))))


def in_order(incidents: Iterable[Incident]) -> list[Incident]:
    """Open ones first, then those that are fixed, then closed ones; in each the worst first, then by age."""
    states = list(IncidentState)
    return sorted(incidents, key=lambda i: (states.index(i.state), i.severity.rank, i.opened, i.id))


def find(incidents: Iterable[Incident], name: str) -> Incident:
    """The incident of that id.

    Raises:
        UsageError: there is none.
    """
    known = {incident.id: incident for incident in incidents}
    look_up(name, known, "no such incident", hint="`prill incident list` shows them", error=UsageError)
    return known[name]


def _load(file: Path) -> Incident:
    incident = load_toml(file, Incident, IncidentError)
    validate(incident, file)
    return incident


def validate(incident: Incident, file: Path) -> None:
    """Look at one incident by itself.

    Raises:
        IncidentError: something is missing, or it is closed without what closing needs.
    """
    where = str(file)
    if incident.id != file.stem or not NAME.fullmatch(incident.id):
        raise IncidentError(
            "id and file name differ", where=where, expected=repr(file.stem), got=repr(incident.id)
        )
    for field in ("component", "symptom"):
        if not getattr(incident, field).strip():
            raise IncidentError(f"{field} is empty", where=where)
    own = incident.reproduction
    if bool(own.check) == bool(own.command):
        raise IncidentError("a reproduction is a check or a command, one of them", where=where)
    if len(own.signature.strip()) < SHORTEST_SIGNATURE:
        expected = f"at least {SHORTEST_SIGNATURE} characters of what it prints"
        got = repr(own.signature)
        raise IncidentError("signature is too short", where=where, expected=expected, got=got)
    if incident.closed is not None and incident.closed < incident.opened:
        raise IncidentError("closed before it was opened", where=where, got=incident.closed)
    if incident.closed is not None and incident.lacking:
        raise IncidentError(f"closed without {incident.lacking}", where=where)


def examine(incidents: Iterable[Incident], folder: Path, checks: Collection[str]) -> None:
    """Look at what stays of incidents: checks that are declared, and test files that are there.

    Args:
        folder: of the log, two levels below the root of the repository. checks: ids without parameter.

    Raises:
        IncidentError: the check of a reproduction is unknown, or the regression check of a closed one gone.
    """
    for incident in incidents:
        where = str(folder / f"{incident.id}.toml")
        if incident.reproduction.check:
            base = base_of(incident.reproduction.check)
            look_up(base, checks, "names an unknown check", where=where, error=IncidentError)
        elif incident.closed is not None:
            path, name = incident.place
            file = folder.resolve().parents[1] / path
            if not file.is_file() or name not in file.read_text("utf-8", "replace"):
                raise IncidentError("its regression check is gone", where=where, expected=incident.regression)


def results(incidents: Iterable[Incident], folder: Path) -> tuple[IncidentResult, ...]:
    """The log as a verdict carries it."""
    return tuple(
        IncidentResult(
            id=i.id,
            severity=i.severity,
            component=i.component,
            symptom=i.symptom,
            state=i.state,
            opened=i.opened.isoformat(),
            closed=i.closed.isoformat() if i.closed else "",
            regression=i.regression,
            fix=i.fix,
            file=shown(folder / f"{i.id}.toml"),
        )
        for i in incidents
    )
