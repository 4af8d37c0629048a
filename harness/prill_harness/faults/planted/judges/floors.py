"""Faults of the noise floors that a golden holds: an engine may be off by more than rounding leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec

from prill_harness.numbers.lanes import Figures
from prill_harness.planting.faults import Patch, fault

GOLDEN = "prill_harness.tokens.golden:golden_for"
BLAMES = ("oracle", "harness")
POWER = 100.0


def _louder(concerned: Callable[[str], bool]) -> Patch:
    """Goldens whose floors, of the lanes concerned, an engine measured that was ten times as far off."""

    def loud(floor: Figures) -> Figures:
        powers = {name: POWER * getattr(floor, name) for name in ("nmse", "kl_mean", "kl_p99", "kl_max")}
        return replace(floor, **powers, dlogprob_max=POWER**0.5 * floor.dlogprob_max)

    def wrap(golden_for: Any) -> Any:
        def loudest(spec: Any, *rest: Any) -> Any:
            sound = golden_for(spec, *rest)
            floors = {name: loud(floor) if concerned(name) else floor for name, floor in sound.floors.items()}
            return msgspec.structs.replace(sound, floors=floors)

        return loudest

    return Patch(GOLDEN, wrap)


@fault(area="harness", blames=BLAMES)
def floor_of_wrong_float32() -> Iterator[Patch]:
    """The exact lane's noise floor was measured by a float32 pass that sums in too few bits."""
    yield _louder(lambda lane: lane.startswith("exact"))


@fault(area="harness", blames=BLAMES)
def floor_of_wrong_rounding() -> Iterator[Patch]:
    """The type lane's noise floor was measured by a pass that rounds activations too coarsely."""
    yield _louder(lambda lane: not lane.startswith("exact"))
