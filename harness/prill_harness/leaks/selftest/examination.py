"""The results of an examination of the probe, as data."""

from __future__ import annotations

import msgspec

from prill_harness.leaks.reports.bars import Known
from prill_harness.leaks.selftest.peer import Compared


class Tried(msgspec.Struct, frozen=True):
    """One case after its runs. right: how many gave a correct verdict; wrong: what the first other said."""

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
    """One claim: the requirement, the measurement, and whether it holds; None: not measured here."""

    claim: str
    asked: str
    measured: str
    holds: bool | None


class Examination(msgspec.Struct, frozen=True):
    """The whole examination, as data for the table, the page and --json."""

    quick: bool
    bars: tuple[Bar, ...]
    tried: tuple[Tried, ...]
    psleak: tuple[Compared, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        return all(bar.holds is not False for bar in self.bars)
