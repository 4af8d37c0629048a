"""How far off an honest engine's stages may be.

The noise of a stage is measured, not chosen: the lane's backend computes every stage from the oracle's
input, and the resulting NMSE times the lane's ratio is the bound. Rotary angles are computed in float32, as
honest engines do. A stage that is copied exactly has no noise to measure; it may be rounded once.
Against zeros an error is a multiple of the noise in that stage: if there is none, only zeros are right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prill_harness.numbers.compare import FLOATS, largest, nmse_of, squares
from prill_harness.numbers.lanes import Lane
from prill_harness.numbers.sequential import SequentialBackend
from prill_harness.planting import faults
from prill_runtime.errors import PrillError
from prill_runtime.ops import rotary
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.ops.protocol import Array, Ids, Yarn
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.run.model import Model

# Engines that multiply in integers keep activations between the products in half precision.
_KEPT = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int8": "float16"}
HONEST = 1e-10  # NMSE of a float32 op to its float64 twin, at most (docs/adr/0002-lanes.md, ops)


class Honest(RoundedBackend):
    """The lane's arithmetic, with rotary angles in float32."""

    def angles(
        self,
        positions: Ids,
        base: float,
        dim: int,
        factor: float,
        freq_factors: Array | None,
        yarn: Yarn | None = None,
    ) -> Array:
        """The float32 product of position and float32 frequency."""
        frequencies: Array = rotary.frequencies(base, dim, factor, None, yarn).astype(np.float32)
        if freq_factors is not None:
            frequencies /= freq_factors.astype(np.float32)
        return np.asarray(positions.astype(np.float32)[:, None] * frequencies)


def smallest(lane: Lane) -> float:
    """The largest NMSE of an array whose values were each rounded once to the lane's type."""
    return float(2.0 ** (-2 * FLOATS[_KEPT[lane.unit]][0]))


@dataclass(frozen=True)
class Bound:
    """How far a stage may be off in isolation.

    Attributes:
        nmse: at most. unit: the mean square that stands for the oracle's where that is zeros.
    """

    nmse: float
    unit: float = 0.0

    def apart(self, want: NDArray[np.float64], got: NDArray[np.float64]) -> float:
        """The NMSE to hold to it; of zeros, relative to what the lane's noise leaves there."""
        error, energy = squares(want, got)
        return nmse_of(error, energy + self.unit * want.size)


def stage_bounds(
    path: str | Path, lane: Lane, ids: Sequence[int], truth: Mapping[str, NDArray[np.float64]]
) -> dict[str, Bound]:
    """Stage -> what the lane's noise may leave in isolation; measured without planted faults.

    Where even float32 leaves more than honest ops do, in a norm of equal values say, how much depends on the
    order of a sum: the noisier of two counts.

    Args:
        truth: the oracle's stages on `ids`.
    """
    activations = "exact" if lane.activations == "f32" else lane.activations
    noise = _left(path, Honest("float32", activations), ids, truth)  # type: ignore[arg-type]
    if not noise or not all(np.isfinite(list(noise.values()))):
        raise PrillError("the lane's own noise is not finite", where=lane.name, got=str(path))
    if lane.activations == "f32":
        for stage, error in _left(path, SequentialBackend(), ids, truth).items():
            if error > HONEST * _energy(truth[stage]):
                noise[stage] = largest(noise[stage], error)
    return {stage: _bound(lane, error, truth[stage]) for stage, error in noise.items()}


def _left(
    path: str | Path, backend: NumpyBackend, ids: Sequence[int], truth: Mapping[str, NDArray[np.float64]]
) -> dict[str, float]:
    """Stage -> the sum of squares by which a backend's is off, given the oracle's input."""
    noise: dict[str, float] = {}

    def keep(stage: str, array: Array) -> Array | None:
        if stage in truth:
            noise[stage], _ = squares(truth[stage], np.asarray(array, np.float64).reshape(truth[stage].shape))
        return truth.get(stage)

    with faults.only(()), Model.load(path, backend=backend) as model:
        model.forward([(model.new_cache(len(ids)), ids)], trace=keep)
    return noise


def _bound(lane: Lane, error: float, truth: NDArray[np.float64]) -> Bound:
    energy = _energy(truth)
    if energy == 0:
        return Bound(lane.ratio, error / truth.size)
    return Bound(lane.ratio * max(error / energy, smallest(lane)))


def _energy(truth: NDArray[np.float64]) -> float:
    return squares(truth, truth)[1]
