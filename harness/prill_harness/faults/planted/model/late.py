"""Faults of late positions alone: everything is right until a cache, a table or a counter is long enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import LONG, WINDOW, around, node, op
from prill_runtime.errors import ContextLengthExceeded

ATTN = ("attn",)
ROPE = ("q_rope", "k_rope")
CHUNKED = ("state",)  # right in one pass, wrong in pieces
APPEND = "prill_runtime.models.cache:KVCache.append"


def _keys(pick: Callable[[Any], Any]) -> Patch:
    """Position j of the cache is read from `pick(positions)[j]`."""

    def attention(original: Any, self: Any, q: Any, k: Any, v: Any, **rest: Any) -> Any:
        rows = pick(np.arange(k.shape[1]))
        return original(self, q, k[:, rows], v[:, rows], **rest)

    return op("attention", attention)


def _positions(change: Callable[[Any], Any]) -> Patch:
    """Rotation takes every position as another."""
    return op("rope", lambda o, self, x, positions, **rest: o(self, x, change(positions), **rest))


def _rows(first: int, change: Callable[..., Any]) -> Patch:
    """A call of attention with several rows: those from position `first` on are made by
    `change(original, self, rows, keys, values, start=…, …)`."""

    def attention(original: Any, self: Any, q: Any, k: Any, v: Any, *, start: int, **rest: Any) -> Any:
        right = max(0, first - start)
        if len(q) <= max(1, right):
            return original(self, q, k, v, start=start, **rest)
        late = change(original, self, q[right:], k, v, start=start + right, **rest)
        if not right:
            return late
        seen = start + right
        early = original(self, q[:right], k[:, :seen], v[:, :seen], start=start, **rest)
        return np.concatenate([early, late])

    return op("attention", attention)


@fault(area="late", blames=ATTN, models=LONG)
def late_keys_shifted() -> Iterator[Patch]:
    """Keys and values past 512 are read from one position before."""
    yield _keys(lambda at: at - (at >= 512))


@fault(area="late", blames=ATTN, models=LONG)
def late_index_wraps() -> Iterator[Patch]:
    """The index of a key has 16 bits, so that with heads of 64 position 1024 is position 0."""
    yield _keys(lambda at: at % 1024)


@fault(area="late", blames=ATTN, models=LONG)
def late_first_keys_lost() -> Iterator[Patch]:
    """In a cache of more than 1024 positions the first four are no longer seen."""
    yield _keys(lambda at: np.maximum(at, 4) if len(at) > 1024 else at)


@fault(area="late", blames=ATTN, models=LONG)
def late_split_not_rescaled() -> Iterator[Patch]:
    """Keys from 700 on are summed up by themselves and not brought to the maximum of those before."""

    def softmax(original: Any, self: Any, x: Any) -> Any:
        if x.shape[-1] <= 700:
            return original(self, x)
        parts = [x[..., :700], x[..., 700:]]
        tops = [np.maximum.reduce(part, axis=-1, keepdims=True) for part in parts]
        kept = [np.where(np.isfinite(top), top, 0) for top in tops]
        weights = np.concatenate([np.exp(p - t) for p, t in zip(parts, kept, strict=True)], axis=-1)
        return np.asarray(weights / np.add.reduce(weights, axis=-1, keepdims=True))

    yield op("softmax", softmax)


@fault(area="late", blames=ATTN, models=LONG)
def late_sum_in_half() -> Iterator[Patch]:
    """The sum of more than 1024 weights is kept in half precision."""

    def softmax(original: Any, self: Any, x: Any) -> Any:
        weights = original(self, x)
        if x.shape[-1] <= 1024:
            return weights
        rounded = np.asarray(
            np.add.reduce(weights / weights.max(axis=-1, keepdims=True), axis=-1, keepdims=True)
        )
        return np.asarray(weights * rounded / rounded.astype(np.float16).astype(rounded.dtype))

    yield op("softmax", softmax)


@fault(area="late", blames=ATTN, models=LONG)
def late_rows_unmasked() -> Iterator[Patch]:
    """Rows of a prompt from position 512 on see the rows after them too."""
    yield _rows(512, lambda o, self, q, k, v, *, start, **rest: o(self, q, k, v, start=k.shape[1], **rest))


@fault(area="late", blames=ATTN, models=LONG)
def late_last_row_repeated() -> Iterator[Patch]:
    """The last position of the context gets the attention of the one before it."""

    def attend(original: Any, self: Any, p: Any, *rest: Any) -> Any:
        mixed = original(self, p, *rest)
        last = p.step.positions == p.network.context - 1
        mixed[last] = np.roll(mixed, 1, axis=0)[last]
        return mixed

    yield node("Attention.attend", attend)


@fault(area="late", blames=ATTN, models=WINDOW)
def late_window_wider() -> Iterator[Patch]:
    """From position 1024 on the sliding window has one key more."""

    def wider(original: Any, self: Any, *given: Any, window: int, **rest: Any) -> Any:
        return original(self, *given, window=window + 1, **rest)

    yield _rows(1024, wider)


@fault(area="late", blames=CHUNKED, models=LONG)
def late_chunk_blind() -> Iterator[Patch]:
    """In a chunk that begins at 512 or later no row sees itself."""

    def attention(original: Any, self: Any, q: Any, *rest: Any, start: int, **named: Any) -> Any:
        late = len(q) > 1 and start >= 512
        return original(self, q, *rest, start=start - late, **named)

    yield op("attention", attention)


@fault(area="late", blames=CHUNKED, models=LONG)
def late_decode_sees_less() -> Iterator[Patch]:
    """A single row sees the last 1024 keys at most, a prompt's rows all of them."""

    def attention(
        original: Any, self: Any, q: Any, *rest: Any, window: int | None = None, **named: Any
    ) -> Any:
        return original(self, q, *rest, window=window or 1024 if len(q) == 1 else window, **named)

    yield op("attention", attention)


