"""The curves of a path's readings: which to show, and how evidence stores them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, TypeAlias

import msgspec

from prill_harness.leaks.reports.report import JudgedSeries, LeakVerdict, PathReport

DETAIL_KEY = "curves"  # of a check's detail
ALWAYS_SHOWN = ("host", "bytes")  # shown flat too
MOST_SERIES = 8  # curves of one path that a ledger keeps, the worst first
MOST_POINTS = 41  # readings of one curve that a ledger keeps: every one of a probe of 50 calls
LONGEST_SENTENCE = 2000  # characters of a sentence
SLOPE_DIGITS = 6  # of a slope

Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=LONGEST_SENTENCE)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Windows: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=100)]
Reading: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
Rate: TypeAlias = Annotated[float, msgspec.Meta(ge=-(2.0**62), le=2.0**62)]


class Curve(msgspec.Struct, frozen=True):
    """One series over the calls of a path.

    Attributes:
        unit: "B", "blocks", "threads" or "descriptors".
        slope, low, high: per call, Theil-Sen of all readings with its 95 % interval.
        windows, of: how many of how many windows grew. first: the first measured call.
        at: calls since warm-up, ascending from 0; values: readings there, less the reading at 0.

    Raises:
        ValueError: fewer than two points, or not one reading for each, in order of the calls.
    """

    series: Text
    unit: Text
    verdict: LeakVerdict
    sentence: Text
    slope: Rate
    low: Rate
    high: Rate
    windows: Windows
    of: Windows
    first: Count
    at: Annotated[tuple[Count, ...], msgspec.Meta(min_length=2, max_length=10_000)]
    values: Annotated[tuple[Reading, ...], msgspec.Meta(min_length=2, max_length=10_000)]

    def __post_init__(self) -> None:
        if len(self.at) != len(self.values) or any(a >= b for a, b in pairwise(self.at)):
            raise ValueError("a curve needs one reading for each of its calls, which grow")


def curves(path: PathReport) -> list[Curve]:
    """Series that moved or are not clean, worst first, and the host's bytes in any case."""
    order = list(LeakVerdict)
    shown = [
        j
        for j in path.seen
        if len(j.values) > 1
        and (
            j.verdict is not LeakVerdict.CLEAN
            or len(set(j.values)) > 1
            or (j.ledger, j.series) == ALWAYS_SHOWN
        )
    ]
    return [_curve(j, path.first) for j in sorted(shown, key=lambda j: order.index(j.verdict))]


def _curve(j: JudgedSeries, first: int) -> Curve:
    slope, low, high = (float(f"{value:.{SLOPE_DIGITS}g}") for value in (j.slope, j.low, j.high))
    values = tuple(value - j.values[0] for value in j.values)
    return Curve(
        f"{j.ledger} {j.series}", j.unit, j.verdict, j.sentence[:LONGEST_SENTENCE], slope, low, high,
        j.windows, j.of, first, tuple(range(len(values))), values,
    )  # fmt: skip


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """The curve with at most `most` points, equally spaced, first and last included."""
    last = len(curve.at) - 1
    if last < most:
        return curve
    chosen = [round(last * n / (most - 1)) for n in range(most)]
    at, values = (tuple(row[n] for n in chosen) for row in (curve.at, curve.values))
    return msgspec.structs.replace(curve, at=at, values=values)


def noted(path: PathReport) -> dict[str, Any]:
    """What a check's evidence stores of a path: builtins of bounded size."""
    kept = [thinned(curve) for curve in curves(path)[:MOST_SERIES]]
    walk = {} if path.walk is None else {"failed allocations": msgspec.to_builtins(path.walk)}
    rows = [msgspec.to_builtins(curve) for curve in kept]
    return {"path": path.path, "calls": path.calls, **walk, DETAIL_KEY: rows}


def recalled(detail: Mapping[str, Any]) -> dict[str, list[Curve]]:
    """Path, or name of the part -> the curves stored in a detail; malformed ones are left out."""
    parts = {str(detail.get("path", "")): detail}
    parts |= {name: value for name, value in detail.items() if isinstance(value, Mapping)}
    return {name: found for name, part in parts.items() if (found := list(read(part.get(DETAIL_KEY))))}


def read(rows: object) -> Iterator[Curve]:
    """The valid curves among rows of a ledger."""
    for row in rows if isinstance(rows, Sequence) and not isinstance(rows, str | bytes) else ():
        try:
            curve = msgspec.convert(row, Curve)
        except (msgspec.ValidationError, OverflowError):
            continue
        if all(map(math.isfinite, (curve.slope, curve.low, curve.high))):
            yield curve
