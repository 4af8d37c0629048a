"""Frozen records of what a cell saw, and the append-only JSONL ledger that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, Literal

import msgspec

from prill_harness.records.names import base_of

SCHEMA = 3
ENGINE_VERSION = "engine_version"
"""Among an evidence's digests: what an engine of others says that it is."""


class Status(StrEnum):
    """What one check came to; nothing becomes PASSED by default, by fallback or by absence."""

    PASSED = "passed"
    FAILED = "failed"
    ERROR = "error"
    INCONCLUSIVE = "inconclusive"
    WAIVED = "waived"


EXIT_CODES: Mapping[str, int] = {
    "failed": 1,
    "error": 3,
    "timeout": 3,
    "missing": 3,
    "incomplete": 3,
    "inconclusive": 10,
    "waived": 0,
    "passed": 0,
}
"""Exit code of a process by the worst status seen in it; worst first. "timeout", "missing" and "incomplete"
stand in reports for a check or cell that left no evidence, or not all of it."""
_WORST_FIRST = tuple(EXIT_CODES)


def badness(status: str) -> int:
    """A status's index in EXIT_CODES: 0 for the worst; -1 for an unknown word, which is worse still."""
    return _WORST_FIRST.index(status) if status in EXIT_CODES else -1


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """One model x engine x suite x device, run in one fresh process."""

    model: str
    engine: str
    suite: str
    device: str = "cpu"

    @property
    def id(self) -> str:
        return f"{self.model}/{self.engine}/{self.suite}/{self.device}"


class Metric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured value and the bound it was held to; None stands for NaN or infinity."""

    name: str
    value: float | None
    bound: float | None = None
    relation: Literal["<=", ">=", "=="] = "<="

    @property
    def holds(self) -> bool:
        """Whether the value is finite and within its bound; a metric without a bound only informs."""
        if self.value is None or not math.isfinite(self.value):
            return False
        if self.bound is None:
            return True
        if self.relation == "==":
            return self.value == self.bound
        return self.value <= self.bound if self.relation == "<=" else self.value >= self.bound


class CellStarted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="cell"):
    """First record of a cell: the checks it is going to report.

    Attributes:
        assumptions: (key, assumed, why) of what the model's file leaves open.
        attempt: 1 for the cell itself; a higher one runs again what failed in the one before.
        host: name of the machine it runs on.
    """

    cell: Cell
    planned: tuple[str, ...]
    at: float
    versions: dict[str, str] = {}
    schema: int = SCHEMA
    assumptions: tuple[tuple[str, str, str], ...] = ()
    attempt: int = 1
    host: str = ""


class CheckStarted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="start"):
    """Written before a check runs, so that a hard kill leaves the name of the check in flight."""

    cell: Cell
    check: str
    at: float
    attempt: int = 1


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="check"):
    """What one check observed.

    Attributes:
        check: id, `suite.name` or `suite.name[parameter]`.
        content: sha256 of the check's code and of the code that judges for it.
        observed: how many values were actually compared.
        sentence: what was found, in one sentence.
        oracle: what the values were compared with; empty when nothing was.
        kills: planted faults this check is known to find.
        reproduce: the shell command that runs this check alone.
        detail: what a report needs to show the finding; builtins only.
        lacks: what the check needs of an engine and this one says that it does not have, which is all that
            kept the check from being made.
    """

    check: str
    content: str
    cell: Cell
    status: Status
    observed: int
    sentence: str
    oracle: str
    kills: tuple[str, ...]
    reproduce: str
    metrics: tuple[Metric, ...] = ()
    seed: int | None = None
    digests: dict[str, str] = {}
    detail: dict[str, Any] = {}
    duration_s: float = 0.0
    at: float = 0.0
    schema: int = SCHEMA
    lacks: tuple[str, ...] = ()
    attempt: int = 1

    def __post_init__(self) -> None:
        if self.status is Status.WAIVED:
            raise ValueError(f"{self.check} cannot be waived by its own record: a gate waives, by a waiver")
        if self.status is Status.PASSED and not (self.observed > 0 and self.oracle and self.kills):
            raise ValueError(
                f"{self.check} cannot pass: observed {self.observed} values, oracle {self.oracle!r}, "
                f"kills {self.kills!r}; a pass needs all three"
            )
        if self.lacks and (self.status is not Status.INCONCLUSIVE or self.observed):
            raise ValueError(f"{self.check} cannot have lacked {', '.join(self.lacks)} and be {self.status}")

    @property
    def base(self) -> str:
        """The check's id without its parameter."""
        return base_of(self.check)


class CellEnded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="end"):
    """Last record of a cell; a cell without it did not finish."""

    cell: Cell
    exit_code: int
    duration_s: float
    at: float
    attempt: int = 1


class CauseFound(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="cause"):
    """What explains a red gate's failures; the gate looks for it after its cells, and appends it.

    Attributes:
        cell, check: whose failure it explains. sentence: what is wrong.
        reproduce, following: shell commands that show it again, and more of it.
        stages: of the walk that named the first wrong one, if one did: "stage", "isolated" (the NMSE of the
            stage given the oracle's input; None if it is not finite), "bound", "ok".
    """

    cell: Cell
    check: str
    sentence: str
    reproduce: str
    following: str
    stages: tuple[dict[str, str | float | bool | None], ...] = ()


Record = CellStarted | CheckStarted | Evidence | CellEnded | CauseFound


def checks(records: Iterable[Record]) -> dict[tuple[str, str], Evidence]:
    """The evidence of every (cell id, check id) that counts: of its last run, the worst attempt."""
    found: dict[tuple[str, str], Evidence] = {}
    for record in records:
        if isinstance(record, Evidence):
            known = found.get(key := (record.cell.id, record.check))
            if known is None or record.attempt == 1 or badness(record.status) < badness(known.status):
                found[key] = record
    return found


def builtin(value: object) -> Any:
    """Reduce a value to JSON builtins, NumPy scalars and arrays included; text loses lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):  # np.float64 is one, which the encoder refuses
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return {str(builtin(k)): builtin(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return builtin(value.tolist())
    if isinstance(value, Iterable):
        return [builtin(v) for v in value]
    return builtin(str(value))
