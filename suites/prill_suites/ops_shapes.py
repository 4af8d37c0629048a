"""Shapes on either side of every size at which kernels divide their work.

A kernel is wrong at its borders: in the last tile, in the first value behind it, where a loop runs for the
second time. So every size of every axis is drawn once at least, beside others that a seeded generator picks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

HEAD_SIZES = (40, 64, 80, 96, 128, 256)
FEW = 4  # rows that a device multiplies one by one
MANY = 17  # rows from which a device may round to half precision, where a file's type does


def about(*edges: int) -> tuple[int, ...]:
    """Each size, the one before it and the one behind it."""
    return tuple(sorted({edge + step for edge in edges for step in (-1, 0, 1) if edge + step > 0}))


WIDTHS = about(256, 1024)
COUNTS = (*about(256), (1 << 16) + 1)
LINEAR = {
    "inner": (*about(4, 8, 16, 32, 64, 128, 512, 1024), 508, 516),
    "outer": about(4, 64, 128, 4096),
}
FEW_ROWS, MANY_ROWS = (1, 2, 3, 4), (5, *about(16, 64, 128, 256), 301, 4097)
# Of a type with blocks, so many blocks a row; products of many rows may take another kernel.
STORED = {"rows": (17, *about(64, 128, 256)), "blocks": (1, 2, 3, 4, 5, 17), "outer": (1, 3, *about(128))}
ATTENTION = {
    "dim": (*HEAD_SIZES, *about(128)),
    "keys": (*about(64, 128, 256, 512), 641, 1031),
    "group": (1, 2, 3, 4, 5, 7, 8, 9),
}
ATTENDING = ((1,), (2, 15, 16), (17, *about(64), 301))  # rows: of a decoding step, of few, of a prompt
WINDOWS = (None, None, None, 63, 65, 130, 520)


def drawn(
    random: np.random.Generator, axes: Mapping[str, Sequence[int]], most: int
) -> Iterator[dict[str, int]]:
    """Shapes in which each size of each axis occurs, the others picked so that all multiply to `most` at most
    (or, beside a large one, are the smallest there are)."""
    for axis, sizes in axes.items():
        for size in sizes:
            shape, rest = {axis: size}, [other for other in axes if other != axis]
            least = prod(min(axes[other]) for other in rest)
            for other in random.permutation(rest).tolist():
                least //= min(axes[other])  # what the others take at least
                room = most // (prod(shape.values()) * least)
                fitting = [each for each in axes[other] if each <= room] or [min(axes[other])]
                shape[other] = int(random.choice(fitting))
            yield shape


def products(random: np.random.Generator) -> Iterator[tuple[int, int, int]]:
    """Rows, columns, outputs: every size of a matrix by few rows and by many, every number of rows."""
    for rows in (FEW_ROWS, MANY_ROWS):
        for shape in drawn(random, LINEAR | {"rows": rows}, 30_000):
            yield shape["rows"], shape["inner"], shape["outer"]


def attentions(random: np.random.Generator) -> Iterator[tuple[int, int, int, int, int, int | None]]:
    """Rows, keys, cache heads, query heads of each, head size, window: every length, head size and group of
    heads for one row, for few and for many."""
    number = 0
    for rows in ATTENDING:
        for shape in drawn(random, ATTENTION | {"rows": rows}, 1_000_000):
            # Rows past the keys are cut, but where they were what the case is about.
            few = min(shape["rows"], shape["keys"]) if next(iter(shape)) == "keys" else shape["rows"]
            window = WINDOWS[number % len(WINDOWS)]
            yield few, max(shape["keys"], few), 1 + number % 2, shape["group"], shape["dim"], window
            number += 1


def sizes(op: str, arguments: Sequence[Any], named: Mapping[str, Any], stored: bool) -> dict[str, int]:
    """What a case of an op divides, axis -> size.

    Args:
        arguments: those of the twin. stored: the weight is of a type, as in a file.
    """
    shape = np.shape(arguments[0])
    if op == "linear":
        rows, inner = shape
        kernel = "matvec" if rows <= FEW else "matmul"
        found = {f"{kernel}.rows": rows, f"{kernel}.inner": inner, f"{kernel}.outer": len(arguments[1])}
        if stored and rows >= MANY:
            found |= {"tensor.rows": rows, "tensor.inner": inner, "tensor.outer": len(arguments[1])}
        if not stored:
            found |= {f"{kernel}.chunks": -(-inner // 4)}
        return found
    if op == "embed":
        return {"embed.chunks": len(arguments[1]) * -(-shape[1] // 4), "embed.width": shape[1]}
    if op == "rope":
        rows, heads, dim = shape
        pairs = named["dim"] // 2
        return {
            "rope.dim": dim, "rope.threads": rows * heads * (dim - pairs), "rope.angles": rows * pairs,
        }  # fmt: skip
    if op == "attention":
        (rows, heads, dim), (kv_heads, keys, _) = shape, np.shape(arguments[1])
        kernel = "prefill" if rows >= MANY else "attention"
        return {
            f"{kernel}.rows": rows, f"{kernel}.keys": keys, f"{kernel}.dim": dim,
            f"{kernel}.group": heads // kv_heads,
        }  # fmt: skip
    if op in ("rms_norm", "layer_norm", "softmax"):
        return {f"{op}.width": shape[-1]}
    if op == "route":
        return {"route.experts": shape[1]}
    if op == "mix":
        return {"mix.count": shape[0] * shape[2]}
    if op == "expert_linear":
        found = {"experts.rows": shape[0], "experts.inner": shape[-1], "experts.outer": len(arguments[1][0])}
        if shape[0] >= MANY:
            most = int(np.count_nonzero(arguments[2], axis=0).max())  # rows of one expert
            found |= {f"tensor_{name}": size for name, size in (found | {"experts.rows": most}).items()}
        return found
    return {f"{op}.count": prod(shape)}
