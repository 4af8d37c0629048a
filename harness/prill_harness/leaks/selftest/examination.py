"""What an examination of the probe found, as data."""

from __future__ import annotations

import msgspec

from prill_harness.leaks.reports.bars import Known
from prill_harness.leaks.selftest.peer import Compared


class Tried(msgspec.Struct, frozen=True):
    """One case after its runs. right: as many came out as they must; wrong: what the first other said."""

    case: Known
    runs: int
    right: int
    alarms: int
    inconclusive: int
    calls: int
    seconds: float
    named: str = ""
    wrong: str = ""


class Bar(msgspec.Struct, frozen=True):
    """One claim: what was asked, what was measured, and whether that holds; None: not measured here."""

    claim: str
    asked: str
    measured: str
    holds: bool | None


class Examination(msgspec.Struct, frozen=True):
    """All of it, as data for the table, the page and --json."""

    quick: bool
    bars: tuple[Bar, ...]
    tried: tuple[Tried, ...]
    psleak: tuple[Compared, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        return all(bar.holds is not False for bar in self.bars)
