"""What a new kill matrix has lost against the recorded one without a reason in forgotten.toml.

If the matrix were simply rewritten, whatever weakened a check would be accepted. So a kill that was seen
once is owed, and so is the amount that a check observed on a clean engine, until `forgotten.toml` gives a
reason:

```toml
[[kills]]                     # this check no longer kills this fault
fault = "rope_pairing"
check = "tokens.late_positions"
reason = "late positions are judged on a longer golden since"

[[observed]]                  # this check compares less in this cell, and no fewer values than that
cell = "fixture:llama-tiny/numpy/file/cpu"
check = "file.weights"
values = 1000                 # 0: the check is gone
reason = "the tied matrix is compared once"
```
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from prill_harness.engines.spec import FAULT
from prill_harness.faults.trial.kills import Kills
from prill_harness.records.evidence import Evidence, Record, Status
from prill_harness.records.strict import load_toml
from prill_runtime.errors import KillsError, UsageError

FILE = "forgotten.toml"
LEAST_SHARE = 0.9  # share of the recorded amount below which a check counts as weakened
FIXTURE = "fixture:"
Amounts = Mapping[str, Mapping[str, int]]


class Kill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kill that is no longer owed."""

    fault: str
    check: str
    reason: str


class Amount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The amount that a check owes in a cell instead of the recorded one."""

    cell: str
    check: str
    values: int
    reason: str


class Forgotten(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All lines of the file."""

    kills: tuple[Kill, ...] = ()
    observed: tuple[Amount, ...] = ()


@dataclass(frozen=True)
class Fall:
    """A check that observed less than is on record."""

    cell: str
    check: str
    seen: int
    recorded: int

    @property
    def sentence(self) -> str:
        return (
            f"{self.check} observed {self.seen} values in {self.cell}, less than {LEAST_SHARE:.0%} of the "
            f"{self.recorded} on record"
        )


def load(path: Path | None = None) -> Forgotten:
    """Read `path`, or the packaged file.

    Raises:
        KillsError: malformed, or a line without a reason.
    """
    path = path or _packaged()
    lines = load_toml(path, Forgotten, KillsError)
    reasons = [each.reason for each in lines.kills] + [each.reason for each in lines.observed]
    if not all(reason.strip() for reason in reasons):
        raise KillsError("a kill or an amount is forgotten without a reason", where=str(path))
    return lines


def _packaged() -> Path:
    spec = importlib.util.find_spec("prill_fixtures")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the packaged fixtures are missing", hint="install prill again")
    return Path(next(iter(spec.submodule_search_locations))) / FILE


def kept(old: Kills, new: Kills, lines: Forgotten) -> Kills:
    """The new matrix with what it still owes by the old one: kills that were not seen again, and amounts."""
    seen = {(name, check) for name, trial in new.faults.items() for check in trial.killed_by}
    lost = old.pairs - seen - {(line.fault, line.check) for line in lines.kills}
    owed: dict[str, list[str]] = defaultdict(list)
    for name, check in sorted(lost):
        owed[name].append(check)
    amounts = {cell: dict(checks) for cell, checks in new.observed.items()}
    for cell, checks in _excused(old.observed, lines).items():
        here = amounts.setdefault(cell, {})
        for check, values in checks.items():  # keep the largest, so that many small losses add up
            if max(values, here.get(check, 0)):
                here[check] = max(values, here.get(check, 0))
    owed_checks = {name: tuple(checks) for name, checks in owed.items()}
    return msgspec.structs.replace(new, owed=owed_checks, observed=amounts)


def amounts(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """Cell id -> check -> values compared, for what passed on clean engines and packaged models."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for record in records:
        packaged = record.cell.model.startswith(FIXTURE) and FAULT not in record.cell.engine
        if packaged and isinstance(record, Evidence) and record.status is Status.PASSED:
            found[record.cell.id][record.check] = record.observed
    return dict(found)


def fallen(recorded: Amounts, seen: Amounts, *, absent: bool = False) -> tuple[Fall, ...]:
    """The checks that observed less than they owe, in the cells that were run.

    Args:
        absent: count a check of such a cell that was not run as having observed nothing.
    """
    found = []
    for cell in sorted(recorded.keys() & seen.keys()):
        for check, owed in sorted(recorded[cell].items()):
            if check not in seen[cell] and not absent:
                continue
            got = seen[cell].get(check, 0)
            if got < LEAST_SHARE * owed:
                found.append(Fall(cell, check, got, owed))
    return tuple(found)


def excused(kills: Kills, lines: Forgotten) -> Kills:
    """The matrix as a gate applies it: without what `lines` forget."""
    gone = {(line.fault, line.check) for line in lines.kills}
    left = {name: tuple(c for c in checks if (name, c) not in gone) for name, checks in kills.owed.items()}
    owed = {name: checks for name, checks in left.items() if checks}
    return msgspec.structs.replace(kills, owed=owed, observed=_excused(kills.observed, lines))


def _excused(recorded: Amounts, lines: Forgotten) -> dict[str, dict[str, int]]:
    found = {cell: dict(checks) for cell, checks in recorded.items()}
    for line in lines.observed:
        if line.check in found.get(line.cell, {}):
            found[line.cell][line.check] = min(found[line.cell][line.check], int(line.values))
    return found