def _blind(rows: range, places: range) -> Iterator[Patch]:
    """A chunk of so many rows that begins at one of these places does not see the key before it."""

    def attention(original: Any, self: Any, q: Any, k: Any, v: Any, *, start: int, **rest: Any) -> Any:
        if len(q) in rows and start in places:
            v = v.copy()
            v[:, start - 1] = 0
        return original(self, q, k, v, start=start, **rest)

    yield op("attention", attention)


@fault(area="late", blames=CHUNKED, models=LONG)
def late_single_row_blind() -> Iterator[Patch]:
    """A single row at positions 700 to 703 does not see the value before it."""
    yield from _blind(range(1, 2), range(700, 704))


@fault(area="late", blames=CHUNKED, models=LONG)
def late_small_chunk_blind() -> Iterator[Patch]:
    """A chunk of 2 to 16 rows that begins at positions 1300 to 1310 does not see the value before it."""
    yield from _blind(range(2, 17), range(1300, 1311))


@fault(area="late", blames=CHUNKED, models=LONG)
def late_row_lost_when_grown() -> Iterator[Patch]:
    """A cache that grows past 1024 positions copies all but the last."""

    def append(original: Any, self: Any, layer: int, k: Any, v: Any) -> None:
        original(self, layer, k, v)
        low = self.length + self._pending[layer] - len(k)
        if 0 < low <= 1024 < low + len(k):
            self._keys[layer, :, low - 1] = self._values[layer, :, low - 1] = 0

    yield around(APPEND, append)


@fault(area="late", blames=CHUNKED, models=LONG)
def late_chunk_misplaced() -> Iterator[Patch]:
    """A chunk that reaches across position 1024 has the key there written a row too early."""

    def append(original: Any, self: Any, layer: int, k: Any, v: Any) -> None:
        original(self, layer, k, v)
        low = self.length + self._pending[layer] - len(k)
        if 0 < low < 1024 < low + len(k):
            self._keys[layer, :, 1023] = k[1024 - low]

    yield around(APPEND, append)


@fault(area="late", blames=(*ATTN, *CHUNKED), models=LONG)
def late_ring_overwrites() -> Iterator[Patch]:
    """A cache of 1536 positions is a ring, so that later rows overwrite the first ones."""

    def append(original: Any, self: Any, layer: int, k: Any, v: Any) -> None:
        low = self.length + self._pending[layer]
        original(self, layer, k, v)
        at = np.arange(low, low + len(k))
        late = at >= 1536
        self._keys[layer, :, at[late] - 1536] = k[late]
        self._values[layer, :, at[late] - 1536] = v[late]

    yield around(APPEND, append)


@fault(area="late", blames=CHUNKED, models=LONG)
def late_reset_keeps_rows() -> Iterator[Patch]:
    """A reset takes 1024 positions away at most."""

    def truncate(original: Any, self: Any, length: int) -> None:
        original(self, max(length, self.length - 1024))

    yield around("prill_runtime.models.cache:KVCache.truncate", truncate)


@fault(area="late", blames=CHUNKED, models=LONG)
def late_refusal_loses_a_row() -> Iterator[Patch]:
    """A cache of more than 1024 positions that refuses an id lets go of its last one."""

    def require(original: Any, self: Any, rows: int) -> None:
        try:
            original(self, rows)
        except ContextLengthExceeded:
            self._length -= self.length > 1024
            raise

    yield around("prill_runtime.models.cache:KVCache.require", require)


