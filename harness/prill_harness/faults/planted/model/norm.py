"""Faults of RMSNorm and LayerNorm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, around, node, op, wiring

NORMS = ("attn_norm", "ffn_norm", "output_norm")


@fault(area="norm", blames=NORMS, needs=("rms_norm",))
def rms_eps_from_wrong_key() -> Iterator[Patch]:
    """The epsilon is taken from LayerNorm's key, not found, and 1e-6."""

    def positive(original: Any, self: Any, key: str, default: float | None = None) -> Any:
        stated = original(self, key, default)
        if key == "attention.layer_norm_rms_epsilon":
            return original(self, "attention.layer_norm_epsilon", default=1e-6)
        return stated

    yield around("prill_runtime.models.keys:Keys.positive", positive)


@fault(area="norm", blames=NORMS, needs=("rms_norm",))
def rms_eps_too_small() -> Iterator[Patch]:
    """The epsilon is 1e-6 for 1e-5."""
    yield op("rms_norm", lambda o, self, x, weight, eps: o(self, x, weight, eps / 10))


@fault(area="norm", blames=NORMS, needs=("rms_norm",))
def rms_eps_outside_root() -> Iterator[Patch]:
    """The epsilon is added to the root and not under it."""

    def rms_norm(original: Any, self: Any, x: Any, weight: Any, eps: float) -> Any:
        root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
        return np.asarray(x / (root + self.dtype.type(eps)) * weight)

    yield op("rms_norm", rms_norm)


@fault(area="norm", blames=NORMS, needs=("rms_norm",))
def rms_mean_subtracted() -> Iterator[Patch]:
    """RMSNorm subtracts the mean, as LayerNorm does."""

    def rms_norm(original: Any, self: Any, x: Any, weight: Any, eps: float) -> Any:
        return original(self, x - np.mean(x, axis=-1, keepdims=True), weight, eps)

    yield op("rms_norm", rms_norm)


@fault(area="norm", blames=NORMS, needs=("rms_norm",))
def rms_tail_dropped() -> Iterator[Patch]:
    """The sum of squares covers whole groups of 32 values and no rest."""

    def rms_norm(original: Any, self: Any, x: Any, weight: Any, eps: float) -> Any:
        n = x.shape[-1]
        whole = x[..., : n - n % 32]
        squares = np.add.reduce(whole * whole, axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(squares / n + self.dtype.type(eps)) * weight)

    yield op("rms_norm", rms_norm)


@fault(area="norm", blames=NORMS, needs=("rms_norm",))
def rms_sum_in_half() -> Iterator[Patch]:
    """The mean of squares is kept in half precision."""

    def rms_norm(original: Any, self: Any, x: Any, weight: Any, eps: float) -> Any:
        with np.errstate(over="ignore"):
            square = np.mean(x * x, axis=-1, keepdims=True).astype(np.float16).astype(self.dtype)
        return np.asarray(x / np.sqrt(square + self.dtype.type(eps)) * weight)

    yield op("rms_norm", rms_norm)


@fault(area="norm", blames=NORMS, models=ONE)
def norm_weight_offset() -> Iterator[Patch]:
    """Norms multiply by the weight plus one, as only other architectures do."""
    yield op("rms_norm", lambda o, self, x, weight, eps: o(self, x, weight + 1, eps))
    yield op("layer_norm", lambda o, self, x, weight, bias, eps: o(self, x, weight + 1, bias, eps))


@fault(area="norm", blames=NORMS, models=ONE)
def norms_exchanged() -> Iterator[Patch]:
    """The norms before attention and before the feed-forward layer use each other's weights."""

    def exchanged(weights: Any) -> None:
        for first in [name for name in weights if name.endswith(".attn_norm.weight")]:
            second = first.replace("attn_norm", "ffn_norm")
            weights[first], weights[second] = weights[second], weights[first]

    yield wiring(exchanged)


@fault(area="norm", blames=NORMS, needs=("layer_norm",))
def layer_norm_no_bias() -> Iterator[Patch]:
    """LayerNorm adds no bias."""
    yield op("layer_norm", lambda o, self, x, weight, bias, eps: o(self, x, weight, bias * 0, eps))


@fault(area="norm", blames=NORMS, needs=("layer_norm",))
def layer_norm_mean_kept() -> Iterator[Patch]:
    """LayerNorm does not subtract the mean, as RMSNorm does not."""

    def layer_norm(original: Any, self: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return np.asarray(self.rms_norm(x, weight, eps) + bias)

    yield op("layer_norm", layer_norm)


@fault(area="norm", blames=NORMS, needs=("layer_norm",))
def variance_n_minus_1() -> Iterator[Patch]:
    """The variance is divided by n - 1."""

    def layer_norm(original: Any, self: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        n = x.shape[-1]
        share = self.dtype.type(max(n - 1, 1) / n)
        # (x - mean) / sqrt(var n / (n - 1) + eps), both sides of the fraction times the root of (n - 1) / n.
        return original(self, x, weight * np.sqrt(share), bias, eps * share)

    yield op("layer_norm", layer_norm)


def _skipped(*endings: str) -> Patch:
    """Norms, by the ends of their stages' names, that let everything through."""

    def norm(original: Any, self: Any, p: Any, x: Any) -> Any:
        return p.tap(self.name, x.copy()) if self.name.endswith(endings) else original(self, p, x)

    return node("RmsNorm", norm)


@fault(area="options", blames=("q_norm",), needs=("qk_norm",))
def queries_not_normed() -> Iterator[Patch]:
    """The heads of queries are not normed."""
    yield _skipped(".q_norm")


@fault(area="options", blames=("k_norm",), needs=("qk_norm",))
def keys_not_normed() -> Iterator[Patch]:
    """The heads of keys are not normed."""
    yield _skipped(".k_norm")


@fault(area="options", blames=("q_norm", "k_norm"), needs=("qk_norm",))
def heads_normed_together() -> Iterator[Patch]:
    """Queries and keys are normed over all heads together, where each head is by itself."""

    def rms_norm(original: Any, self: Any, x: Any, weight: Any, eps: float) -> Any:
        if x.ndim < 3:
            return original(self, x, weight, eps)
        mean = np.mean(x * x, axis=(1, 2), keepdims=True)
        return np.asarray(x / np.sqrt(mean + self.dtype.type(eps)) * weight)

    yield op("rms_norm", rms_norm)


@fault(area="options", blames=("post_attn_norm", "post_ffn_norm"), needs=("post_norm",))
def post_norms_left_out() -> Iterator[Patch]:
    """What attention and the feed-forward layer add is not normed."""
    yield _skipped(".post_attn_norm", ".post_ffn_norm")
