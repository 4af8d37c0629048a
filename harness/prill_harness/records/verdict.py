"""The verdict: what the gate decided and why, as data that every reporter renders."""

from __future__ import annotations

import hashlib
from enum import StrEnum

import msgspec

from prill_harness.records.evidence import Cell, Status
from prill_harness.records.names import base_of


class ItemStatus(StrEnum):
    """PROVEN needs passed evidence from every planned cell that has the item's checks; WAIVED is also
    unproven, because of a failure that a waiver covers."""

    PROVEN = "proven"
    FAILED = "failed"
    UNPROVEN = "unproven"
    WAIVED = "waived"


class Severity(StrEnum):
    """Four severities, worst first."""

    CRITICAL = "critical"
    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


class AttemptResult(msgspec.Struct, frozen=True):
    """One of several runs of a check in its cell; `attempt` counts from 1."""

    attempt: int
    status: Status
    sentence: str
    duration_s: float


class StandingResult(msgspec.Struct, frozen=True):
    """What the history of gates says of a check in a cell, this run included.

    Attributes:
        runs, failed: attempts on the same digests that ended in passed or failed, and those that failed.
        flaky: both occurred among them.
        failing_since: day of the first of the unbroken row of failed runs; empty if it does not fail now.
        failing_runs: how long the row is.
        recent: the worst of each of the last runs, latest last: (P)assed, (F)ailed, (E)rror, (I)nconclusive.
    """

    runs: int
    failed: int
    flaky: bool
    failing_since: str = ""
    failing_runs: int = 0
    recent: str = ""

    @property
    def flake_rate(self) -> float:
        """The part of the attempts that failed; 0 for a check that always fails, or never."""
        return self.failed / self.runs if self.flaky else 0.0


class CheckResult(msgspec.Struct, frozen=True):
    """One check in one cell, as the gate counts it, waivers applied; file and line of its declaration.

    Attributes:
        lacking: what its engine says that it does not have, and the policy lets it lack; empty elsewhere.
        attempts: all of them where there were several, of which the worst counts.
        standing: None where there is no history, or it has nothing to say.
    """

    check: str
    cell: Cell
    status: Status
    sentence: str
    observed: int
    duration_s: float
    reproduce: str
    waiver: str = ""
    oracle: str = ""
    metrics: tuple[dict[str, float | str | None], ...] = ()
    detail: dict[str, object] = {}
    file: str = ""
    line: int = 0
    lacking: tuple[str, ...] = ()
    attempts: tuple[AttemptResult, ...] = ()
    standing: StandingResult | None = None

    @property
    def base(self) -> str:
        """The check's id without its parameter."""
        return base_of(self.check)


class ItemResult(msgspec.Struct, frozen=True):
    """One checklist item. `cells` maps a cell id to the worst status of the item's checks there.

    `warns`: its failure is shown but does not fail a gate.
    """

    checklist: str
    id: str
    title: str
    why: str
    severity: Severity
    status: ItemStatus
    sentence: str
    checks: tuple[str, ...]
    cells: dict[str, str]
    docs: str = ""
    waivers: tuple[str, ...] = ()
    file: str = ""
    line: int = 0
    warns: bool = False


class CellResult(msgspec.Struct, frozen=True):
    """One planned cell. status: "complete", "missing" (no ledger), "incomplete" (died) or "error".

    `at` is when it started, in seconds since 1970 UTC, and `host` the machine; 0 and empty when it did not.
    """

    cell: Cell
    status: str
    planned: int
    executed: int
    passed: int
    duration_s: float
    sentence: str = ""
    at: float = 0.0
    host: str = ""


class RuleResult(msgspec.Struct, frozen=True):
    """One rule of the policy; `status` is passed, failed or inconclusive."""

    id: str
    status: Status
    sentence: str


class WaiverResult(msgspec.Struct, frozen=True):
    """state: "used", "unused", "expired" or "refused" (not allowed to cover what it matched).

    `standing` is that of the failure it covers, of several the one that has failed for longest.
    """

    id: str
    item: str
    state: str
    expires: str
    days_left: int
    owner: str
    reason: str
    sentence: str = ""
    standing: StandingResult | None = None


class IncidentState(StrEnum):
    """FIXED: its reproduction was seen to fail before the fix and to pass after it."""

    OPEN = "open"
    FIXED = "fixed"
    CLOSED = "closed"


class IncidentResult(msgspec.Struct, frozen=True):
    """One entry of the incident log; `regression` is the check that stays, `opened` and `closed` are days."""

    id: str
    severity: Severity
    component: str
    symptom: str
    state: IncidentState
    opened: str
    closed: str = ""
    regression: str = ""
    fix: str = ""
    file: str = ""


class LeadResult(msgspec.Struct, frozen=True):
    """Where to look first: the root cause of the failures, or, where nobody is to blame, the worst check.

    `cause` is empty if none was found; `stages` are those of `evidence.CauseFound`.
    """

    check: str
    cause: str
    reproduce: str
    following: str
    stages: tuple[dict[str, str | float | bool | None], ...] = ()


class SpeedResult(msgspec.Struct, frozen=True):
    """How long an engine takes for one thing, over its baseline, each over a calibration of its own run.

    Attributes:
        low, high: 95 % interval of the ratio; 1.1 is a tenth slower.
    """

    engine: str
    model: str
    name: str
    ratio: float
    low: float
    high: float


class AssumptionResult(msgspec.Struct, frozen=True):
    """What prill assumed where the files of `models` are silent and engines disagree."""

    key: str
    assumed: str
    why: str
    models: tuple[str, ...]


class ForgottenResult(msgspec.Struct, frozen=True):
    """A kill or an amount of values that a check no longer owes, and the reason that was given."""

    check: str
    what: str
    reason: str


class Verdict(msgspec.Struct, frozen=True):
    """status: passed, failed or inconclusive; exit_code 0, 1 or 10. `sentence` names the rule that broke.

    `flaky` names each "check in cell" that contradicted itself.
    `models` maps the name of each model that ran to the sha256 of its file; `policy` is the file decided by.
    `ledger_sha256` and `digest` are empty until a gate wrote it (see `sealed`).
    """

    gate: str
    status: Status
    exit_code: int
    sentence: str
    as_of: str
    rules: tuple[RuleResult, ...]
    items: tuple[ItemResult, ...]
    cells: tuple[CellResult, ...]
    checks: tuple[CheckResult, ...]
    waivers: tuple[WaiverResult, ...]
    counts: dict[str, int]
    policy_sha256: str
    prill_version: str
    duration_s: float = 0.0
    models: dict[str, str] = {}
    policy: str = ""
    schema: int = 1
    assumptions: tuple[AssumptionResult, ...] = ()
    forgotten: tuple[ForgottenResult, ...] = ()
    lead: LeadResult | None = None
    flaky: tuple[str, ...] = ()
    incidents: tuple[IncidentResult, ...] = ()
    ledger_sha256: str = ""
    digest: str = ""

    def sealed(self, ledger_sha256: str) -> Verdict:
        """This verdict with the digest of the ledger it was computed from, and its own."""
        bare = msgspec.structs.replace(self, ledger_sha256=ledger_sha256, digest="")
        return msgspec.structs.replace(bare, digest=bare.digest_of_all())

    def digest_of_all(self) -> str:
        """sha256 (hex) of everything but `digest`."""
        bare = msgspec.structs.replace(self, digest="")
        return hashlib.sha256(msgspec.json.encode(bare, order="sorted")).hexdigest()
