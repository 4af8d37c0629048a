"""Geometry of the stages that a bisect walked over: one bar each, as high as its error beside its bound."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prill_harness.numbers.compare import largest, smallest
from prill_reports.text import figure

HEIGHT, TOP, FLOOR = 150, 22, 126
LEAST, MOST = -4, 12  # powers of ten beside the bound that the axis shows
WIDTH = 900
APART = 30  # pixels between two labels


@dataclass(frozen=True)
class StageBar:
    """One stage: a rectangle, and the sentence that a pointer or a reader of screens is given."""

    x: float
    y: float
    width: float
    height: float
    ok: bool
    title: str


@dataclass(frozen=True)
class StageWalk:
    """All stages in the order of the forward pass; `ticks` are (x, text) where a layer begins."""

    bars: tuple[StageBar, ...]
    limit: float
    ticks: tuple[tuple[float, str], ...]
    first: tuple[float, str] | None
    wrong: int


def drawn(stages: Sequence[Mapping[str, object]]) -> StageWalk | None:
    """Lay out the stages of a lead; None if it has none."""
    if not stages:
        return None
    step = WIDTH / len(stages)
    bars = tuple(_bar(number * step, step, stage) for number, stage in enumerate(stages))
    layers = [_layer(stage) for stage in stages]
    begins = [0, *(n for n, (a, b) in enumerate(itertools.pairwise(layers), 1) if a != b)]
    ticks: list[tuple[float, str]] = []
    for at in begins:
        x = round(at * step, 1)
        if layers[at].isdecimal() and (not ticks or x - ticks[-1][0] >= APART):
            ticks.append((x, layers[at]))
    first = next((n for n, bar in enumerate(bars) if not bar.ok), None)
    named = None if first is None else (bars[first].x, str(stages[first].get("stage", "")))
    return StageWalk(bars, _y(0), tuple(ticks), named, sum(not bar.ok for bar in bars))


def _bar(x: float, step: float, stage: Mapping[str, object]) -> StageBar:
    error, bound = (_number(stage.get(name)) for name in ("isolated", "bound"))
    power = math.log10(error / bound) if error > 0 and bound > 0 else -math.inf if error == 0 else math.inf
    y = _y(power)
    title = f"{stage.get('stage')}: NMSE {figure(error)}, at most {figure(bound)}"
    return StageBar(round(x, 1), y, round(0.8 * step, 2), round(FLOOR - y, 1), bool(stage.get("ok")), title)


def _y(power: float) -> float:
    shown = smallest(largest(power, LEAST + 0.3), MOST)  # even an exact stage has a bar
    share = (shown - LEAST) / (MOST - LEAST)
    return round(FLOOR - share * (FLOOR - TOP), 1)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.inf


def _layer(stage: Mapping[str, object]) -> str:
    """`3` of `blk.3.q_rope`; a stage outside the layers is its own."""
    name = str(stage.get("stage", ""))
    found = re.match(r"blk\.(\d+)\.", name)
    return found[1] if found else name
