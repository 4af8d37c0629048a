"""Which experts an engine chose, and the oracle's pass with the same ones where noise decides between them.

Rounding exchanges experts whose router logits are nearly equal. Everything behind such a choice, and every
later position that attends to it, then differs by far more than rounding does, and nothing is wrong. So the
oracle computes the pass once more with the engine's choice, and the engine is held to that by the same bound.
It follows a choice only across gaps that the lane's noise explains: the largest error of a difference of two
logits of this very router in the lane's own pass, times the root of the lane's ratio, as the bound allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import resolve_model
from prill_harness.numbers.lanes import Lane
from prill_harness.numbers.sequential import SequentialBackend
from prill_harness.planting import faults
from prill_harness.stages import trace as traces
from prill_harness.stages.trace import Array, Trace
from prill_runtime.errors import Inconclusive
from prill_runtime.models.nodes.experts import Experts
from prill_runtime.models.nodes.network import Network
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.run.model import Model

Chosen = NDArray[np.bool_]  # (row, expert)
# Of a stage, its router's logits (row, expert) and the pass's own choice: the choice to go on with.
Choose = Callable[[str, Array, Chosen], Chosen]


@dataclass
class Routes:
    """The oracle's pass with the experts of an engine.

    Attributes:
        stages: the oracle's, by name.
        chosen: stage -> the experts that this pass went through.
        unsteady: (row, router), where the oracle's margin is below the noise.
        exchanged: rows at which the engine has other experts than the oracle by itself.
        wrong: stage -> a sentence about the first choice that noise does not explain.
    """

    stages: Mapping[str, Array]
    chosen: Mapping[str, Chosen]
    unsteady: NDArray[np.bool_]
    exchanged: NDArray[np.bool_]
    wrong: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> NDArray[np.bool_]:
        """(row,) at which any router's margin is below the noise."""
        return np.asarray(self.unsteady.any(axis=1))


def said(routes: Sequence[Routes], first: int = 0) -> str:
    """A clause of a verdict that followed choices; of the rows from `first` on.

    Raises:
        Inconclusive: noise decides every choice there was, so that none of them was judged.
    """
    steady = [~each.unsteady[first:] for each in routes]
    count, rows = sum(int((~each).any(axis=1).sum()) for each in steady), sum(len(each) for each in steady)
    others = sum(int(each.exchanged[first:].sum()) for each in routes)
    clause = (
        f"{count} of {rows} positions had a router margin below the noise and were judged with the engine's "
        f"own choice, at {others} of them other experts than the oracle's"
    )
    if not any(each.any() for each in steady):
        raise Inconclusive(f"no router chose by more than the noise: {clause}")
    return clause


def routers(network: Network) -> dict[str, Experts]:
    """The mixtures of a network by the stage that says what they chose."""
    return {f"{node.at}routed": node for node in network.walk() if isinstance(node, Experts)}


def best(logits: Array, used: int) -> Chosen:
    """The largest of each row, of equals those with the lowest ids."""
    chosen = np.zeros(logits.shape, np.bool_)
    np.put_along_axis(chosen, np.argsort(-logits, axis=-1, kind="stable")[:, :used], True, axis=-1)
    return chosen


def margins(logits: Array, used: int) -> NDArray[np.float64]:
    """(row,): how far the last that is chosen lies above the first that is not; infinite if all are."""
    if used >= logits.shape[1]:
        return np.full(len(logits), np.inf)
    ordered = np.sort(logits, axis=-1)
    return np.asarray(ordered[:, -used] - ordered[:, -used - 1])


def weights(node: Experts, logits: Array, chosen: Chosen) -> Array:
    """What a mixture weights these experts by: (row, expert), 0 for all others."""
    among = np.where(chosen, logits, -np.inf) if node.normalised else logits
    exponents = np.exp(among - among.max(axis=-1, keepdims=True))
    return np.asarray(np.where(chosen, exponents / exponents.sum(axis=-1, keepdims=True), 0.0))


def fixed(chosen: Mapping[str, Chosen]) -> Choose:
    """These experts, by stage, wherever there are any."""
    return lambda stage, _, own: chosen.get(stage, own)


def through(model: Model, ids: Sequence[int], choose: Choose | None = None) -> dict[str, Array]:
    """Every stage of a pass of the runtime's, through the experts that `choose` says, if anything."""
    nodes, kept = routers(model.network), dict[str, NDArray[np.floating]]()

    def keep(stage: str, array: NDArray[np.floating]) -> NDArray[np.floating]:
        if (node := nodes.get(stage)) is not None:
            logits = np.asarray(kept[node.router.stage], np.float64)
            own = best(logits, node.used)
            chosen = own if choose is None else choose(stage, logits, own)
            if (other := (chosen != own).any(axis=-1)).any():
                array = array.copy()
                array[other] = weights(node, logits[other], chosen[other])
        kept[stage] = array
        return array

    model.forward([(model.new_cache(len(ids)), ids)], trace=keep)
    return {name: np.asarray(array, np.float64) for name, array in kept.items()}


