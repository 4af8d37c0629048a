"""Ways to get causal grouped-query attention wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prill_harness.stages.hypotheses.case import Array, Case, Guess, hypothesis, wrong_rows
from prill_runtime.models.nodes.attention import Attention

Mask = NDArray[np.bool_]
LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)


@dataclass(frozen=True)
class Right:
    """The right computation, each part of which can be exchanged.

    Attributes:
        q: (token, head, dim); k, v: (token, kv head, dim).
        window: keys that a token sees, its own included; 0 is all of them.
        scale: of the scores.
    """

    q: Array
    k: Array
    v: Array
    window: int
    scale: float

    @classmethod
    def of(cls, case: Case, node: Attention) -> Right:
        q, k, v = case.inputs
        return cls(q, k, v, window=node.window or 0, scale=node.scale)

    @cached_property
    def distance(self) -> NDArray[np.intp]:
        """(token, token): how far the column's token lies before the row's."""
        row, column = np.indices((len(self.q), len(self.q)))
        return np.asarray(row - column)

    @cached_property
    def mask(self) -> Mask:
        """(token, token): whether the row's token sees the column's."""
        return self.seen(self.window)

    def seen(self, window: int) -> Mask:
        """The causal mask with a window; 0 is none."""
        near = self.distance < (window or len(self.q))
        return np.asarray((self.distance >= 0) & near)

    @property
    def blocked(self) -> NDArray[np.intp]:
        """(head,) the kv head that each query head reads."""
        heads, kv = self.q.shape[1], self.k.shape[1]
        return np.asarray(np.arange(heads) // (heads // kv))

    def __call__(
        self,
        *,
        scale: float | None = None,
        sees: Mask | None = None,
        heads: NDArray[np.intp] | None = None,
        k: Array | None = None,
        v: Array | None = None,
        sink: bool = False,
        stabilised: bool = True,
    ) -> Array:
        """softmax(q k^T scale) v under a mask: (token, head * dim). A token that sees nothing gets zeros."""
        scale = self.scale if scale is None else scale
        heads = self.blocked if heads is None else heads
        keys = (self.k if k is None else k)[:, heads].transpose(1, 2, 0)  # (head, dim, token)
        values = (self.v if v is None else v)[:, heads].transpose(1, 0, 2)  # (head, token, dim)
        scores = self.q.transpose(1, 0, 2) @ keys * scale  # (head, token, token)
        scores = np.where(self.mask if sees is None else sees, scores, -np.inf)
        most = scores.max(axis=-1, keepdims=True) if stabilised else np.zeros((1, 1, 1))
        most = np.where(np.isfinite(most), most, 0.0)
        weights = np.exp(scores - most)
        total = weights.sum(axis=-1, keepdims=True) + (np.exp(-most) if sink else 0.0)
        weights = weights / np.where(total == 0, 1.0, total)
        return np.asarray((weights @ values).transpose(1, 0, 2).reshape(len(self.q), -1))


@hypothesis(Attention)
def arithmetic(case: Case, node: Attention) -> Iterator[Guess]:
    """The scale, the heads, the operands, the softmax."""
    right = Right.of(case, node)
    _, heads, dim = right.q.shape
    kv = right.k.shape[1]
    own = "1/sqrt(d)" if node.scale == dim**-0.5 else f"{node.scale:g}"
    yield f"scale {own}, heads and window as the file states, where the oracle's differ", right()
    yield f"scores scaled by 1/d instead of {own}", right(scale=1 / dim)
    yield "scores not scaled", right(scale=1.0)
    yield f"scores scaled by sqrt(d) instead of {own}", right(scale=dim**0.5)
    yield f"scores scaled by {own} twice", right(scale=node.scale**2)
    if node.scale != dim**-0.5:
        yield f"scores scaled by 1/sqrt(d) instead of {own}", right(scale=dim**-0.5)
    yield f"scores scaled by 1/sqrt(width) instead of {own}", right(scale=(heads * dim) ** -0.5)
    yield "scores scaled by 1/sqrt(kv heads x d)", right(scale=(kv * dim) ** -0.5)
    interleaved = np.arange(heads) % kv
    yield "kv heads interleaved (h mod n_kv) instead of blocked (h div group)", right(heads=interleaved)
    yield "every query head reads kv head 0", right(heads=right.blocked * 0)
    for by in (1, -1):
        yield "kv heads shifted by one", right(heads=(right.blocked + by) % kv)
    yield "keys and values exchanged", right(k=right.v, v=right.k)
    yield "keys used as values", right(v=right.k)
    yield "a sink of score 0 in the softmax (one added to its sum)", right(sink=True)
    yield "softmax over the keys left out (scores averaged)", right(scale=0.0)


@hypothesis(Attention)
def masks(case: Case, node: Attention) -> Iterator[Guess]:
    """What a token sees."""
    right = Right.of(case, node)
    distance, window = right.distance, right.window
    near = distance < (window or len(distance))
    yield "no causal mask", right(sees=near)
    yield "mask off by one: a token sees the next one", right(sees=near & (distance >= -1))
    itself = near & (distance > 0)
    yield "mask off by one: a token does not see itself", right(sees=itself)
    itself = itself.copy()
    itself[0, 0] = True
    yield "mask off by one: a token does not see itself", right(sees=itself)
    first = right.mask.copy()
    first[1:, 0] = False
    yield "position 0 is not seen", right(sees=first)
    yield "only the token itself is seen", right(sees=distance == 0)
    if window:
        yield f"window {window} of the file ignored", right(sees=distance >= 0)
        for off in (-1, 1):
            yield f"window {window + off} instead of {window}", right(sees=right.seen(window + off))


@hypothesis(Attention)
def forgets(case: Case, node: Attention) -> Iterator[Guess]:
    """A window, an eviction or a full cache: the first wrong token tells the length."""
    right = Right.of(case, node)
    n = len(right.q)
    wrong = wrong_rows(case)
    if not wrong.any():
        return
    first = int(np.argmax(wrong))
    row, column = np.indices((n, n))
    # The first token that loses a key hardly changes when it paid that key no attention.
    near = {
        *range(max(1, first - 8), first + 2),
        *(m for m in LENGTHS if max(1, first - 64) <= m <= first + 1),
    }
    for length in sorted(near, key=lambda m: (abs(first - m), m)):
        if length >= n:
            continue
        late = row >= length
        clause = f"only the last {length} positions are seen (window or eviction past {length})"
        yield clause, right(sees=right.mask & (right.distance < length))
        clause = f"positions from {length} on are never seen (cache full at {length})"
        yield clause, right(sees=right.mask & ((column < length) | (right.distance == 0)))
        yield clause, right(sees=right.mask & (column < length))
        clause = f"everything before position {length} is forgotten once the cache is full at {length}"
        yield clause, right(sees=right.mask & (~late | (column // length == row // length)))
        gone = right.distance >= length
        clause = f"positions evicted past {length} are read as zeros"
        yield clause, _zeroed(right, gone)


def _zeroed(right: Right, gone: Mask) -> Array:
    """Keys and values that are gone count with score 0 and value 0."""
    scores = right.q.transpose(1, 0, 2) @ right.k[:, right.blocked].transpose(1, 2, 0)
    scores = np.where(gone, 0.0, scores * right.scale)
    scores = np.where(right.mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True) * ~gone
    values = right.v[:, right.blocked].transpose(1, 0, 2)
    return np.asarray((weights @ values).transpose(1, 0, 2).reshape(len(right.q), -1))


@hypothesis(Attention)
def lost_row(case: Case, node: Attention) -> Iterator[Guess]:
    """One row of the cache is not there."""
    right = Right.of(case, node)
    wrong = np.flatnonzero(wrong_rows(case))
    if not len(wrong):
        return
    for lost in sorted({int(wrong[0]), int(wrong[-1]), len(right.q) - 1}):
        keys, values = right.k.copy(), right.v.copy()
        keys[lost], values[lost] = 0, 0
        yield f"cache row {lost} not written (zeros)", right(k=keys, v=values)
        yield f"values of cache row {lost} not written (zeros)", right(v=values)
        yield f"keys of cache row {lost} not written (zeros)", right(k=keys)
        sees = right.mask.copy()
        sees[:, lost] = False
        yield f"position {lost} is not seen", right(sees=sees)
