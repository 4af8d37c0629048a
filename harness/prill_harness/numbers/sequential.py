"""Sums as the plainest float32 loops round them, computed from float64 operands.

A sum of equal terms rounds the same way at every step, so that its error grows with the number of terms,
where that of random terms grows with its root. How far depends on the order alone, and one term after another
is the worst of the orders that engines use. Every sum here is taken that way, each operand, product and
partial result rounded to single precision, in float64 passes: this shares no line with the arithmetic under
judgement.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.ops.protocol import Array
from prill_runtime.ops.rounded import RoundedBackend, single

QUERIES = 128  # whose scores are held at once
BLOCK = 1 << 15  # elements of a partial sum: it stays in a processor's own cache
TERMS, LONG = 1 << 16, 4  # elements of terms that are made at once; of more than so many a sum takes one call


def product(a: Array, b: Array) -> NDArray[np.float64]:
    """a (row, term) times b (term, column), one term after another in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if b.shape[1] == 1:  # terms side by side, which `reduce` would add in pairs
            return np.asarray(np.add.accumulate(a * b[:, 0], axis=1)[:, -1:], np.float64)
        out = np.multiply.outer(a[:, 0], b[0])
        rows = max(1, BLOCK // b.shape[1])
        for low in range(0, len(a), rows):
            left, total = a[low : low + rows].T[:, :, None], out[low : low + rows]
            step = max(1, TERMS // max(1, total.size))
            terms = np.empty((1 + step, *total.shape), np.float32)
            for n in range(1, len(b), step):
                some = terms[: 1 + len(b[n : n + step])]
                np.multiply(left[n : n + step], b[n : n + step, None], out=some[1:])
                if len(some) > LONG:
                    some[0] = total
                    np.add.reduce(some, axis=0, out=total)  # its first axis is not the last: in order
                    continue
                for term in some[1:]:
                    total += term
    return np.asarray(out, np.float64)


class SequentialBackend(RoundedBackend):
    """Float64 whose sums were taken in float32 in the plainest order, and whose results are moved at random
    by some units in the last place (`rounded.single`)."""

    def __init__(self, draw: int = 0, alike: bool = False) -> None:
        super().__init__("float64", "single")
        self.redraw(draw, alike)

    def redraw(self, draw: int, alike: bool) -> None:
        """Begin a pass whose results are moved otherwise, or as once before: by the draw alone."""
        self.entering, self.leaving = single(), single(draw, alike)

    def weight(self, raw: NDArray[np.uint8], info: TensorInfo) -> Array:
        held = super().weight(raw, info)
        return np.asfortranarray(held) if held.ndim == 2 else held  # as `product` goes through it

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return self.leaving(np.asarray(x / np.sqrt(_mean(x * x) + eps) * weight))

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        centred = x - _mean(x)
        return self.leaving(np.asarray(centred / np.sqrt(_mean(centred * centred) + eps) * weight + bias))

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        y = product(x, np.ascontiguousarray(weight.T))
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
        out = np.empty((rows, heads, size))
        for head in range(heads):
            keys, values = k[head // shared], v[head // shared]
            sink = -np.inf if sinks is None else float(sinks[head])
            for low in range(0, rows, QUERIES):
                query = np.arange(start + low, start + min(low + QUERIES, rows))[:, None]
                key = np.arange(min(int(query[-1, 0]) + 1, len(keys)))  # nobody here sees a later one
                scores = product(q[low : low + QUERIES, head] * scale, np.ascontiguousarray(keys[key].T))
                if softcap is not None:
                    scores = np.asarray(softcap * np.tanh(scores / softcap))
                scores[(key > query) | (key <= query - (window or len(keys)))] = -np.inf
                top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
                weights = np.exp(scores - top)
                weights = weights / (_sum(weights) + np.exp(sink - top))
                out[low : low + QUERIES, head] = product(weights, values[key])
        return self.leaving(out.reshape(rows, heads * size))


def _mean(x: Array) -> NDArray[np.float64]:
    """Over the last axis, which is kept."""
    return np.asarray(_sum(x) / x.shape[-1])


def _sum(x: Array) -> NDArray[np.float64]:
    """Over the last axis, which is kept."""
    rows = x.reshape(-1, x.shape[-1])
    return product(rows, np.ones((x.shape[-1], 1))).reshape(*x.shape[:-1], 1)