class LanePasses:
    """Float64 passes that round as a lane's engines do, through a model that the first of them reads.

    Args:
        model: a model spec.
    """

    def __init__(self, model: str, lane: Lane) -> None:
        self._model, self._lane = model, lane

    @cached_property
    def _loaded(self) -> Model:
        backend: RoundedBackend = SequentialBackend()
        if self._lane.activations != "f32":
            backend = RoundedBackend("float64", self._lane.activations)  # type: ignore[arg-type]
        return Model.load(resolve_model(self._model), backend=backend)

    def stages(
        self, ids: Sequence[int], draw: int = 0, chosen: Mapping[str, Chosen] | None = None
    ) -> Mapping[str, Array]:
        """Every stage of a pass by name.

        Args:
            draw: another one rounds otherwise, where the lane draws at random.
            chosen: stage -> the experts that it goes through, else those that it finds.
        """
        with faults.only(()):
            model = self._loaded
            if isinstance(model.backend, SequentialBackend):
                model.backend.redraw(draw, alike=draw % 2 == 0)
            return through(model, ids, fixed(chosen or {}))


def chosen_by(oracle: Engine, truth: Mapping[str, Array]) -> dict[str, Chosen]:
    """Stage -> the experts that the oracle's stages went through; of a model without any, none."""
    found = routers(oracle.model.network) if isinstance(oracle, Embedded) else {}
    return {stage: truth[stage] != 0 for stage in found if stage in truth}


def noise_of(
    oracle: Embedded, lane: Lane, ids: Sequence[int], truth: Mapping[str, Array]
) -> dict[str, float]:
    """Stage -> the largest gap of two logits of its router that the lane's noise explains.

    Args:
        truth: the oracle's stages; the lane's pass goes through the experts that they chose.
    """
    nodes = routers(oracle.model.network)
    found = LanePasses(oracle.info.model, lane).stages(ids, chosen=chosen_by(oracle, truth))
    errors = {stage: found[node.router.stage] - truth[node.router.stage] for stage, node in nodes.items()}
    return {stage: lane.linear * float(np.ptp(error, axis=-1).max()) for stage, error in errors.items()}


def unsteady(oracle: Embedded, truth: Mapping[str, Array], noise: Mapping[str, float]) -> NDArray[np.bool_]:
    """(row, router), where the oracle's margin is below the noise."""
    nodes = routers(oracle.model.network)
    return np.stack(
        [margins(truth[node.router.stage], node.used) <= noise[stage] for stage, node in nodes.items()],
        axis=1,
    )


def choices(network: Network, shown: Mapping[str, Array]) -> dict[str, Chosen]:
    """Stage -> the experts that a trace shows: as it weights them, else the best of its router's logits."""
    found: dict[str, Chosen] = {}
    for stage, node in routers(network).items():
        if stage in shown:
            found[stage] = traces.rows(shown[stage]) != 0
        elif node.router.stage in shown:
            found[stage] = best(traces.rows(shown[node.router.stage]), node.used)
    return found


def follow(oracle: Embedded, lane: Lane, candidate: Trace, truth: Mapping[str, Array]) -> Routes | None:
    """The oracle's pass with a candidate's experts; None where they are the oracle's, or it shows none.

    A row with another number of experts is not followed: its stages say what is wrong.

    Args:
        truth: the oracle's stages on the candidate's ids.
    """
    network, shown = oracle.model.network, candidate.stages
    theirs = {
        stage: chosen for stage, chosen in choices(network, shown).items()
        if stage in truth and chosen.shape == truth[stage].shape
    }  # fmt: skip
    if all(np.array_equal(chosen, truth[stage] != 0) for stage, chosen in theirs.items()):
        return None
    ids, nodes = list(candidate.ids), routers(network)
    noise = noise_of(oracle, lane, ids, truth)
    wrong: dict[str, str] = {}
    went: dict[str, Chosen] = {}
    exchanged = np.zeros(len(ids), np.bool_)

    def choose(stage: str, logits: Array, own: Chosen) -> Chosen:
        went[stage] = own.copy()
        chosen = theirs.get(stage, own)
        swapped = (chosen != own).any(axis=-1) & (chosen.sum(axis=-1) == nodes[stage].used)
        for row in np.flatnonzero(swapped).tolist():
            left, taken = own[row] & ~chosen[row], chosen[row] & ~own[row]
            gap = float(logits[row][left].max() - logits[row][taken].min())
            mine = shown.get(nodes[stage].router.stage)
            if mine is not None and mine.shape == logits.shape:
                own_gap = float(mine[row][left].max() - mine[row][taken].min())
                if not own_gap <= 0:
                    wrong.setdefault(stage, _refused(row, left, taken, "its own logits put", own_gap, 0.0))
            if gap <= noise[stage]:
                went[stage][row], exchanged[row] = chosen[row], True
            else:
                wrong.setdefault(stage, _refused(row, left, taken, "the oracle puts", gap, noise[stage]))
        return went[stage]

    with faults.only(()):
        stages = through(oracle.model, ids, choose)
    if not (exchanged.any() or wrong):
        return None
    return Routes(stages, went, unsteady(oracle, stages, noise), exchanged, wrong)


def _refused(row: int, left: Chosen, taken: Chosen, who: str, gap: float, noise: float) -> str:
    ids = [", ".join(map(str, np.flatnonzero(chosen).tolist())) for chosen in (taken, left)]
    at_most = f"the noise explains {noise:.3g}" if noise else "the choice itself is wrong"
    return f"position {row} has expert {ids[0]} instead of {ids[1]}, which {who} {gap:.3g} above; {at_most}"


def followed(engine: Engine, oracle: Embedded, lane: Lane, ids: Sequence[int]) -> Routes | None:
    """As `follow`, of a trace of the engine's; None too if the engine shows no stages, or has no experts."""
    if Capability.TRACE not in engine.info.capabilities or not routers(oracle.model.network):
        return None
    return follow(oracle, lane, traces.capture(engine, ids), traces.capture(oracle, ids).stages)
