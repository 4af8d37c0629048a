"""The numbers of a rotary embedding go in; how far each pair turns per position comes out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prill_runtime.ops.protocol import Array


def frequencies(
    base: float, dim: int, factor: float = 1.0, freq_factors: Array | None = None
) -> NDArray[np.float64]:
    """Radians a position (pair,), in float64: base^(−2i/dim) / factor / freq_factors[i] (Su et al. 2021).

    Args:
        factor: of linear position interpolation. freq_factors: (dim/2,), the divisors of a file's rope_freqs.
    """
    turns = np.power(float(base), -np.arange(0, dim, 2, dtype=np.float64) / dim) / factor
    return np.asarray(turns if freq_factors is None else turns / freq_factors.astype(np.float64))
