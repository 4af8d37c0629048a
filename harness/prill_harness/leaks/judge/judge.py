"""Judge a run's readings: what each series shows, and whether the planted leaks show in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from prill_harness.leaks.ledgers.ledgers import LIMIT_SUFFIX, PLANT_BYTES, PLANT_EVERY, Book, Series
from prill_harness.leaks.reports.report import JudgedSeries, LeakVerdict, PathReport, Probe, amount, worst
from prill_harness.leaks.reports.verdict import (
    CLEAR_FACTOR,
    ROUGH_FACTOR,
    WINDOWS,
    Rule,
    SeriesShape,
    State,
    shape,
    state,
)

CACHE_SLACK = 1.5  # a cache's entry costs more than the bytes the engine counts for it
CACHE_KEYS = 1024


@dataclass(frozen=True)
class MeasuredSeries:
    """One series, measured without the plants; whether it shows them; how far it moved in control calls."""

    series: Series
    values: tuple[int, ...]
    shape: SeriesShape
    state: State
    shows_plant: bool
    control: int = 0


class ControlNoise:
    """Control calls, in which the engine did no work, from call `first` on."""

    def __init__(self, book: Book, first: int) -> None:
        self._book, self._first = book, first

    def noise(self, series: Series) -> int:
        """How far a series moved nevertheless, in its unit."""
        seen = shape(self._book.values(series, self._first))
        return max(seen.fall, seen.growth, seen.last)


class Phase:
    """The calls from `first` to the last of the book, judged.

    Args:
        doubled: the calls were doubled already; what is still unclear stays so.
        distinct: every call had a prompt of its own.
        control: control calls of the same run.
    """

    def __init__(
        self,
        book: Book,
        first: int,
        *,
        doubled: bool = False,
        distinct: bool = False,
        control: ControlNoise | None = None,
    ) -> None:
        self._control = control
        self.first, self.last, self.doubled, self.distinct = first, book.calls, doubled, distinct
        self.readings = [self._read(book, s) for s in book.series if s.rule is not None and not s.part]
        parts = [self._read(book, s) for s in book.series if s.part]
        self.growing = [part for part in parts if part.shape.every_window and not part.shape.fall]
        self.limits = {
            s.name.removesuffix(LIMIT_SUFFIX): int(book.rows[book.calls - 1, i])
            for i, s in enumerate(book.series)
            if s.ledger == "engine" and s.name.endswith(LIMIT_SUFFIX)
        }
        self.readings = [replace(r, state=State.CLEAN) if self._full(r) else r for r in self.readings]
        self.counters = {r.series.name: r for r in self.readings if r.series.ledger == "engine"}

    def _read(self, book: Book, series: Series) -> MeasuredSeries:
        values = book.values(series, self.first)
        seen = shape(values)
        found = state(seen, series.rule or Rule.EXACT, doubled=self.doubled)
        noise = self._control.noise(series) if self._control else 0
        if found is State.LEAK and series.rule is not Rule.NEVER and seen.growth < CLEAR_FACTOR * noise:
            found = State.UNCLEAR
        if series.ledger == "process" and series.rule is Rule.RESIDENT and found is not State.CLEAN:
            found = min(found, self._resident(book), key=(State.CLEAN, State.UNCLEAR, State.LEAK).index)
        shows = shape(book.values(series, self.first, planted=True)).visible
        return MeasuredSeries(series, values, seen, found, shows, noise)

    def _full(self, r: MeasuredSeries) -> bool:
        """Whether this counts a cache that grew to the limit that the engine states, and no further."""
        limit = self.limits.get(r.series.name) if r.series.ledger == "engine" else None
        return limit is not None and not r.shape.grown[-1] and r.values[-1] <= limit

    def _resident(self, book: Book) -> State:
        """The state of all resident memory: the unattributed rest also rises when freed pages are kept."""
        series = next(s for s in book.series if s.name == "resident")
        return state(shape(book.values(series, self.first)), Rule.RESIDENT, doubled=self.doubled)

    # --- what decides -----------------------------------------------------------------------------------

    @property
    def planted(self) -> dict[str, bool]:
        """Ledger -> whether its blocks show the planted leaks."""
        return {r.series.ledger: r.shows_plant for r in self.readings if r.series.name == "blocks"}

    @property
    def hidden(self) -> list[MeasuredSeries]:
        """Size classes that grow in every window though the host's totals do not: noise may hide a leak."""
        told = any(r.state is State.LEAK for r in self.readings if r.series.ledger == "host")
        return [] if told else [part for part in self.growing if part.shape.even(ROUGH_FACTOR)]

    @property
    def open(self) -> bool:
        """Whether doubling the calls could tell more."""
        doubtful = (r for r in self.readings if r.state is State.LEAK and (self.distinct or self._cached(r)))
        unclear = any(r.state is State.UNCLEAR for r in self.readings) or any(doubtful)
        blind = not all(self.planted.values())
        return not self.doubled and (unclear or blind or bool(self.hidden))

    @property
    def leaks(self) -> bool:
        """Whether there is a leak that needs no further calls to prove."""
        return any(r.state is State.LEAK and not self._cached(r) for r in self.readings)

    def judged(self) -> list[JudgedSeries]:
        """Every series with its verdict, in the order of the ledgers' columns."""
        found = [self._judged(reading) for reading in self.readings]
        if self.hidden:
            found = [self._in_doubt(j) if (j.ledger, j.series) == ("host", "blocks") else j for j in found]
        return found

    # --- one series -------------------------------------------------------------------------------------

    def _judged(self, r: MeasuredSeries) -> JudgedSeries:
        verdict, sentence = self._verdict(r)
        return JudgedSeries(
            r.series.ledger, r.series.name, r.series.unit, verdict, sentence, r.values,
            r.shape.slope, r.shape.low, r.shape.high, r.shape.growth, r.shape.fall, grown_in(r.shape),
            WINDOWS,
        )  # fmt: skip

    def _verdict(self, r: MeasuredSeries) -> tuple[LeakVerdict, str]:
        name = (
            r.series.ledger if r.series.name in ("blocks", "bytes") else f"{r.series.ledger} {r.series.name}"
        )
        cached = self._cached(r) if r.state is not State.CLEAN else ""
        if cached:
            return LeakVerdict.INCONCLUSIVE, f"{name}: {cached}"
        if r.state is State.LEAK and self.distinct:
            return LeakVerdict.INCONCLUSIVE, (
                f"{name}: {self._rate(r)} with distinct prompts, nothing with a repeated one: a leak, or a "
                "cache whose limit the engine does not tell"
            )
        if r.state is State.LEAK:
            return LeakVerdict.LEAK, f"{name}: {self._rate(r)}{self._blocks(r)}"
        if r.state is State.UNCLEAR:
            return LeakVerdict.INCONCLUSIVE, (
                f"{name}: {self._rate(r)}, but {self._doubt(r)}, after {self.last - self.first + 1} calls"
            )
        if self.planted.get(r.series.ledger) is False:
            return LeakVerdict.INCONCLUSIVE, (
                f"{name}: the planted leak of {PLANT_BYTES} bytes in every {PLANT_EVERY}th call was not "
                f"found: readings fall by up to {amount(r.shape.fall, r.series.unit)}"
            )
        return LeakVerdict.CLEAN, f"{name}: {moved(r.shape.last, r.series.unit, grown_in(r.shape))}"

    def _rate(self, r: MeasuredSeries) -> str:
        s, grown = r.shape, grown_in(r.shape)
        unit = "" if r.series.unit == "B" else f" {r.series.unit}"
        low, high = (amount(v) if not unit else f"{v:.3g}" for v in (s.low, s.high))
        slope = amount(s.slope) if not unit else f"{s.slope:.3g}{unit}"
        return f"{slope} per call ({low} to {high}) since call {self.first}, {grown} of {WINDOWS} windows"

    def _blocks(self, r: MeasuredSeries) -> str:
        """The size class that explains a leak of host memory."""
        if r.series.ledger != "host" or r.series.name == "mapped" or not self.growing:
            return ""
        part = max(self.growing, key=lambda g: g.shape.growth)
        return f"; {part.shape.growth} more {part.series.name}"

    def _doubt(self, r: MeasuredSeries) -> str:
        if r.shape.growth < CLEAR_FACTOR * r.control:
            return f"calls that do no work of the engine moved it by {amount(r.control, r.series.unit)}"
        if r.shape.settling:
            return "growth is coming to an end"
        if not r.shape.even() and r.shape.every_window:
            return "in windows that differ too much for a leak"
        if r.shape.fall:
            return f"readings also fall by up to {amount(r.shape.fall, r.series.unit)}"
        return "it does not grow in every window"

    def _in_doubt(self, judged: JudgedSeries) -> JudgedSeries:
        names = ", ".join(part.series.name for part in self.hidden[:3])
        sentence = f"host: {names} grow in every window, amid noise that hides it in the total"
        return _replaced(judged, LeakVerdict.INCONCLUSIVE, sentence)

    def _cached(self, r: MeasuredSeries) -> str:
        """What the engine says of a cache that explains this growth and may still grow; else empty."""
        for name, limit in self.limits.items():
            counter = self.counters.get(name)
            if counter is None or counter.shape.last <= 0 or counter.values[-1] >= limit:
                continue
            most = CACHE_SLACK * counter.shape.last + CACHE_KEYS
            held = {"B": r.shape.growth}.get(r.series.unit, 0)
            if r.series.ledger in ("engine", "host", "python") and held <= most:
                return (
                    f"the engine's {name} holds {amount(counter.values[-1])} of {amount(limit)} and has not "
                    "filled; give it more calls"
                )
        return ""


