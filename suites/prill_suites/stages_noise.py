"""An engine, a golden and ids come in; which stages the lane's own noise puts out of bound goes out.

The bound of every stage is that of the logits: the noise that was measured there times the lane's ratio. A
single stage may be noisier: a norm of equal values, a sum whose terms cancel, a model whose last norm is 0.
Such a stage is held to the noise measured in it, times the same ratio, in the very sums of the NMSE: no
quotient is taken, so where the oracle and the lane have zeros only zeros are right. The rounding is done to a
float64 pass, never by the arithmetic under judgement: what an engine's own code leaves could excuse that
code's mistakes.

Rounding that is drawn at random is drawn several times, and its mean power counts. One draw of a single
number (a row of equal logits) is under a tenth of the usual size once in twelve times; and errors that are
drawn anew for each of many equal rows cancel in their mean, where arithmetic rounds them all alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Engine
from prill_harness.numbers.compare import squares
from prill_harness.numbers.lanes import lane_for
from prill_harness.stages import trace
from prill_harness.stages.routing import Chosen, LanePasses
from prill_harness.stages.trace import Array
from prill_harness.tokens.golden import Golden

Rows = slice | NDArray[np.intp]
DRAWS = 16  # every second one alike in all rows, from the first on
# An error that is so many times beyond the bound by the first draw alone is none: of a single number one draw
# in 1,000 is so small. By n that are alike the n-th root of it is as rare.
BEYOND = 1e6


class Noise:
    """Float64 passes over `ids`, rounded as the lane rounds: stages from row `first`, when asked for.

    Args:
        chosen: stage -> the experts that they go through: what another choice moves is no rounding.
    """

    def __init__(
        self,
        engine: Engine,
        golden: Golden,
        ids: Sequence[int],
        first: int,
        chosen: Mapping[str, Chosen] | None = None,
    ) -> None:
        self._ids, self._first, self._chosen = list(ids), first, chosen
        self._lane = lane_for(golden.type, engine.info.arithmetic)
        self._passes = LanePasses(engine.info.model, self._lane)
        self._made: dict[int, Mapping[str, Array]] = {}
        # Any other lane rounds to a type, as its engines do.
        self.draws = DRAWS if self._lane.activations == "f32" else 1

    def explains(self, stage: str, expected: Array, got: Array, part: Rows = slice(None)) -> bool:
        """Whether a stage (row, …) is what the lane's noise makes of it.

        Args:
            part: which of the rows they are, counted from the first asked for.
        """
        error, _ = squares(expected, got)
        noise = 0.0
        for draw in range(self.draws):
            own = self.stages(draw)[stage][part] if stage in self.stages(draw) else None
            if own is None or own.shape != expected.shape:
                return False
            noise += squares(expected, own)[0]
            if error <= self._lane.ratio * noise / self.draws:
                return bool(np.isfinite(noise))
            mean, alike = noise / (draw + 1), draw // 2 + 1
            if error > self._lane.ratio * mean * BEYOND ** (1 / alike):
                return False
        return False

    def stages(self, draw: int = 0) -> Mapping[str, Array]:
        """Every stage of a draw by name, rows from the first one asked for."""
        if draw not in self._made:
            found = self._passes.stages(self._ids, draw, self._chosen)
            self._made[draw] = {name: trace.rows(array)[self._first :] for name, array in found.items()}
        return self._made[draw]
