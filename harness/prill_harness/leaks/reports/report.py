"""A probe's report as frozen data: per series, per path and as a whole, with sentences."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from prill_harness.records.evidence import EXIT_CODES, Status


class LeakVerdict(StrEnum):
    """LEAK and BROKEN (the process under test died) fail; INCONCLUSIVE claims nothing."""

    LEAK = "leak"
    BROKEN = "broken"
    INCONCLUSIVE = "inconclusive"
    CLEAN = "clean"

    @property
    def status(self) -> Status:
        """The status of a check with this verdict."""
        others = {LeakVerdict.CLEAN: Status.PASSED, LeakVerdict.INCONCLUSIVE: Status.INCONCLUSIVE}
        return others.get(self, Status.FAILED)


def worst(verdicts: Sequence[LeakVerdict]) -> LeakVerdict:
    """The most severe; inconclusive if there are none."""
    order = list(LeakVerdict)
    return min(verdicts, key=order.index) if verdicts else LeakVerdict.INCONCLUSIVE


class JudgedSeries(msgspec.Struct, frozen=True):
    """One series of one ledger.

    Attributes:
        ledger: "host", "python", "engine", "process", "device", "pinned" or "managed".
        series: what was counted ("blocks", "bytes", "mapped", a counter's name).
        unit: "B", "blocks", "threads" or "descriptors".
        values: the reading after warm-up, then one after each measured call, without the plants.
        slope, low, high: per call, Theil-Sen with its 95 % interval. windows: how many of them grew.
    """

    ledger: str
    series: str
    unit: str
    verdict: LeakVerdict
    sentence: str
    values: tuple[int, ...] = ()
    slope: float = 0.0
    low: float = 0.0
    high: float = 0.0
    growth: int = 0
    noise: int = 0
    windows: int = 0
    of: int = 0


class Site(msgspec.Struct, frozen=True):
    """Where leaked memory was allocated, innermost frame first, and how much one call leaves there."""

    function: str
    stack: tuple[str, ...]
    bytes_per_call: float
    blocks_per_call: float


class LoadWalk(msgspec.Struct, frozen=True):
    """Allocations of a load that were made to fail, one load for each.

    Attributes:
        failed, of: how many of the allocations of at least `least` bytes.
        swallowed: failures that the load recovered from.
        smaller: allocations of less than `least` bytes, which were not failed.
        spared: larger ones that libraries make for themselves, not failed either.
        filled: failures that left something at first, but nothing more when repeated.
    """

    failed: int
    of: int
    swallowed: int = 0
    least: int = 0
    smaller: int = 0
    spared: int = 0
    filled: int = 0
    seconds: float = 0.0

    @property
    def sentence(self) -> str:
        kind = f" of {self.least} bytes and more" if self.least else ""
        spread = ", spread over it," if self.failed < self.of else ""
        rest = f"; its {self.smaller} smaller allocations were not failed" if self.smaller else ""
        rest += f"; nor were {self.spared} that libraries made for themselves" if self.spared else ""
        kept = f"; {self.filled} filled a store that has an end" if self.filled else ""
        return (
            f"{self.failed} of the {self.of} allocations{kind} of a load{spread} failed in turn: nothing "
            f"remained and the next load worked ({self.swallowed} of them were made good{kept}){rest}"
        )


class PathReport(msgspec.Struct, frozen=True):
    """One path (success, error, ...) in one fresh process.

    Attributes:
        seen: the judged series; `planted` says whether the planted control leak was found.
        calls: made in all, warm-up included; first: the first measured one.
        missing: ledgers that could not be attached, and why.
        walk: for the path `load`: which of its allocations were failed.
        kinds: for the path `requests`: how many calls of each kind were measured.
    """

    path: str
    verdict: LeakVerdict
    sentence: str
    calls: int = 0
    first: int = 0
    planted: bool = False
    seen: tuple[JudgedSeries, ...] = ()
    missing: dict[str, str] = {}
    sites: tuple[Site, ...] = ()
    stacks: str = ""
    duration_s: float = 0.0
    readings: dict[str, int] = {}
    walk: LoadWalk | None = None
    kinds: dict[str, int] = {}

    @property
    def leaks(self) -> tuple[JudgedSeries, ...]:
        return tuple(j for j in self.seen if j.verdict is LeakVerdict.LEAK)


class LeakReport(msgspec.Struct, frozen=True):
    """Every path that was probed on one engine and model."""

    engine: str
    model: str
    verdict: LeakVerdict
    sentence: str
    paths: tuple[PathReport, ...]
    reproduce: str = ""
    duration_s: float = 0.0
    schema: int = 1

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict.status]

    def path(self, name: str) -> PathReport:
        return next(p for p in self.paths if p.path == name)


class Probe(msgspec.Struct, frozen=True):
    """What to probe.

    Attributes:
        calls: of each path, warm-up included; a multiple of five windows is measured.
        timeout_s: for each path; beyond it the verdict is inconclusive.
        walk_s: time limit of the walk over a load's allocations, if Python makes them.
        vary: if a repeated prompt leaves nothing, try distinct ones. stacks: find out who allocated a leak.
        device: read the ledgers of the GPU, and only those.
    """

    engine: str
    model: str
    path: str = "success"
    calls: int = 50
    timeout_s: float = 300.0
    walk_s: float = 12.0
    max_tokens: int = 8
    vary: bool = True
    stacks: bool = True
    device: bool = False

    @property
    def measured(self) -> int:
        """Calls after warm-up: four fifths of all, in equal windows."""
        return max(1, self.calls * 4 // 25) * 5

    @property
    def warmup(self) -> int:
        return max(1, self.calls - self.measured)


def amount(value: float, unit: str = "B") -> str:
    """`48 B`, `1.5 KiB`, `3 blocks`."""
    if unit != "B":
        return f"{value:.3g} {unit}"
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:.4g} {name}"
    return f"{value:.3g} B"
