"""The NumPy ops with activations rounded as half-precision or integer engines do: a lane's noise floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from prill_runtime.errors import InvalidParameter
from prill_runtime.ops.numpy import NumpyBackend, Precision
from prill_runtime.ops.protocol import Array, Ids

Activations = Literal["exact", "single", "f16", "bf16", "q8_0", "q8_k"]
Rounding = Callable[[Array], Array]


def exact(x: Array) -> Array:
    """x itself."""
    return x


def f16(x: Array) -> Array:
    """x rounded to IEEE half precision; beyond ±65504 it becomes infinite, as in an engine."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(x.dtype)


def bf16(x: Array) -> Array:
    """x rounded to bfloat16: the upper half of a float32, ties to even."""
    single = np.ascontiguousarray(x, np.float32)
    bits = single.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(single), rounded, single).astype(x.dtype)


def _blocks(x: Array, size: int) -> Array:
    """x as (row, block, size) in float32, the last block of a row filled up with zeros."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float32)
    return np.pad(rows, ((0, 0), (0, -x.shape[-1] % size))).reshape(len(rows), -1, size)


def _unblocked(blocks: Array, like: Array) -> Array:
    return blocks.reshape(len(blocks), -1)[:, : like.shape[-1]].reshape(like.shape).astype(like.dtype)


def q8_0(x: Array) -> Array:
    """x through blocks of 32 int8 with a half-precision scale max|x|/127, ties away from zero (ggml Q8_0)."""
    blocks = _blocks(x, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    ratio = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)
    quants = np.trunc(ratio + np.copysign(np.float32(0.5), ratio))
    return _unblocked(quants * f16(scale), x)


def q8_k(x: Array) -> Array:
    """x through blocks of 256 int8 with a float32 scale that maps the largest value to −127 (ggml Q8_K)."""
    blocks = _blocks(x, 256)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    scale = largest / np.float32(-127)
    ratio = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)
    return _unblocked(np.minimum(np.rint(ratio), np.float32(127)) * scale, x)


def single(draw: int = 0, alike: bool = False) -> Rounding:
    """x as single precision might have left it: every value moved at random by up to 2^-22 of itself.

    Monte Carlo arithmetic (Parker 1997): in float64 it shows what rounding does to a result without taking a
    step in float32, so it shares no mistake with an engine that computes there. Four units in the last place,
    for a sum rounds as often as it has terms: the noise of NumPy's float32 was 0.01 to 2.5 times this
    in the stages of 26 models.

    Args:
        draw: another one moves every value otherwise.
        alike: every row is moved as the others are, for arithmetic rounds equal rows equally: their mean
            keeps that error, where errors drawn anew for each row cancel in it.
    """
    random = np.random.default_rng(draw)

    def moved(x: Array) -> Array:
        shape = x.shape[-1:] if alike else x.shape
        return np.asarray(x * (1 + 2.0**-22 * random.uniform(-1, 1, shape)), x.dtype)

    return moved


# What is rounded: the activations that enter a linear, and the result of every op. Engines that compute in
# integers quantise the input of each matrix product alone; engines that store halves round everything.
ROUNDING: dict[str, tuple[Rounding, Rounding]] = {
    "exact": (exact, exact),
    "f16": (f16, f16),
    "bf16": (bf16, bf16),
    "q8_0": (q8_0, exact),
    "q8_k": (q8_k, exact),
}


class RoundedBackend(NumpyBackend):
    """NumpyBackend whose activations have the precision of a type lane; the weights stay as they are.

    Raises:
        InvalidParameter: an unknown kind of activations, or an unknown dtype.
    """

    def __init__(self, dtype: Precision, activations: Activations) -> None:
        super().__init__(dtype)
        if activations not in (*ROUNDING, "single"):
            raise InvalidParameter(
                "unknown activation type",
                where="activations",
                expected=" or ".join((*ROUNDING, "single")),
                got=repr(activations),
            )
        self.name = f"{self.name}, {activations} activations"
        moved = single() if activations == "single" else exact
        self.entering, self.leaving = ROUNDING.get(activations, (moved, moved))

    def embed(self, table: Array, ids: Ids) -> Array:
        return self.leaving(super().embed(table, ids))

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return self.leaving(super().rms_norm(x, weight, eps))

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return self.leaving(super().layer_norm(x, weight, bias, eps))

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        return self.leaving(super().linear(self.entering(x), weight, bias))

    def rope(self, x: Array, positions: Ids, **settings: Any) -> Array:
        return self.leaving(super().rope(x, positions, **settings))

    def temper(self, x: Array, positions: Ids, **settings: Any) -> Array:
        return self.leaving(super().temper(x, positions, **settings))

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
        mixed = super().attention(
            q, k, v, start=start, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
        return self.leaving(mixed)

    def softmax(self, x: Array) -> Array:
        return self.leaving(super().softmax(x))

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self.leaving(super().swiglu(gate, up))

    def swiglu_clamped(self, gate: Array, up: Array, **settings: float) -> Array:
        return self.leaving(super().swiglu_clamped(gate, up, **settings))

    def geglu(self, gate: Array, up: Array) -> Array:
        return self.leaving(super().geglu(gate, up))

    def gelu_tanh(self, x: Array) -> Array:
        return self.leaving(super().gelu_tanh(x))

    def add(self, a: Array, b: Array) -> Array:
        return self.leaving(super().add(a, b))

    def gelu_erf(self, x: Array) -> Array:
        return self.leaving(super().gelu_erf(x))

    def scale(self, x: Array, by: float) -> Array:
        return self.leaving(super().scale(x, by))

    def softcap(self, x: Array, cap: float) -> Array:
        return self.leaving(super().softcap(x, cap))

    def route(self, logits: Array, **settings: Any) -> Array:
        return self.leaving(super().route(logits, **settings))

    def expert_linear(self, x: Array, weight: Array, routed: Array, **settings: Any) -> Array:
        return self.leaving(super().expert_linear(self.entering(x), weight, routed, **settings))

    def mix(self, x: Array, routed: Array) -> Array:
        return self.leaving(super().mix(x, routed))
