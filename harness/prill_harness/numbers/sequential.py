"""Sums as the plainest float32 loops round them, computed from float64 operands.

A sum of equal terms rounds the same way at every step, so that its error grows with the number of terms,
where that of random terms grows with its root. How far depends on the order alone, and one term after another
is the worst of the orders that engines use. Every sum here is taken that way, each product and each partial
result rounded to single precision, from float64 operands: this shares no line with the arithmetic under
judgement.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from prill_runtime.ops.protocol import Array
from prill_runtime.ops.rounded import RoundedBackend, single

Term = Callable[[int], NDArray[np.floating]]


def running(count: int, term: Term) -> NDArray[np.float64]:
    """The sum of term(0) … term(count − 1), all of one shape, rounded to float32 at each step."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.asarray(term(0), np.float32)
        for n in range(1, count):
            total = total + np.asarray(term(n), np.float32)
    return np.asarray(total, np.float64)


class SequentialBackend(RoundedBackend):
    """Float64 whose sums were taken in float32 in the plainest order, and whose results are moved at random
    by some units in the last place (`rounded.single`)."""

    def __init__(self, draw: int = 0, alike: bool = False) -> None:
        super().__init__("float64", "single")
        self.leaving = single(draw, alike)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return self.leaving(np.asarray(x / np.sqrt(_mean(x * x) + eps) * weight))

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        centred = x - _mean(x)
        return self.leaving(np.asarray(centred / np.sqrt(_mean(centred * centred) + eps) * weight + bias))

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        columns = np.ascontiguousarray(weight.T)
        y = running(len(columns), lambda n: x[..., n, None] * columns[n])
        return self.leaving(y if bias is None else y + bias)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        start: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Array | None = None,
    ) -> Array:
        rows, heads, size = q.shape
        shared = heads // len(k)
        query, key = np.arange(start, start + rows)[:, None], np.arange(k.shape[1])
        hidden = (key > query) | (key <= query - (window or k.shape[1]))
        out = np.empty((rows, heads, size))
        for head in range(heads):
            keys, values = k[head // shared], v[head // shared]
            scaled = q[:, head] * scale
            scores = running(size, lambda n, a=scaled, b=keys: a[:, n, None] * b[:, n])  # type: ignore[misc]
            if softcap is not None:
                scores = np.asarray(softcap * np.tanh(scores / softcap))
            scores[hidden] = -np.inf
            sink = -np.inf if sinks is None else float(sinks[head])
            top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
            weights = np.exp(scores - top)
            total = running(len(keys), lambda n, w=weights: w[:, n, None])  # type: ignore[misc]
            total = total + np.exp(sink - top)
            weights = weights / total
            out[:, head] = running(len(keys), lambda n, w=weights, b=values: w[:, n, None] * b[n])  # type: ignore[misc]
        return self.leaving(out.reshape(rows, heads * size))


def _mean(x: Array) -> NDArray[np.float64]:
    """Over the last axis, which is kept."""
    return np.asarray(running(x.shape[-1], lambda n: x[..., n, None]) / x.shape[-1])
