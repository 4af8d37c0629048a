"""Ways to get rotary position embedding wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from prill_harness.stages.hypotheses.case import Array, Case, Guess, hypothesis
from prill_runtime.models.nodes.rope import Rope
from prill_runtime.ops.protocol import RopeLayout

BASES = (1e4, 1e5, 1e6, 5e4, 5e5, 1.5e5, 2.5e5, 1e3)
FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0)


def rotate(
    x: Array, positions: Array, frequencies: Array, *, half_split: bool = False, scale: float = 1.0
) -> Array:
    """Rotate pairs of the last axis by position x frequency.

    Args:
        x: (token, head, dim).
        frequencies: (dim/2,) radians per position; pairs are (2i, 2i+1), or (i, i+dim/2) when half_split.
        scale: of cosines and sines.
    """
    angle = positions[:, None] * frequencies  # (token, dim/2)
    cos, sin = scale * np.cos(angle)[:, None], scale * np.sin(angle)[:, None]
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


def _divisors(case: Case, node: Rope) -> Array:
    """(dim/2,) what each frequency is divided by."""
    late = node.long is not None and len(case.positions) > node.original
    name = node.long if late else node.divisors
    factors = None if name is None else case.weight(name)
    return stretched(node) * (1.0 if factors is None else factors)


def stretched(node: Rope) -> Array:
    """(dim/2,) what the scaling divides each frequency by: all by the factor, or with YaRN those that turn
    `fast` times over the original positions by 1, those that turn `slow` times by the factor."""
    n = node.dim // 2
    if node.yarn is None:
        return np.full(n, node.factor)
    turns = np.array([node.yarn.fast, node.yarn.slow])
    ends = np.log(node.yarn.original / (2 * np.pi * turns)) / np.log(node.base) * n
    if node.yarn.truncate:
        ends = np.array([np.floor(ends[0]), np.ceil(ends[1])])
    low, high = max(ends[0], 0.0), min(ends[1], node.dim - 1.0)
    part = np.clip((np.arange(n) - low) / (high - low if high != low else 1e-3), 0.0, 1.0)
    return np.asarray(1 / (part / node.factor + (1 - part)))


def _turn(node: Rope) -> Callable[[Array, Array, Array], Array]:
    """`rotate` of the node's own pairs."""
    return partial(rotate, half_split=node.layout == "neox", scale=node.scale)


