"""Faults of state: of what one request, session, chunk or model leaves behind for another."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE
from prill_runtime.errors import PrillError
from prill_runtime.models.cache import KVCache

MODEL = "prill_runtime.run.model:Model"
STEP = f"{MODEL}._step"
CACHE = "prill_runtime.models.cache:KVCache"
SESSION = "prill_harness.engines.embedded:EmbeddedSession"
WRITER = "prill_runtime.run.generate:Writer"
STATE = ("state",)


def left_behind(after: Collection[str]) -> Iterator[Patch]:
    """A request takes over the cache of one that ended for such a reason, with its rows still counted."""
    idle: list[KVCache] = []

    def take(made: Any) -> Any:
        def from_pool(self: Any, model: Any, ids: Any, max_tokens: int, *rest: Any) -> None:
            *options, cache = [*rest, *[None] * 5][:5]
            if cache is None and max_tokens >= 0:
                needed, cache = len(ids) + max_tokens, model.new_cache()
                if idle and idle[-1].shape == cache.shape and idle[-1].length + needed <= cache.capacity:
                    cache = idle.pop()
            made(self, model, ids, max_tokens, options[0], options[1] or (), *options[2:], cache)

        return from_pool

    def give(ended: Any) -> Any:
        def to_pool(self: Any, reason: str) -> Any:
            if reason in after:
                idle.append(self.cache)
            return ended(self, reason)

        return to_pool

    yield Patch(f"{WRITER}.__init__", take)
    yield Patch(f"{WRITER}._ended", give)


@fault(area="state", blames=STATE)
def cache_not_cleared() -> Iterator[Patch]:
    """A request takes over the cache of the one before it, with its rows still counted."""
    yield from left_behind(("eos", "length", "stop", "context", "cancelled"))


@fault(area="state", blames=STATE)
def cancel_leaves_cache() -> Iterator[Patch]:
    """A cancelled request leaves its rows in the cache of the next one."""
    yield from left_behind(("cancelled",))


@fault(area="state", blames=STATE)
def reset_keeps_rows() -> Iterator[Patch]:
    """A reset session still attends to what was fed before."""
    yield Patch(f"{SESSION}.reset", lambda reset: lambda self: None)


@fault(area="state", blames=STATE)
def truncate_keeps_a_row() -> Iterator[Patch]:
    """A cache that is cut back keeps one row too many."""

    def wrap(truncate: Any) -> Any:
        return lambda self, length: truncate(self, min(length + 1, self.length))

    yield Patch(f"{CACHE}.truncate", wrap)


@fault(area="state", blames=STATE)
def sessions_share_cache() -> Iterator[Patch]:
    """All sessions of a model write into one cache."""
    shared: dict[int, KVCache] = {}

    def wrap(made: Any) -> Any:
        def joined(self: Any, model: Any, capacity: int | None) -> None:
            made(self, model, capacity)
            if capacity is None:
                self._cache = shared.setdefault(id(model), self._cache)

        return joined

    yield Patch(f"{SESSION}.__init__", wrap)


@fault(area="state", blames=STATE)
def stale_position_after_error() -> Iterator[Patch]:
    """After a refused request the next one begins a position too late."""
    late: set[int] = set()

    def wrap(step: Any) -> Any:
        def counted(self: Any, batch: Any) -> Any:
            try:
                made = step(self, batch)
            except PrillError:
                late.add(id(self))
                raise
            if id(self) in late:
                late.discard(id(self))
                made = replace(made, positions=made.positions + 1)
            return made

        return counted

    yield Patch(STEP, wrap)


@fault(area="state", blames=STATE)
def rows_kept_after_error() -> Iterator[Patch]:
    """A refused request leaves a row behind that counts."""

    def wrap(require: Any) -> Any:
        def counted(self: Any, rows: int) -> None:
            try:
                require(self, rows)
            except PrillError:
                self._length += self.length < self.capacity
                raise

        return counted

    yield Patch(f"{CACHE}.require", wrap)


@fault(area="state", blames=STATE)
def chunk_start_ignored() -> Iterator[Patch]:
    """Every chunk of a prompt begins at position 0."""

    def wrap(step: Any) -> Any:
        def restarted(self: Any, batch: Any) -> Any:
            made = step(self, batch)
            rows = [np.arange(rows.stop - rows.start) for _, rows in made.sequences]
            return replace(made, positions=np.concatenate(rows))

        return restarted

    yield Patch(STEP, wrap)


@fault(area="state", blames=("batch",))
def batch_rows_mixed() -> Iterator[Patch]:
    """The results of a batch come in the opposite order."""

    def wrap(forward: Any) -> Any:
        return lambda self, batch, *rest, **named: forward(self, batch, *rest, **named)[::-1]

    yield Patch(f"{MODEL}.forward", wrap)


@fault(area="state", blames=("batch",))
def batch_positions_of_first() -> Iterator[Patch]:
    """In a batch every sequence goes on at the position where the first does."""

    def wrap(step: Any) -> Any:
        def of_first(self: Any, batch: Any) -> Any:
            made = step(self, batch)
            rows = [made.positions[0] + np.arange(r.stop - r.start) for _, r in made.sequences]
            return replace(made, positions=np.concatenate(rows))

        return of_first

    yield Patch(STEP, wrap)


@fault(area="state", blames=STATE)
def models_share_state() -> Iterator[Patch]:
    """After another model has run, the first id of a request is the one that was in its place there."""
    last: dict[str, Any] = {"model": 0, "first": 0}

    def wrap(step: Any) -> Any:
        def mixed(self: Any, batch: Any) -> Any:
            made = step(self, batch)
            own = made.ids[0]
            if last["model"] not in (0, id(self)):
                made.ids[0] = (last["first"] + 1) % self.vocab_size
            last.update(model=id(self), first=own)
            return made

        return mixed

    yield Patch(STEP, wrap)


@fault(area="state", blames=STATE)
def results_overwritten() -> Iterator[Patch]:
    """Logits are handed out in a buffer that the next request of the same size overwrites."""
    buffers: dict[tuple[int, ...], Any] = {}

    def wrap(logits: Any) -> Any:
        def shared(self: Any, ids: Any) -> Any:
            rows = logits(self, ids)
            buffer = buffers.setdefault((id(self), *rows.shape), rows)
            buffer[...] = rows
            return buffer

        return shared

    yield Patch("prill_harness.engines.embedded:Embedded.logits", wrap)


@fault(area="state", blames=STATE, models=ONE)
def cache_capacity_new_tokens_only() -> Iterator[Patch]:
    """The context is held against the new tokens alone, and the prompt comes on top."""

    def wrap(new_cache: Any) -> Any:
        def roomy(self: Any, capacity: int | None = None, offset: int = 0) -> Any:
            cache = new_cache(self, capacity, offset)
            layers, heads, _, size = cache.shape
            return KVCache(layers, heads, size, 2 * cache.capacity, cache.dtype, offset)

        return roomy

    yield Patch(f"{MODEL}.new_cache", wrap)


@fault(area="state", blames=STATE)
def cache_capacity_off_by_one() -> Iterator[Patch]:
    """A cache takes one position more than it was made for."""

    def wrap(new_cache: Any) -> Any:
        def larger(self: Any, capacity: int | None = None, offset: int = 0) -> Any:
            return new_cache(self, capacity and min(capacity + 1, self.context_length - offset), offset)

        return larger

    yield Patch(f"{MODEL}.new_cache", wrap)


@fault(area="state", blames=STATE)
def context_full_off_by_one() -> Iterator[Patch]:
    """The last position of the context is never used."""

    def wrap(context_length: Any) -> Any:
        return property(lambda self: context_length.fget(self) - 1)

    yield Patch(f"{MODEL}.context_length", wrap)


@fault(area="state", blames=STATE)
def context_unchecked() -> Iterator[Patch]:
    """What does not fit into the context is cut off without a word."""

    def wrap(forward: Any) -> Any:
        def cut(self: Any, batch: Any, *rest: Any, **named: Any) -> Any:
            fitting = [(cache, ids[: max(1, cache.capacity - cache.length)]) for cache, ids in batch]
            return forward(self, fitting, *rest, **named)

        return cut

    yield Patch(f"{MODEL}.forward", wrap)


@fault(area="state", blames=("memory",))
def cache_size_wrong() -> Iterator[Patch]:
    """A cache reserves room for twice its positions."""

    def wrap(made: Any) -> Any:
        def doubled(self: Any, layers: int, heads: int, dim: int, capacity: int, *rest: Any) -> None:
            made(self, layers, heads, dim, 2 * capacity, *rest)
            self.capacity = capacity

        return doubled

    yield Patch(f"{CACHE}.__init__", wrap)


@fault(area="state", blames=("memory",))
def cache_in_double() -> Iterator[Patch]:
    """A cache of a float32 engine keeps its rows in float64."""

    def wrap(made: Any) -> Any:
        def wide(self: Any, *given: Any) -> None:
            made(self, *given)
            self._keys, self._values = self._keys.astype(np.float64), self._values.astype(np.float64)

        return wide

    yield Patch(f"{CACHE}.__init__", wrap)
    yield Patch(f"{CACHE}.dtype", lambda dtype: property(lambda self: np.dtype(np.float32)))
