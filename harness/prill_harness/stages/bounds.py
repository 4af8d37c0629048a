"""A model file, a lane and the oracle's stages go in; how far an honest engine's stages may be off comes out.

The noise of a stage is measured, not chosen: the lane's own backend computes every stage from the oracle's
input to it, and the NMSE it leaves, times the lane's ratio, is the bound. Rotary angles are computed in
float32 there, as honest engines do. What is copied exactly has no noise to measure; it may be rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prill_harness.numbers.compare import FLOATS, nmse
from prill_harness.numbers.lanes import Lane
from prill_harness.planting import faults
from prill_runtime.errors import PrillError
from prill_runtime.ops import rotary
from prill_runtime.ops.protocol import Array, Ids, Yarn
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.run.model import Model

# Engines that multiply in integers keep activations between the products in half precision.
_KEPT = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int8": "float16"}


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
    """NMSE of an array whose values were each rounded once, at worst, in the lane's type."""
    return float(2.0 ** (-2 * FLOATS[_KEPT[lane.unit]][0]))


def stage_bounds(
    path: str | Path, lane: Lane, ids: Sequence[int], truth: Mapping[str, NDArray[np.float64]]
) -> dict[str, float]:
    """Stage -> NMSE that the lane's noise may leave in isolation; measured without planted faults.

    Args:
        truth: the oracle's stages on `ids`.
    """
    noise: dict[str, float] = {}

    def keep(stage: str, array: Array) -> Array | None:
        if stage in truth:
            noise[stage] = nmse(truth[stage], np.asarray(array, np.float64).reshape(truth[stage].shape))
        return truth.get(stage)

    activations = "exact" if lane.activations == "f32" else lane.activations
    with faults.only(()), Model.load(path, backend=Honest("float32", activations)) as model:  # type: ignore[arg-type]
        model.forward([(model.new_cache(len(ids)), ids)], trace=keep)
    if not noise or not all(np.isfinite(list(noise.values()))):
        raise PrillError("the lane's own noise is not finite", where=lane.name, got=str(path))
    least = smallest(lane)
    return {stage: lane.ratio * max(value, least) for stage, value in noise.items()}
