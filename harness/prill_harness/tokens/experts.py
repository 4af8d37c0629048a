"""The oracle's logits to hold an engine's to, where rounding may have exchanged experts.

The floor that an engine is held to has no exchanged expert in it. Where its logits are beyond that, it is
asked what its routers chose, and the oracle goes through the same experts wherever noise decides
(`stages.routing`). An engine that shows no stages is held to that floor as far as the first position at which
noise may decide; the others, which may have other experts or attend to such, to the floor measured with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.numbers import compare, lanes
from prill_harness.numbers.lanes import Figures, Lane, LogitTally
from prill_harness.stages import routing
from prill_harness.stages import trace as traces
from prill_harness.tokens.golden_pack import Golden
from prill_harness.tokens.sides import Rows
from prill_runtime.errors import Inconclusive


@dataclass
class FollowedExperts:
    """What the experts of an engine change, sequence by sequence.

    Attributes:
        routes: of the sequences whose choices the oracle followed.
        wrong: choices that noise does not explain.
        texts, positions: of all sequences.
        unseen: those of an engine that shows no stages from the first on at which noise may decide.
        steady: the figures of those before.
        rank: the worst that the lane's own pass gives the oracle's best id where choices were followed: ids
            nearly equal there are others than where the golden's floor was measured.
    """

    engine: Engine
    oracle: Embedded
    lane: Lane
    golden: Golden
    routes: list[routing.Routes] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    texts: int = 0
    positions: int = 0
    unseen: int = 0
    steady: LogitTally = field(default_factory=LogitTally)
    rank: int = 1

    @property
    def floor(self) -> Figures:
        """The floor that all sequences so far can be held to."""
        if self.unseen:
            return self.golden.floors[self.lane.name]
        floor = self.golden.floor_of(self.lane.name)
        return replace(floor, worst_rank=max(floor.worst_rank, self.rank))

    @cached_property
    def _lane_passes(self) -> routing.LanePasses:
        return routing.LanePasses(self.oracle.info.model, self.lane)

    def expected(self, ids: Sequence[int], own: Rows, got: Rows) -> Rows:
        """The oracle's logits of `ids` that an engine's are held to: `own`, or with the engine's experts."""
        self.texts += 1
        self.positions += len(ids)
        if got.shape != own.shape or not np.isfinite(got).all():
            return own
        if not routing.routers(self.oracle.model.network) or self._within(own, got):
            return own
        truth = traces.capture(self.oracle, ids).stages
        if Capability.TRACE not in self.engine.info.capabilities:
            noise = routing.noise_of(self.oracle, self.lane, ids, truth)
            unsteady = np.flatnonzero(routing.unsteady(self.oracle, truth, noise).any(axis=1))
            first = int(unsteady[0]) if unsteady.size else len(ids)
            self.unseen += len(ids) - first
            if first:
                self.steady.add(own[:first], got[:first])
            return own
        routes = routing.follow(self.oracle, self.lane, traces.capture(self.engine, ids), truth)
        if routes is None:
            return own
        self.routes.append(routes)
        self.wrong += [f"{stage}: {sentence}" for stage, sentence in routes.wrong.items()]
        logits = routes.stages["logits"]
        rounded = self._lane_passes.stages(ids, chosen=routes.chosen)["logits"]
        self.rank = max(self.rank, int(compare.rank(logits, rounded).max()))
        return logits

    def broken(self, largest: float) -> list[tuple[str, float, float, str]]:
        """The rows of `lanes.broken` of the steady positions of an engine that shows no stages."""
        if not (self.unseen and self.steady.kl):
            return []
        floor = lanes.stored(self.golden.floor_of(self.lane.name), largest)
        return lanes.broken(self.steady.figures(), lanes.bounds(self.lane, floor))

    def said(self) -> str:
        """A clause of a verdict, empty if no choice made a difference.

        Raises:
            Inconclusive: every choice is one that noise may decide.
        """
        if self.unseen:
            clause = (
                f"{self.unseen} of {self.positions} positions had a router margin below the noise, or follow "
                "one that had; the engine shows no choice: they were held to a floor with exchanged experts"
            )
            if not self.steady.kl:
                raise Inconclusive(f"no position is free of them: {clause}")
            return f"; {clause}"
        if not self.routes:
            return ""
        return f"; in {len(self.routes)} of {self.texts} texts {routing.said(self.routes)}"

    def _within(self, own: Rows, got: Rows) -> bool:
        tally, floor = LogitTally(), self.golden.floor_of(self.lane.name)
        tally.add(own, got)
        bound = lanes.bounds(self.lane, lanes.stored(floor, float(np.abs(own).max())))
        return not lanes.broken(tally.figures(), bound)
