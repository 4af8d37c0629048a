"""How far each pair of a rotary embedding turns per position."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from prill_runtime.ops.protocol import Array, Yarn


def frequencies(
    base: float,
    dim: int,
    factor: float = 1.0,
    freq_factors: Array | None = None,
    yarn: Yarn | None = None,
) -> NDArray[np.float64]:
    """Radians a position (pair,), in float64: base^(−2i/dim) / factor / freq_factors[i] (Su et al. 2021).

    Args:
        factor: of linear position interpolation. freq_factors: (dim/2,), the divisors of a file's rope_freqs.
        yarn: fast pairs are not divided by `factor`, slow ones wholly, those between in part.
    """
    turns = np.power(float(base), -np.arange(0, dim, 2, dtype=np.float64) / dim)
    if yarn is None:
        turns = turns / factor
    else:
        divided = ramp(base, dim, yarn)
        turns = turns / factor * divided + turns * (1 - divided)
    return np.asarray(turns if freq_factors is None else turns / freq_factors.astype(np.float64))


def ramp(base: float, dim: int, yarn: Yarn) -> NDArray[np.float64]:
    """How much of each pair is interpolated, 0 to 1 (pair,): Peng et al. 2023, equations 17, 18 and 23."""

    def pair(rotations: float) -> float:
        """The pair that turns so many times over the positions of training."""
        return dim * math.log(yarn.original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(yarn.fast), pair(yarn.slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    return np.asarray(np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0))