def grown_in(seen: SeriesShape) -> int:
    """The number of windows that grew."""
    return sum(g > 0 for g in seen.grown)


def moved(last: int, unit: str, windows: int) -> str:
    """What a series without a leak did, in figures."""
    if not last:
        return "no growth"
    return f"{last:+d} {unit} in all, in {windows} of {WINDOWS} windows"


def quiet(found: Sequence[JudgedSeries]) -> str:
    """Sentence of a path without a leak: no ledger grew, or which did, how far, in how many windows."""
    grew = [(j, j.values[-1] - j.values[0]) for j in found if j.values and j.values[-1] > j.values[0]]
    calls = max((len(j.values) - 1 for j in found), default=0)
    if not grew:
        return f"no ledger grew in {calls} calls"
    told = ", ".join(f"{j.ledger} {j.series} {moved(last, j.unit, j.windows)}" for j, last in grew)
    return f"no ledger kept growing in {calls} calls ({told})"


def with_distinct(found: Sequence[JudgedSeries], distinct: Sequence[JudgedSeries]) -> list[JudgedSeries]:
    """The series of the calls with one prompt, replaced by those with distinct prompts where these are worse.

    A series that moved with distinct prompts without leaking is added under a name of its own.
    """
    later = {(j.ledger, j.series): j for j in distinct}
    worse = {key: j for key, j in later.items() if j.verdict is not LeakVerdict.CLEAN}
    rest = [
        msgspec.structs.replace(j, series=f"{j.series} with distinct prompts")
        for key, j in later.items()
        if key not in worse and j.values[-1] != j.values[0]
    ]
    return [*(worse.get((j.ledger, j.series), j) for j in found), *rest]