def _pair(node: Rope, number: int) -> tuple[int, int]:
    """The two elements of a head that are turned together."""
    return (number, number + node.dim // 2) if node.layout == "neox" else (2 * number, 2 * number + 1)


PAIRS = {"norm": "(2i, 2i+1)", "neox": "(i, i+d/2)"}


@hypothesis(Rope)
def rotary(case: Case, node: Rope) -> Iterator[Guess]:
    """The pairing, the positions, the frequencies."""
    x, positions, rotate = case.inputs[0], case.positions, _turn(node)
    dim, base, divisors = node.dim, node.base, _divisors(case, node)
    right = frequencies(dim, base) / divisors
    said = f"base {base:g} and dimension {dim} as the file states, where the oracle's differ"
    yield said, rotate(x, positions, right)
    other: RopeLayout = "norm" if node.layout == "neox" else "neox"
    yield "not rotated at all", x
    paired = _turn(replace(node, layout=other))(x, positions, right)
    yield f"pairs {PAIRS[other]} instead of {PAIRS[node.layout]}", paired
    yield "positions counted from 1 instead of 0", rotate(x, positions + 1, right)
    yield "positions counted from -1 instead of 0", rotate(x, positions - 1, right)
    yield "every position taken as 0", x
    yield "rotated the wrong way (sine with the opposite sign)", rotate(x, -positions, right)
    yield "rotated twice", rotate(x, 2 * positions, right)
    exponents = np.arange(dim // 2, dtype=np.float64)
    yield "frequency base^(-i) instead of base^(-2i/d)", rotate(x, positions, base**-exponents / divisors)
    slow = base ** (-exponents / dim) / divisors
    yield "frequency base^(-i/d) instead of base^(-2i/d)", rotate(x, positions, slow)
    turned, half = x.copy(), dim // 4 * 2  # whole pairs
    turned[..., :half] = rotate(x[..., :half], positions, right[: half // 2])
    yield "only the first half of the dimensions rotated", turned
    turned[..., :half] = rotate(x[..., :half], positions, frequencies(half, base))
    yield f"rope dimension {half} instead of {dim}", turned
    if (whole := x.shape[-1] // 2 * 2) > dim:
        yield f"rope dimension {whole} instead of {dim}", rotate(x, positions, frequencies(whole, base))
    yield "frequencies in reverse order", rotate(x, positions, right[::-1])
    for last in (64, 128, 256):
        if last < len(positions):
            yield f"positions start again after {last}", rotate(x, positions % last, right)
            yield f"positions past {last} taken as {last}", rotate(x, np.minimum(positions, last), right)


@hypothesis(Rope)
def settings(case: Case, node: Rope) -> Iterator[Guess]:
    """Another base, another scaling."""
    x, positions, rotate = case.inputs[0], case.positions, _turn(node)
    dim, base, divisors = node.dim, node.base, _divisors(case, node)
    for other in BASES:
        if abs(other / base - 1) > 1e-6:
            turned = rotate(x, positions, frequencies(dim, other) / divisors)
            yield f"rope base {other:g} instead of {base:g}", turned
    right = frequencies(dim, base)
    if (divisors != 1).any():
        yield "rope scaling of the file ignored", rotate(x, positions, right)
        yield "positions multiplied by the file's scaling", rotate(x, positions, right * divisors)
        yield "rope scaling of the file applied twice", rotate(x, positions, right / divisors**2)
    for factor in FACTORS:
        yield f"positions divided by {factor:g}", rotate(x, positions / factor, right / divisors)
        yield f"positions multiplied by {factor:g}", rotate(x, positions * factor, right / divisors)


@hypothesis(Rope)
def stretching(case: Case, node: Rope) -> Iterator[Guess]:
    """YaRN's parts, the factor of cosines and sines, divisors by length, the rotation of other layers."""
    x, positions = case.inputs[0], case.positions
    divisors = _divisors(case, node)

    def turned(other: Rope, divisors: Array = divisors) -> Array:
        return _turn(other)(x, positions, frequencies(other.dim, other.base) / divisors)

    grown = 0.1 * np.log(max(node.factor, 1.0)) + 1
    for scale, said in ((1.0, "left out"), (node.scale**2, "applied twice"), (grown, "of YaRN")):
        if abs(scale - node.scale) > 1e-6:
            clause = f"attention factor {said}: cosines and sines times {scale:.6g}, not {node.scale:.6g}"
            yield clause, turned(replace(node, scale=scale))
    if (yarn := node.yarn) is not None:
        factors = divisors / stretched(node)
        how = "kept as they are instead of rounded outwards"
        if not yarn.truncate:
            how = "rounded outwards instead of kept as they are"
        for clause, other in (
            (f"YaRN's bounds {how}", replace(node, yarn=yarn._replace(truncate=not yarn.truncate))),
            ("every frequency divided by the factor, YaRN's ramp left out", replace(node, yarn=None)),
            ("YaRN's original length multiplied by the factor", replace(
                node, yarn=yarn._replace(original=round(yarn.original * node.factor)))),
            ("YaRN left out, its attention factor included", replace(node, yarn=None, factor=1.0, scale=1.0)),
        ):  # fmt: skip
            yield clause, turned(other, stretched(other) * factors)
    for name, said in ((node.divisors, "short"), (node.long, "long")):
        found = None if name is None or node.long is None else case.weight(name)
        if found is not None:
            yield f"divisors for {said} texts, whatever the length", turned(node, found)
    for other in case.nodes(Rope):
        if other != node and other.dim <= x.shape[-1]:
            clause = f"turned as other layers are, with base {other.base:g} instead of {node.base:g}"
            yield clause, turned(other, _divisors(case, other))


@hypothesis(Rope)
def one_pair(case: Case, node: Rope) -> Iterator[Guess]:
    """One pair, or two that were exchanged, while all others are right."""
    error = np.abs(case.got - case.want).reshape(-1, case.want.shape[-1]).max(axis=0)
    elements = np.flatnonzero(~(error <= max(1e-5 * float(np.nanmax(error)), 1e-6 * np.abs(case.want).max())))
    places = {element: n for n in range(node.dim // 2) for element in _pair(node, n)}
    pairs = sorted({places.get(int(element), -1) for element in elements})
    if not 1 <= len(pairs) <= 2 or pairs[0] < 0:
        return
    x, rotate = case.inputs[0], _turn(node)
    right = frequencies(node.dim, node.base) / _divisors(case, node)
    if len(pairs) == 2:
        first, second = pairs
        exchanged = right.copy()
        exchanged[[first, second]] = exchanged[[second, first]]
        clause = f"frequencies of rope pairs {first} and {second} exchanged"
        yield clause, rotate(x, case.positions, exchanged)
        order = np.arange(x.shape[-1])
        order[[*_pair(node, first), *_pair(node, second)]] = *_pair(node, second), *_pair(node, first)
        yield f"rope pairs {first} and {second} exchanged after the rotation", case.want[..., order]
        yield (
            f"rope pairs {first} and {second} exchanged before the rotation",
            rotate(x[..., order], case.positions, right),
        )
        return
    pair = pairs[0]
    i, j = _pair(node, pair)
    order = np.arange(x.shape[-1])
    order[[i, j]] = j, i
    turned = rotate(x[..., order], case.positions, right)
    yield f"rope pair {pair} swapped: rotated as ({j}, {i}) instead of ({i}, {j})", turned[..., order]
    yield (
        f"rope pair {pair} swapped: elements {i} and {j} exchanged after the rotation",
        case.want[..., order],
    )
    yield f"rope pair {pair} swapped: elements {i} and {j} exchanged before the rotation", turned
    still = right.copy()
    still[pair] = 0
    yield f"rope pair {pair} not rotated", rotate(x, case.positions, still)
    for neighbour in (pair - 1, pair + 1):
        if 0 <= neighbour < len(right):
            other = right.copy()
            other[pair] = right[neighbour]
            clause = f"rope pair {pair} rotated at the frequency of pair {neighbour}"
            yield clause, rotate(x, case.positions, other)
