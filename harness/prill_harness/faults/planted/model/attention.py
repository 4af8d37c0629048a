"""Faults of attention: its scale, heads, masks and softmax, and the cache it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, around, node, op, option, wiring

ATTN = ("attn",)


@fault(area="attention", blames=ATTN, models=ONE)
def attention_scale_1_over_d() -> Iterator[Patch]:
    """Scores are scaled by 1/d where it is 1/sqrt(d)."""
    yield op("attention", lambda o, self, *a, scale, **rest: o(self, *a, scale=scale**2, **rest))


@fault(area="attention", blames=ATTN, models=ONE)
def attention_not_scaled() -> Iterator[Patch]:
    """Scores are not scaled."""
    yield op("attention", lambda o, self, *a, scale, **rest: o(self, *a, scale=1.0, **rest))


def _reading(pick: Callable[[int, int], Any]) -> Patch:
    """Query head h reads cache head `pick(heads, cache heads)[h]`."""

    def attention(original: Any, self: Any, q: Any, k: Any, v: Any, **rest: Any) -> Any:
        heads = pick(q.shape[1], k.shape[0])
        return original(self, q, k[heads], v[heads], **rest)

    return op("attention", attention)


@fault(area="attention", blames=ATTN, needs=("gqa",))
def gqa_interleaved() -> Iterator[Patch]:
    """Query heads are dealt to the cache heads in turn, where each cache head has a block of them."""
    yield _reading(lambda heads, kv_heads: np.arange(heads) % kv_heads)


@fault(area="attention", blames=ATTN, needs=("gqa",))
def kv_heads_ignored() -> Iterator[Patch]:
    """Every query head reads the first cache head."""
    yield _reading(lambda heads, kv_heads: np.zeros(heads, int))


@fault(area="attention", blames=ATTN, models=ONE)
def mask_off_by_one() -> Iterator[Patch]:
    """A token sees the next one."""
    yield op("attention", lambda o, self, *a, start, **rest: o(self, *a, start=start + 1, **rest))


@fault(area="attention", blames=ATTN, models=ONE)
def mask_missing() -> Iterator[Patch]:
    """A token sees everything that is in the cache."""

    def attention(original: Any, self: Any, q: Any, k: Any, v: Any, *, start: int, **rest: Any) -> Any:
        return original(self, q, k, v, start=k.shape[1], **rest)

    yield op("attention", attention)


@fault(area="attention", blames=ATTN, models=ONE)
def mask_restarts_at_tile() -> Iterator[Patch]:
    """Rows past the 256th of a call see the keys of the first 256 rows."""

    def attention(original: Any, self: Any, q: Any, *rest: Any, **named: Any) -> Any:
        tiles = [tile for tile in (q[:256], q[256:]) if len(tile)]
        return self.concatenate([original(self, tile, *rest, **named) for tile in tiles])

    yield op("attention", attention)


@fault(area="attention", blames=ATTN, models=ONE)
def window_off_by_one() -> Iterator[Patch]:
    """The sliding window is one key too narrow."""

    def attention(original: Any, self: Any, *arguments: Any, window: int | None = None, **rest: Any) -> Any:
        return original(self, *arguments, window=window and window - 1, **rest)

    yield op("attention", attention)


@fault(area="attention", blames=ATTN, models=ONE)
def window_ignored_in_decoding() -> Iterator[Patch]:
    """A single row sees every key, whatever the window; the rows of a prompt see theirs."""

    def attention(
        original: Any, self: Any, q: Any, *rest: Any, window: int | None = None, **named: Any
    ) -> Any:
        return original(self, q, *rest, window=window if len(q) > 1 else None, **named)

    yield op("attention", attention)


@fault(area="attention", blames=ATTN, models=ONE)
def softmax_no_max() -> Iterator[Patch]:
    """The softmax does not subtract the maximum."""

    def softmax(original: Any, self: Any, x: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore"):
            weights = np.exp(x)
            return np.asarray(weights / np.add.reduce(weights, axis=-1, keepdims=True))

    yield op("softmax", softmax)


@fault(area="attention", blames=ATTN, models=ONE)
def softmax_truncated() -> Iterator[Patch]:
    """The softmax sums up its first 65536 values alone."""

    def softmax(original: Any, self: Any, x: Any) -> Any:
        weights = original(self, x)
        return np.asarray(weights / np.add.reduce(weights[..., :65536], axis=-1, keepdims=True))

    yield op("softmax", softmax)


@fault(area="attention", blames=ATTN, models=ONE)
def softmax_with_sink() -> Iterator[Patch]:
    """A sink of score 0 takes its share of the softmax."""

    def softmax(original: Any, self: Any, x: Any) -> Any:
        return original(self, np.concatenate([x, np.zeros_like(x[..., :1])], axis=-1))[..., :-1].copy()

    yield op("softmax", softmax)


@fault(area="attention", blames=ATTN, models=ONE)
def heads_written_interleaved() -> Iterator[Patch]:
    """The result has the heads' first components first, where it has whole heads."""

    def attention(original: Any, self: Any, q: Any, *rest: Any, **named: Any) -> Any:
        return original(self, q, *rest, **named).reshape(q.shape).swapaxes(1, 2).reshape(len(q), -1)

    yield op("attention", attention)


