"""Geometry of the curves of memory readings, for the pages of a probe and of a gate."""

from __future__ import annotations

from dataclasses import dataclass

from prill_harness.leaks.reports.curves import Curve
from prill_harness.leaks.reports.report import amount


@dataclass(frozen=True)
class Frame:
    """The positions of a picture's axes, in pixels."""

    width: int
    height: int
    left: int
    top: int
    right: int
    floor: int


WHOLE = Frame(720, 180, 64, 10, 712, 158)
SMALL = Frame(320, 84, 64, 6, 314, 64)


@dataclass(frozen=True)
class Picture:
    """Readings as a polyline, and the Theil-Sen line and its interval as shapes."""

    curve: Curve
    frame: Frame
    mark: str
    caption: str
    points: str
    line: tuple[float, float, float, float]
    band: str
    borders: tuple[float, ...]
    top: str
    bottom: str
    first: int
    last: int


def drawn(curve: Curve, frame: Frame = WHOLE) -> Picture:
    """Lay a curve out in a frame."""
    at, moved, n = curve.at, curve.values, curve.at[-1]
    middle = sorted(value - curve.slope * call for call, value in zip(at, moved, strict=True))[len(at) // 2]
    ends = [middle + slope * n for slope in (curve.slope, curve.low, curve.high)]
    low, high = min(*moved, middle, *ends), max(*moved, middle, *ends)
    span = (high - low) or 1

    def x(call: float) -> float:
        return round(frame.left + (frame.right - frame.left) * call / n, 1)

    def y(value: float) -> float:
        return round(frame.top + (frame.floor - frame.top) * (high - value) / span, 1)

    slope, least, most = (amount(value, curve.unit) for value in (curve.slope, curve.low, curve.high))
    return Picture(
        curve=curve,
        frame=frame,
        mark=curve.verdict.status,
        caption=f"{slope} per call ({least} to {most}), {curve.windows} of {curve.of} windows grew",
        points=" ".join(f"{x(call)},{y(value)}" for call, value in zip(at, moved, strict=True)),
        line=(x(0), y(middle), x(n), y(ends[0])),
        band=f"{x(0)},{y(middle)} {x(n)},{y(ends[1])} {x(n)},{y(ends[2])}",
        borders=tuple(x(n * k / curve.of) for k in range(1, curve.of)),
        top=_signed(high, curve.unit),
        bottom=_signed(low, curve.unit),
        first=curve.first,
        last=curve.first + n - 1,
    )


def _signed(value: float, unit: str) -> str:
    """A figure for an axis, on which only bytes have room for a unit."""
    return ("+" if value > 0 else "") + (amount(value) if unit == "B" else f"{value:.3g}")
