"""Whether two results of an engine agree, and whether a negative control differs.

A control shows that a check could have failed: with the mechanism off, the result differs. There are sound
models on which it cannot: constant weights, a vocabulary of one token, norm weights of 0. Whether this is one
of them is not for the engine to say: the float64 oracle runs the very same control, free of faults. Where the
oracle's differs, the engine's has to; where it does not, no engine can be told apart by it on this model, the
sentence says so, and the check stands on what else it compared (docs/adr/0009-sound-models.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.numbers import lanes
from prill_harness.numbers.compare import largest, nmse
from prill_harness.planting import faults
from prill_harness.run.checks import Observer
from prill_harness.tokens.divergence import first_difference
from prill_harness.tokens.golden import Golden
from prill_suites.common import DIFFERENT, rounding
from prill_suites.sequences import context_of, texts_of
from prill_suites.stages_noise import Noise

Pair = tuple[NDArray[Any], NDArray[Any]]
Texts = tuple[Sequence[int], Sequence[int]]
AGREES = 2.0  # the engine's control and the oracle's lie on either side of one threshold, this far at most
ORACLE = "the float64 oracle's own control"


@dataclass
class Trial:
    """One check's engine, on a model of any size, beside the oracle and the golden of that model."""

    observe: Observer
    engine: Engine
    oracle: Embedded
    golden: Golden

    @cached_property
    def context(self) -> int:
        """Positions of the model: a check that wants more shrinks."""
        return context_of(self.golden)

    @cached_property
    def texts(self) -> list[list[int]]:
        """Three texts of the model and more."""
        return texts_of(self.golden)

    def prompt(self, which: int, length: int) -> list[int]:
        """The beginning of a text, that leaves at least half of the context free."""
        return self.texts[which][: min(length, self.context // 2)]

    def room(self, prompt: Sequence[int], tokens: int) -> int:
        """As many tokens as were wanted, or as the context has positions for after the prompt."""
        return min(tokens, self.context - len(prompt))

    @cached_property
    def limit(self) -> float:
        """The NMSE that two ways to the same result may be apart: the arithmetic's, or the noise of a model
        whose logits are small sums of large terms, as its exact lane measured it."""
        return max(rounding(self.engine), lanes.bounds(lanes.EXACT, self.golden.floors["exact"]).nmse)

    @cached_property
    def logprob_bound(self) -> float:
        """How far two ways to one logprob may be apart; of engines that round, what their lane may do."""
        floors, lane = self.golden.floors, lanes.lane_for(self.golden.type, self.engine.info.arithmetic)
        if lane is lanes.EXACT:
            # Or what the exact lane measured on this model: the errors of two ways add in squares.
            return largest(1e-4, math.sqrt(2) * floors["exact"].dlogprob_max)
        return lanes.bounds(lane, floors[lane.name]).dlogprob_max

    def same(self, what: str, ids: Sequence[int], expected: NDArray[Any], got: NDArray[Any]) -> float:
        """Hold two ways to the last logits of `ids` to the engine's rounding; the NMSE."""
        shapes = f"{what}: expected shape {expected.shape}, got {got.shape}"
        self.observe.expect(expected.shape == got.shape, shapes)
        error = distance(expected, got)
        if error > self.limit and self._drowned(ids, expected, got):
            noted = self.observe.detail.get("within_own_noise", {})
            self.observe.note(within_own_noise=noted | {what: error})
            return error
        sentence = f"{what}: NMSE {error:.3g}, at most {self.limit:.0e}"
        self.observe.metric(f"{what} NMSE", error, at_most=self.limit, otherwise=sentence)
        return error

    def _drowned(self, ids: Sequence[int], expected: NDArray[Any], got: NDArray[Any]) -> bool:
        """Whether rounding makes such a difference of these very logits: few numbers, all near zero, say."""
        rows = slice(len(ids) - len(expected), None)
        with faults.only(()):
            truth = np.asarray(self.oracle.logits(ids), np.float64)[rows]
        noise = Noise(self.engine, self.golden, ids, rows.start)
        return noise.explains("logits", truth, truth + (np.asarray(got, np.float64) - expected))

    def control(self, what: str, run: Callable[[Engine], Pair]) -> str:
        """Hold a negative control to being different, or the check proved nothing; a clause with the NMSE.

        Args:
            run: the result, and what it would be with the mechanism off, of the engine it is called with.
        """
        expected, got = run(self.engine)
        if expected.shape != got.shape:
            return "another shape"
        least = max(DIFFERENT, 10 * self.limit)
        error = distance(expected, got)
        if error >= least:
            self.observe.metric(f"control {what} NMSE", error, at_least=least)
            return f"NMSE {error:.2g}"
        with faults.only(()):
            truth = distance(*run(self.oracle))
        self.observe.metric(
            f"control {what}: NMSE of the oracle's own",
            truth,
            at_most=AGREES * least,
            otherwise=f"the control did not differ ({what}): NMSE {error:.3g}, at least {least:.0e}; "
            f"the oracle's is {truth:.3g}",
        )
        return self.cannot_tell(what, expected.size, f"the oracle's own difference: NMSE {truth:.2g}")

    def differs(self, what: str, run: Callable[[Engine], bool]) -> str:
        """As `control`, for a difference that is there or not; a clause."""
        if run(self.engine):
            return "another"
        with faults.only(()):
            told = run(self.oracle)
        self.observe.expect(not told, f"the control did not differ: {what}")
        return self.cannot_tell(what, 1, "the oracle's own difference: none")

    def two_texts(self, what: str, prompts: Sequence[list[int]], write: Callable[[Engine], Texts]) -> str:
        """As `differs`, for two texts: where the oracle's part at a tie, neither is the model's own."""

        def apart(engine: Engine) -> bool:
            one, two = write(engine)
            at = first_difference(one, two)
            if at is None or engine is not self.oracle or at >= min(len(one), len(two)):
                return at is not None
            return not self.tied([*prompts[0], *one[:at]], one[at], two[at])

        return self.differs(what, apart)

    def cannot_tell(self, what: str, seen: int, measured: str, oracle: str = ORACLE) -> str:
        """Record that no engine can be told apart by this control on this model; a clause."""
        self.observe.saw(seen, oracle=oracle)
        self.observe.note(not_applicable=[*self.observe.detail.get("not_applicable", []), what])
        return f"not to be told on this model ({measured})"

    def tied(self, prefix: Sequence[int], a: int, b: int) -> bool:
        """Whether noise may decide between two ids after a prefix: the oracle's logits are that close."""
        row = self.oracle.logits(prefix)[-1]
        return bool(abs(float(row[a]) - float(row[b])) <= self.tau(row))

    def tau(self, logits: NDArray[Any]) -> float:
        """The largest gap between two of these logits that the lane's noise explains."""
        lane = lanes.lane_for(self.golden.type, self.engine.info.arithmetic)
        return lanes.tau(lane, self.golden.floors[lane.name], float(np.abs(logits).max()))


def distance(expected: NDArray[Any], got: NDArray[Any]) -> float:
    """The NMSE; finite against an oracle of zeros, as in a floor, unless a value is not finite."""
    error = nmse(expected, got)
    whole = bool(np.isfinite(expected).all() and np.isfinite(got).all())
    return min(error, lanes.AGAINST_ZEROS) if whole else error
