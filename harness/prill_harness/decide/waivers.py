"""Read waivers.toml, and decide which failures each waiver covers.

```toml
[[waivers]]
id = "W-1"
item = "llama.tokens.exact"                         # the checklist item it speaks of
conditions = { engine = "numpy", device = "cpu" }   # both, exactly; `model` may narrow it further
check = "tokens.teacher_forced"                     # check id; with [parameter], that one alone
signature = "top-1 agreement 0.98"                  # must occur in the sentence of the failure
owner = "ada"
issue = "https://tracker/17"
reason = "the driver's fix ships in March"
created = 2026-01-01
expires = 2026-03-31                                # the last day on which it holds
```
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from prill_harness.records.evidence import Evidence, Status
from prill_harness.records.strict import load_toml
from prill_harness.records.verdict import WaiverResult
from prill_runtime.errors import WaiverError

LOCAL = Path("ci/waivers.toml")
SHORTEST_SIGNATURE = 8  # a shorter text would occur in other failures too


class Conditions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the failure may be; engine and device are mandatory."""

    engine: str
    device: str
    model: str = ""


class Waiver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One failure that somebody answers for until a day."""

    id: str
    item: str
    conditions: Conditions
    check: str
    signature: str
    owner: str
    issue: str
    reason: str
    created: dt.date
    expires: dt.date

    def matches(self, item: str, evidence: Evidence) -> bool:
        """True for a *failed* record of this check, place and signature; never for any other status."""
        return (
            evidence.status is Status.FAILED
            and item == self.item
            and self.speaks_of(evidence)
            and self.signature in evidence.sentence
        )

    def speaks_of(self, evidence: Evidence) -> bool:
        """Whether it is for such a check in such a place, whatever came of it."""
        cell, here = evidence.cell, self.conditions
        return (
            self.check in (evidence.check, evidence.base)
            and (here.engine, here.device) == (cell.engine, cell.device)
            and here.model in ("", cell.model)
        )


class _WaiverFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    waivers: tuple[Waiver, ...] = ()


def load_waivers(path: Path | None = None) -> tuple[Waiver, ...]:
    """Read waivers: `path`, or ci/waivers.toml of the current folder if it exists, or none.

    Raises:
        WaiverError: malformed, a field missing or empty, dates in the wrong order, or a duplicate.
    """
    if path is None and not LOCAL.is_file():
        return ()
    path = path or LOCAL
    waivers = load_toml(path, _WaiverFile, WaiverError).waivers
    validate(waivers, path)
    return waivers


def validate(waivers: Iterable[Waiver], path: Path) -> None:
    """Look at the waivers of a file.

    Raises:
        WaiverError: a field missing or empty, dates in the wrong order, or a duplicate.
    """
    ids: set[str] = set()
    targets: set[tuple[object, ...]] = set()
    for number, waiver in enumerate(waivers):
        where = f"{path} - at `$.waivers[{number}]`"
        _validate(waiver, where)
        target = (waiver.item, waiver.conditions, waiver.check, waiver.signature)
        if waiver.id in ids or target in targets:
            raise WaiverError("duplicate waiver", where=where, got=repr(waiver.id))
        ids.add(waiver.id)
        targets.add(target)


def _validate(waiver: Waiver, where: str) -> None:
    for field in ("id", "item", "check", "signature", "owner", "issue", "reason"):
        if not getattr(waiver, field).strip():
            raise WaiverError(f"{field} is empty", where=where)
    if not waiver.conditions.engine or not waiver.conditions.device:
        raise WaiverError("conditions need engine and device", where=where)
    if len(waiver.signature.strip()) < SHORTEST_SIGNATURE:
        expected = f"at least {SHORTEST_SIGNATURE} characters of the failure's sentence"
        raise WaiverError(
            "signature is too short", where=where, expected=expected, got=repr(waiver.signature)
        )
    if waiver.expires < waiver.created:
        raise WaiverError(
            "expires before it was created", where=where, expected=f">= {waiver.created}", got=waiver.expires
        )


Key = tuple[str, str, str]  # item id, cell id, check id


def apply(
    waivers: Sequence[Waiver],
    failures: Iterable[tuple[str, Evidence]],
    *,
    never: Collection[str],
    as_of: dt.date,
) -> tuple[Mapping[Key, str], tuple[WaiverResult, ...]]:
    """Cover what may be covered.

    Args:
        failures: (item id, evidence) for every record an item counts.
        never: items that no waiver covers.

    Returns:
        The waiver id per covered (item, cell, check), and the state of every waiver in the order given.
    """
    records = list(failures)
    covered: dict[Key, str] = {}
    results = []
    for waiver in waivers:
        hits = [(waiver.item, e.cell.id, e.check) for item, e in records if waiver.matches(item, e)]
        state, sentence = _state(waiver, hits, never, as_of)
        if state == "used":
            for key in hits:
                covered.setdefault(key, waiver.id)
        results.append(
            WaiverResult(
                id=waiver.id,
                item=waiver.item,
                state=state,
                expires=waiver.expires.isoformat(),
                days_left=(waiver.expires - as_of).days,
                owner=waiver.owner,
                reason=waiver.reason,
                sentence=sentence,
            )
        )
    return covered, tuple(results)


def _state(waiver: Waiver, hits: Sequence[Key], never: Collection[str], as_of: dt.date) -> tuple[str, str]:
    if waiver.item in never:
        return "refused", f"waiver {waiver.id} names {waiver.item}, which may never be waived"
    if waiver.expires < as_of:
        return "expired", f"waiver {waiver.id} of {waiver.owner} expired on {waiver.expires}"
    if not hits:
        return "unused", f"waiver {waiver.id} matches no failure; remove it"
    if waiver.created > as_of:
        return "refused", f"waiver {waiver.id} holds only from {waiver.created}"
    return "used", f"waiver {waiver.id} covers {len(hits)} failures until {waiver.expires}: {waiver.reason}"
