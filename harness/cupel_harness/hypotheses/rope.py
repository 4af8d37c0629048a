"""Ways to get rotary position embedding wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupel_harness.hypotheses.case import Array, Case, Guess, hypothesis

BASES = (1e4, 1e5, 1e6, 5e4, 5e5, 1.5e5, 2.5e5, 1e3)


def rotate(x: Array, positions: Array, frequencies: Array, *, half_split: bool = False) -> Array:
    """Rotate pairs of the last axis by position x frequency.

    Args:
        x: (token, head, dim).
        frequencies: (dim/2,) radians per position; pairs are (2i, 2i+1), or (i, i+dim/2) when half_split.
    """
    angle = positions[:, None] * frequencies  # (token, dim/2)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    half = 2 * len(frequencies)
    out = x.copy()
    first, second = (
        (slice(0, half // 2), slice(half // 2, half))
        if half_split
        else (slice(0, half, 2), slice(1, half, 2))
    )
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def frequencies(dim: int, base: float) -> Array:
    """base^(-2i/dim) for i in 0..dim/2."""
    return np.asarray(base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim))


@hypothesis("q_rope", "k_rope")
def rotary(case: Case) -> Iterator[Guess]:
    x, positions = case.inputs[0], case.positions
    dim, base = int(case.number("rope_dim", x.shape[-1])), case.number("rope_base", 1e4)
    right = frequencies(dim, base) / case.number("rope_factor", 1.0)
    yield "not rotated at all", x
    yield "pairs (i, i+d/2) instead of (2i, 2i+1)", rotate(x, positions, right, half_split=True)
    yield "positions counted from 1 instead of 0", rotate(x, positions + 1, right)
    yield "positions counted from -1 instead of 0", rotate(x, positions - 1, right)
    yield "every position taken as 0", rotate(x, positions * 0, right)
    yield "rotated the wrong way (sine with the opposite sign)", rotate(x, -positions, right)
    exponents = np.arange(dim // 2, dtype=np.float64)
    yield "frequency base^(-i) instead of base^(-2i/d)", rotate(x, positions, base**-exponents)
    yield "frequency base^(-i/d) instead of base^(-2i/d)", rotate(x, positions, base ** (-exponents / dim))
    yield "only the first half of the dimensions rotated", rotate(x, positions, right[: dim // 4])
    for other in BASES:
        if other != base:
            yield f"rope base {other:g} instead of {base:g}", rotate(x, positions, frequencies(dim, other))
    for factor in (2.0, 4.0, 8.0, 16.0, 32.0):
        yield f"positions divided by {factor:g}", rotate(x, positions / factor, right)
        yield f"rope scaling {factor:g} of the file ignored", rotate(x, positions * factor, right)


@hypothesis("q_rope", "k_rope")
def swapped_pair(case: Case) -> Iterator[Guess]:
    """One pair of elements exchanged, in every head."""
    wrong = (
        np.abs(case.got - case.want).reshape(-1, case.want.shape[-1]).max(axis=0)
        > 1e-4 * np.abs(case.want).max()
    )
    elements = np.flatnonzero(wrong)
    if len(elements) == 2:
        i, j = int(elements[0]), int(elements[1])
        guess = case.want.copy()
        guess[..., [i, j]] = guess[..., [j, i]]
        yield f"elements {i} and {j} of every head exchanged (rope pair {i // 2})", guess
        x = case.inputs[0].copy()
        x[..., [i, j]] = x[..., [j, i]]
        base = frequencies(int(case.number("rope_dim", x.shape[-1])), case.number("rope_base", 1e4))
        turned = rotate(x, case.positions, base / case.number("rope_factor", 1.0))
        yield f"elements {i} and {j} exchanged before the rotation (rope pair {i // 2})", turned
        turned = turned.copy()
        turned[..., [i, j]] = turned[..., [j, i]]
        yield f"rope pair {i // 2} rotated as ({j}, {i}) instead of ({i}, {j})", turned
