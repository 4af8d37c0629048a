"""The ops in NumPy, wholly in float32 or wholly in float64; in float64 they are the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prill_runtime.errors import InvalidParameter
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.ops import rotary
from prill_runtime.ops.protocol import Array, Backend, Ids, RopeLayout, Yarn
from prill_runtime.quants.layouts import dequantize

Precision = Literal["float32", "float64"]
_erf = np.frompyfunc(math.erf, 1, 1)

FEW_ROWS = 16  # of a batch that decodes
# A library multiplies without packing where a product takes at most a million multiplications, which is twice
# as fast for few rows; so a weight is taken in blocks of rows that are as small as that.
BLOCK_ROWS, BLOCK_SIZE = 32, 1_000_000
# Scores of more query rows than this are never held at once, so a long prompt needs no square matrix; and a
# block of rows reads only the keys that one of them sees.
QUERY_ROWS = 64
# Nor are more scores than this of one head while a block has more rows than a few: else a prompt of twice the
# length could hold nearly three times as many.
QUERY_SCORES = 2 * QUERY_ROWS**2


def erf(x: Array) -> Array:
    """The error function, of each value in float64."""
    return np.asarray(_erf(x.astype(np.float64)), np.float64)


class NumpyBackend(Backend[Array, Array, Array]):
    """Backend protocol in NumPy.

    Every intermediate value has the backend's dtype, with one exception: rotary angles are computed in
    float64 and their sine and cosine are then cast, because an angle of a late position has no float32.

    Raises:
        InvalidParameter: a dtype other than float32 and float64.
    """

    def __init__(self, dtype: Precision = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise InvalidParameter(
                "unknown precision", where="dtype", expected="float32 or float64", got=repr(dtype)
            )
        self.dtype = np.dtype(dtype)
        self.name = f"numpy {dtype}"

    def weight(self, raw: NDArray[np.uint8], info: TensorInfo) -> Array:
        return dequantize(raw, info.type, info.shape).astype(self.dtype, copy=False)

    def is_zero(self, weight: Array) -> bool:
        return not weight.any()

    def embed(self, table: Array, ids: Ids) -> Array:
        return table[ids]

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        mean_square = np.add.reduce(x * x, axis=-1, keepdims=True) / x.shape[-1]
        return np.asarray(x / np.sqrt(mean_square + eps) * weight)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        n = x.shape[-1]
        centred = x - np.add.reduce(x, axis=-1, keepdims=True) / n
        variance = np.add.reduce(centred * centred, axis=-1, keepdims=True) / n
        return np.asarray(centred / np.sqrt(variance + eps) * weight + bias)

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        if not 1 < len(x) <= FEW_ROWS:
            y = x @ weight.T
        elif len(weight) % BLOCK_ROWS or BLOCK_ROWS * x.size > BLOCK_SIZE:
            y = (weight @ x.T).T  # a weight on the left of few columns is packed in half the time
        else:
            y = (weight.reshape(-1, BLOCK_ROWS, weight.shape[1]) @ x.T).reshape(-1, len(x)).T
        return np.asarray(y if bias is None else y + bias)

    def rope(
        self,
        x: Array,
        positions: Ids,
        *,
        base: float,
        dim: int,
        layout: RopeLayout,
        factor: float = 1.0,
        freq_factors: Array | None = None,
        yarn: Yarn | None = None,
        scale: float = 1.0,
        long: tuple[Array, int] | None = None,
    ) -> Array:
        if long is not None and positions.max() >= long[1]:
            freq_factors = long[0]
        angles = self.angles(positions, base, dim, factor, freq_factors, yarn)[:, None]
        cos, sin = ((scale * turned).astype(self.dtype) for turned in (np.cos(angles), np.sin(angles)))
        first, second = {
            "norm": (slice(0, dim, 2), slice(1, dim, 2)),
            "neox": (slice(0, dim // 2), slice(dim // 2, dim)),
        }[layout]
        a, b = x[..., first], x[..., second]
        out = x.copy()
        out[..., first] = a * cos - b * sin
        out[..., second] = a * sin + b * cos
        return out

    def angles(
        self,
        positions: Ids,
        base: float,
        dim: int,
        factor: float,
        freq_factors: Array | None,
        yarn: Yarn | None = None,
    ) -> Array:
        """Rotary angles (row, pair) of positions (row,), in radians."""
        return np.asarray(positions[:, None] * rotary.frequencies(base, dim, factor, freq_factors, yarn))

    def temper(self, x: Array, positions: Ids, *, beta: float, original: int) -> Array:
        factor = (1 + beta * np.log1p(positions // original)).astype(self.dtype)
        return np.asarray(x * factor.reshape(-1, *[1] * (x.ndim - 1)))

    def softmax(self, x: Array) -> Array:
        with np.errstate(invalid="ignore"):
            weights = np.asarray(x - np.maximum.reduce(x, axis=-1, keepdims=True))
        np.exp(weights, out=weights)
        weights /= np.add.reduce(weights, axis=-1, keepdims=True)
        return weights

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
        rows, heads, head_dim = q.shape
        kv_heads, length, _ = k.shape
        group = heads // kv_heads
        blocked = q.reshape(rows, kv_heads, group, head_dim).transpose(1, 2, 0, 3)  # (kv, group, row, dim)
        out = np.empty((rows, kv_heads, group, head_dim), self.dtype)
        high = 0
        while high < rows:
            low, first = high, 0 if window is None else max(0, min(start + high - window + 1, length - 1))
            keys = min(start + low + QUERY_ROWS, length) - first
            high = min(low + max(FEW_ROWS, min(QUERY_ROWS, QUERY_SCORES // keys)), rows)
            last = min(start + high, length)
            block = blocked[:, :, low:high].reshape(kv_heads, group * (high - low), head_dim)
            scores = (block * self.dtype.type(scale)) @ k[:, first:last].transpose(0, 2, 1)
            if softcap is not None:
                scores = self.softcap(scores, softcap)
            if high - low > 1:  # one row sees every key that is left
                query, key = np.arange(start + low, start + high)[:, None], np.arange(first, last)
                hidden = key > query
                if window is not None:
                    hidden |= key <= query - window
                np.copyto(scores.reshape(kv_heads, group, high - low, -1), -np.inf, where=hidden)
            if sinks is not None:
                column = np.repeat(sinks.reshape(kv_heads, group), high - low, axis=1)[..., None]
                scores = np.concatenate([scores, column], axis=-1)
            weights = self.softmax(scores)[..., : last - first]
            mixed = (weights @ v[:, first:last]).reshape(kv_heads, group, high - low, head_dim)
            if rows == 1:
                return mixed.reshape(1, heads * head_dim)
            out[low:high] = mixed.transpose(2, 0, 1, 3)
            del scores, weights, mixed  # before those of the next block are made
        return out.reshape(rows, heads * head_dim)

    def swiglu(self, gate: Array, up: Array) -> Array:
        with np.errstate(over="ignore"):
            weight = np.exp(-gate)
        weight += 1
        return np.asarray(gate / weight * up)

    def swiglu_clamped(self, gate: Array, up: Array, *, limit: float, alpha: float) -> Array:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        with np.errstate(over="ignore"):
            weight = np.exp(-self.dtype.type(alpha) * gate)
        return np.asarray(gate / (weight + 1) * (up + 1))

    def geglu(self, gate: Array, up: Array) -> Array:
        return np.asarray(self.gelu_tanh(gate) * up)

    def gelu_tanh(self, x: Array) -> Array:
        # (1 + tanh u) / 2 is 1 / (1 + exp -2u): NumPy's exp takes a fraction of its tanh's time.
        with np.errstate(over="ignore"):
            weight = np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))
        weight += 1
        return np.asarray(x / weight)

    def gelu_erf(self, x: Array) -> Array:
        return np.asarray(0.5 * x * (1 + erf(x * math.sqrt(0.5)).astype(self.dtype)))

    def scale(self, x: Array, by: float) -> Array:
        return np.asarray(x * self.dtype.type(by))

    def softcap(self, x: Array, cap: float) -> Array:
        return np.asarray(self.dtype.type(cap) * np.tanh(x / self.dtype.type(cap)))

    def route(self, logits: Array, *, used: int, normalised: bool) -> Array:
        chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :used]
        hidden = np.full_like(logits, -np.inf)
        np.put_along_axis(hidden, chosen, np.take_along_axis(logits, chosen, axis=-1), axis=-1)
        return self.softmax(hidden) if normalised else np.where(hidden == logits, self.softmax(logits), 0)

    def expert_linear(
        self, x: Array, weight: Array, routed: Array, *, used: int, bias: Array | None = None
    ) -> Array:
        out = np.zeros((len(x), used, weight.shape[1]), self.dtype)
        place = np.cumsum(routed != 0, axis=-1) - 1  # of each expert among its row's
        for expert in np.flatnonzero((routed != 0).any(axis=0)):
            rows = np.flatnonzero(routed[:, expert])
            some = x[rows] if x.ndim == 2 else x[rows, place[rows, expert]]
            out[rows, place[rows, expert]] = some @ weight[expert].T + (0 if bias is None else bias[expert])
        return out

    def mix(self, x: Array, routed: Array) -> Array:
        place = np.cumsum(routed != 0, axis=-1) - 1
        weights = np.zeros(x.shape[:2], self.dtype)
        rows, experts = np.nonzero(routed)
        weights[rows, place[rows, experts]] = routed[rows, experts]
        return np.asarray(np.add.reduce(weights[..., None] * x, axis=1))

    def add(self, a: Array, b: Array) -> Array:
        return np.asarray(a + b)

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays)