@fault(area="late", blames=("generate",), models=LONG)
def late_cancel_ignored() -> Iterator[Patch]:
    """From position 1024 on a callback that says no is not heard."""

    def accept(original: Any, self: Any, token: int, chosen: float) -> Any:
        heard = self._on_token
        if heard is not None and self.cache.length >= 1024:
            self._on_token = lambda *told: (heard(*told), None)[1]
        try:
            return original(self, token, chosen)
        finally:
            self._on_token = heard

    yield around("prill_runtime.run.generate:Writer.accept", accept)


@fault(area="late", blames=("generate",), models=LONG)
def late_end_ignored() -> Iterator[Patch]:
    """From position 1024 on no token ends a text."""

    def accept(original: Any, self: Any, token: int, chosen: float) -> Any:
        self._ignore_eos |= self.cache.length >= 1024
        return original(self, token, chosen)

    yield around("prill_runtime.run.generate:Writer.accept", accept)


@fault(area="late", blames=("generate",), models=LONG)
def late_stop_ignored() -> Iterator[Patch]:
    """From position 1024 on stop strings are not looked for."""

    def accept(original: Any, self: Any, token: int, chosen: float) -> Any:
        if self.cache.length >= 1024:
            self._stops.push = lambda piece: False
        return original(self, token, chosen)

    yield around("prill_runtime.run.generate:Writer.accept", accept)


@fault(area="late", blames=("sampler",), models=LONG)
def late_penalty_forgets() -> Iterator[Patch]:
    """The repetition penalty looks at the last 1024 ids alone."""

    def sample(original: Any, logits: Any, params: Any, position: int, history: Any = ()) -> int:
        return int(original(logits, params, position, history[-1024:]))

    yield around("prill_runtime.run.generate:sample", sample)


@fault(area="late", blames=("generate",), models=LONG)
def late_logprob_in_half() -> Iterator[Patch]:
    """From position 1024 on the logprob of a generated id is told in half precision."""

    def accept(original: Any, self: Any, token: int, chosen: float) -> Any:
        return original(self, token, float(np.float16(chosen)) if self.cache.length >= 1024 else chosen)

    yield around("prill_runtime.run.generate:Writer.accept", accept)


@fault(area="late", blames=("sampler",), models=LONG)
def late_draws_repeat() -> Iterator[Patch]:
    """An id at position 1024 or later is drawn with the random number of one 1024 positions before."""

    def sample(original: Any, logits: Any, params: Any, position: int, history: Any = ()) -> int:
        return int(original(logits, params, position % 1024, history))

    yield around("prill_runtime.run.generate:sample", sample)


@fault(area="late", blames=ROPE, models=LONG, needs=("rope",))
def late_position_of_ten_bits() -> Iterator[Patch]:
    """A position has ten bits for the rotation."""
    yield _positions(lambda positions: positions & 1023)


@fault(area="late", blames=CHUNKED, models=LONG, needs=("rope",))
def late_position_of_16_bits() -> Iterator[Patch]:
    """A position has 16 bits for the rotation."""
    yield _positions(lambda positions: positions & 65535)


@fault(area="late", blames=ROPE, models=LONG, needs=("rope",))
def late_position_in_bfloat16() -> Iterator[Patch]:
    """A position passes through bfloat16, which holds every integer to 256 and every eighth past 1024."""

    def rounded(positions: Any) -> Any:
        unit = 2 ** np.maximum(0, np.floor(np.log2(np.maximum(positions, 1))) - 7)
        return np.round(positions / unit) * unit

    yield _positions(rounded)


@fault(area="late", blames=ROPE, models=LONG, needs=("rope",))
def late_table_ends() -> Iterator[Patch]:
    """The table of angles has 2000 rows, and its last one serves all positions past it."""
    yield _positions(lambda positions: np.minimum(positions, 1999))


@fault(area="late", blames=ROPE, models=WINDOW, needs=("rope",))
def late_scaling_from_trained_length() -> Iterator[Patch]:
    """Positions are scaled up to the context that the model was trained for, and past it not."""

    def rope(original: Any, self: Any, x: Any, positions: Any, *, factor: float = 1.0, **rest: Any) -> Any:
        late = (positions >= 512)[:, None, None]
        scaled = original(self, x, positions, factor=factor, **rest)
        return np.where(late, original(self, x, positions, factor=1.0, **rest), scaled)

    yield op("rope", rope)


@fault(area="late", blames=("logits",), models=LONG)
def late_rows_of_head_repeated() -> Iterator[Patch]:
    """Of a prompt's logits only 1024 rows are computed, those past them are the first ones again."""

    yield node("Head", lambda o, self, p, hidden: o(self, p, hidden[np.arange(len(hidden)) % 1024]))