def _replaced(judged: JudgedSeries, verdict: LeakVerdict, sentence: str) -> JudgedSeries:
    return msgspec.structs.replace(judged, verdict=verdict, sentence=sentence)


def constant(names: Sequence[str]) -> JudgedSeries:
    """A series for engine counters that never move."""
    told = ", ".join(names) or "none"
    sentence = (
        f"engine: its counters ({told}) are the same with a session open and at work: it tracks nothing"
    )
    return JudgedSeries("engine", "counters", "B", LeakVerdict.INCONCLUSIVE, sentence)


PREFERRED = ("bytes", "mapped", "blocks")


def told(found: Sequence[JudgedSeries]) -> str:
    """One sentence per ledger, its series in bytes before that in blocks."""
    order = {name: i for i, name in enumerate(PREFERRED)}
    best: dict[tuple[str, str], JudgedSeries] = {}
    for j in sorted(found, key=lambda j: order.get(j.series, 0)):
        best.setdefault((j.ledger, "memory" if j.series in ("bytes", "blocks") else j.series), j)
    return "; ".join(j.sentence for j in best.values())


def sites(leaks: Sequence[JudgedSeries], left: Mapping[str, Mapping[str, int]]) -> str:
    """Addition to a leak's sentence: the kinds of call that alone left at least half of the most left."""
    told = []
    for series in dict.fromkeys(f"{j.ledger} {j.series}" for j in leaks if j.series != "bytes"):
        grown = {kind: by[series] for kind, by in left.items() if series in by}
        most = max(grown.values(), default=0)
        told += [f"{kind} ({series} {by:+d})" for kind, by in grown.items() if 2 * by >= most]
    return f"; left by {', '.join(told)}" if told else ""


def concluded(
    probe: Probe, book: Book, found: Sequence[JudgedSeries], planted: bool, missing: dict[str, str]
) -> PathReport:
    """The report of a path; it cannot be clean if a ledger is missing."""
    verdict, first = worst([j.verdict for j in found]), probe.warmup + 1
    telling = [j for j in found if j.verdict is verdict]
    if verdict is LeakVerdict.CLEAN and (missing or not planted):
        verdict = LeakVerdict.INCONCLUSIVE
        why = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        sentence = why or "the planted leak was not found"
    elif verdict is LeakVerdict.CLEAN:
        sentence = (
            f"{quiet(found)} after {probe.warmup} of warm-up; a planted leak of {PLANT_BYTES} bytes in every "
            f"{PLANT_EVERY}th call was found"
        )
    else:
        sentence = told(telling)
    return PathReport(
        probe.path, verdict, sentence, book.calls, first, planted, tuple(found), missing, readings=book.last()
    )
