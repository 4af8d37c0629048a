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
from prill_runtime.ops.protocol import Array, Backend, Ids, RopeLayout
from prill_runtime.quants.layouts import dequantize

Precision = Literal["float32", "float64"]

# Scores of more query rows than this are never held at once, so a long prompt needs no square matrix; and a
# block of rows reads only the keys that one of them sees.
QUERY_ROWS = 64


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
        y = x @ weight.T
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
    ) -> Array:
        angles = self.angles(positions, base, dim, factor, freq_factors)[:, None]
        cos, sin = np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype)
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
        self, positions: Ids, base: float, dim: int, factor: float, freq_factors: Array | None
    ) -> Array:
        """Rotary angles (row, pair) of positions (row,), in radians."""
        return np.asarray(positions[:, None] * rotary.frequencies(base, dim, factor, freq_factors))

    def softmax(self, x: Array) -> Array:
        with np.errstate(invalid="ignore"):
            weights = np.asarray(x - np.maximum.reduce(x, axis=-1, keepdims=True))
        np.exp(weights, out=weights)
        weights /= np.add.reduce(weights, axis=-1, keepdims=True)
        return weights

    def attention(
        self, q: Array, k: Array, v: Array, *, start: int, scale: float, window: int | None = None
    ) -> Array:
        rows, heads, head_dim = q.shape
        kv_heads, length, _ = k.shape
        group = heads // kv_heads
        blocked = q.reshape(rows, kv_heads, group, head_dim).transpose(1, 2, 0, 3)  # (kv, group, row, dim)
        out = np.empty((rows, kv_heads, group, head_dim), self.dtype)
        for low in range(0, rows, QUERY_ROWS):
            high = min(low + QUERY_ROWS, rows)
            last = min(start + high, length)
            first = 0 if window is None else max(0, min(start + low - window + 1, last - 1))
            block = blocked[:, :, low:high].reshape(kv_heads, group * (high - low), head_dim)
            scores = (block * self.dtype.type(scale)) @ k[:, first:last].transpose(0, 2, 1)
            if high - low > 1:  # one row sees every key that is left
                query, key = np.arange(start + low, start + high)[:, None], np.arange(first, last)
                hidden = key > query
                if window is not None:
                    hidden |= key <= query - window
                np.copyto(scores.reshape(kv_heads, group, high - low, -1), -np.inf, where=hidden)
            weights = self.softmax(scores)
            mixed = (weights @ v[:, first:last]).reshape(kv_heads, group, high - low, head_dim)
            out[low:high] = mixed.transpose(2, 0, 1, 3)
        return out.reshape(rows, heads * head_dim)

    def swiglu(self, gate: Array, up: Array) -> Array:
        with np.errstate(over="ignore"):
            weight = np.exp(-gate)
        weight += 1
        return np.asarray(gate / weight * up)

    def gelu_tanh(self, x: Array) -> Array:
        # (1 + tanh u) / 2 is 1 / (1 + exp -2u): NumPy's exp takes a fraction of its tanh's time.
        with np.errstate(over="ignore"):
            weight = np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))
        weight += 1
        return np.asarray(x / weight)

    def add(self, a: Array, b: Array) -> Array:
        return np.asarray(a + b)

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays)
