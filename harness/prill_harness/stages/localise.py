"""Which tokens, heads or elements of an array are wrong."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FEW_VALUES = 3


def localise(got: NDArray[np.float64], want: NDArray[np.float64], heads: int = 0, noun: str = "head") -> str:
    """A clause such as "only tokens 128 to 299" or "only element 17"; empty if the error is everywhere.

    Args:
        got, want: (token, ...) arrays of one shape.
        heads: query heads of the model; a last axis divisible by them is also reported by head.
        noun: what the middle one of three axes counts.
    """
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want).reshape(len(got), -1)
    error = np.where(np.isfinite(error), error, np.inf)
    finite = np.abs(want)[np.isfinite(want)]
    scale = float(finite.max()) if finite.size else 0.0
    # The rounding of a right float32 stage is far below a ten-thousandth of the worst error.
    wrong = error > max(1e-6 * scale, 1e-4 * float(error[np.isfinite(error)].max(initial=0.0)))
    parts = [_span("token", wrong.any(axis=1))]
    heads = got.shape[1] if got.ndim == 3 else heads
    if heads and wrong.shape[1] % heads == 0 and wrong.shape[1] > heads:
        by_head = wrong.reshape(len(wrong), heads, -1)
        parts.append(_span(noun, by_head.any(axis=(0, 2))))
        parts.append(_span("element", by_head.any(axis=(0, 1)), of=f" of the {noun}"))
    else:
        parts.append(_span("element", wrong.any(axis=0)))
    return ", ".join(part for part in parts if part)


def _span(noun: str, marks: object, of: str = "") -> str:
    wrong = np.asarray(marks, dtype=np.bool_)
    where = np.flatnonzero(wrong)
    if not len(where) or len(where) == len(wrong):
        return ""
    if len(where) == 1:
        return f"only {noun} {where[0]}{of}"
    if int(where[-1]) - int(where[0]) + 1 == len(where):
        return f"only {noun}s {where[0]} to {where[-1]}{of}"
    if len(where) <= FEW_VALUES:
        return f"only {noun}s {', '.join(map(str, where[:-1]))} and {where[-1]}{of}"
    # Most of a dense error exceeds the threshold; a gap here and there is chance, not a pattern.
    return f"{len(where)} of {len(wrong)} {noun}s{of}" if len(where) < len(wrong) / 2 else ""