@fault(area="attention", blames=("q",), lacks=("fused_qkv",))
def square_matrix_transposed() -> Iterator[Patch]:
    """The query matrix, which is square here, is used transposed."""

    def transposed(weights: Any) -> None:
        for name in weights:
            if name.endswith("attn_q.weight"):
                weights[name] = np.ascontiguousarray(weights[name].T)

    yield wiring(transposed)


@fault(area="attention", blames=("k", "v"), lacks=("fused_qkv",))
def keys_and_values_exchanged() -> Iterator[Patch]:
    """Keys are made with the matrix of the values, and values with that of the keys."""

    def exchanged(weights: Any) -> None:
        for key in [name for name in weights if name.endswith("attn_k.weight")]:
            value = key.replace("attn_k", "attn_v")
            weights[key], weights[value] = weights[value], weights[key]

    yield wiring(exchanged)


@fault(area="attention", blames=ATTN, models=ONE)
def cache_evicts() -> Iterator[Patch]:
    """The cache forgets what lies more than 128 positions back."""

    yield node("Attention.attend", lambda o, self, *rest: o(replace(self, window=128), *rest))


@fault(area="attention", blames=("attn", "state"), models=ONE)
def cache_last_row_not_written() -> Iterator[Patch]:
    """The last of the rows appended to a cache is not written."""

    def append(original: Any, self: Any, layer: int, k: Any, v: Any) -> None:
        original(self, layer, k, v)
        last = self.length + self._pending[layer] - 1
        self._keys[layer, :, last] = self._values[layer, :, last] = 0

    yield around("prill_runtime.models.cache:KVCache.append", append)


@fault(area="attention", blames=("attn", "state"), models=ONE)
def cache_rows_overwritten() -> Iterator[Patch]:
    """New rows overwrite the last row that was there."""

    def append(original: Any, self: Any, layer: int, k: Any, v: Any) -> None:
        low = self.length + self._pending[layer]
        original(self, layer, k, v)
        if low:
            self._keys[layer, :, low - 1] = k[0]
            self._values[layer, :, low - 1] = v[0]

    yield around("prill_runtime.models.cache:KVCache.append", append)


@fault(area="attention", blames=("batch",), models=ONE)
def batch_keys_of_neighbour() -> Iterator[Patch]:
    """With more than eight sequences in a step, every row's key is that of the row before it."""

    def attend(original: Any, self: Any, p: Any, q: Any, k: Any, v: Any) -> Any:
        k = np.roll(k, 1, axis=0) if len(p.step.sequences) > 8 else k
        return original(self, p, q, k, v)

    yield node("Attention.attend", attend)


@fault(area="options", blames=ATTN, needs=("sinks",))
def sinks_left_out() -> Iterator[Patch]:
    """Sinks take no part of the softmax."""
    yield op("attention", lambda o, self, *given, sinks=None, **how: o(self, *given, **how))


@fault(area="options", blames=ATTN, needs=("sinks",))
def one_sink_a_layer() -> Iterator[Patch]:
    """The sink of the first head is every head's."""
    yield option("attention", sinks=lambda sinks: np.full_like(sinks, sinks[0]))


@fault(area="options", blames=ATTN, needs=("sinks",))
def sinks_scaled() -> Iterator[Patch]:
    """Sinks are scaled as scores are."""

    def attention(original: Any, self: Any, *given: Any, scale: float, sinks: Any = None, **how: Any) -> Any:
        if sinks is not None:
            how["sinks"] = sinks * sinks.dtype.type(scale)
        return original(self, *given, scale=scale, **how)

    yield op("attention", attention)


@fault(area="options", blames=ATTN, needs=("window", "sinks"))
def window_in_other_layers() -> Iterator[Patch]:
    """Layers that see all have the window of the others, which see all."""

    def attend(original: Any, self: Any, p: Any, *given: Any) -> Any:
        windows = filter(None, (layer.attention.window for layer in p.network.layers))
        return original(replace(self, window=None if self.window else next(windows)), p, *given)

    yield node("Attention.attend", attend)


@fault(area="options", blames=ATTN, needs=("sinks",))
def head_size_from_width() -> Iterator[Patch]:
    """Scores are scaled for heads that share the width, where the file gives heads a size of their own."""

    def attend(original: Any, self: Any, *given: Any) -> Any:
        return original(replace(self, scale=(self.norm.width / self.heads) ** -0.5), *given)

    yield node("Attention.attend", attend)


@fault(area="options", blames=ATTN, needs=("softcap",))
def scores_not_capped() -> Iterator[Patch]:
    """Scores are not held within their cap."""
    yield op("attention", lambda o, self, *given, softcap=None, **how: o(self, *given, **how))


@fault(area="options", blames=ATTN, models=ONE)
def late_queries_not_sharpened() -> Iterator[Patch]:
    """Queries beyond the original length are as they were before it."""
    yield op("temper", lambda o, self, x, *given, **how: x.copy())
