"""Ways to get causal grouped-query attention wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
        q: (token, head, dim), late queries sharpened where the node does that. k, v: (token, kv head, dim).
        window: keys that a token sees, its own included; 0 is all of them.
        scale: of the scores. softcap: they stay within it, by `bend`. sinks: (head,) scores of no key.
    """

    q: Array
    k: Array
    v: Array
    window: int
    scale: float
    softcap: float | None = None
    sinks: Array | None = None
    bend: Callable[[Array], Array] = np.tanh

    @classmethod
    def of(cls, case: Case, node: Attention) -> Right:
        q, k, v = case.inputs
        if node.temper is not None:
            beta, original = node.temper
            q = q * (1 + beta * np.log1p(case.positions // original))[:, None, None]
        sinks = None if node.sinks is None else case.weight(node.sinks)
        return cls(q, k, v, node.window or 0, node.scale, node.softcap, sinks)

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
        self, *, sees: Mask | None = None, heads: NDArray[np.intp] | None = None, gone: Mask | None = None
    ) -> Array:
        """softmax(q k^T scale) v under a mask: (token, head * dim). A token that sees nothing gets zeros.

        Args:
            sees: another mask. heads: other kv heads. gone: keys and values that are read as zeros there.
        """
        heads = self.blocked if heads is None else heads
        keys, values = self.k[:, heads].transpose(1, 2, 0), self.v[:, heads].transpose(1, 0, 2)
        scores = self.q.transpose(1, 0, 2) @ keys * self.scale  # (head, token, token)
        if gone is not None:
            scores = np.where(gone, 0.0, scores)
        if self.softcap is not None:
            scores = self.softcap * self.bend(scores / self.softcap)
        scores = np.where(self.mask if sees is None else sees, scores, -np.inf)
        most = scores.max(axis=-1, keepdims=True)
        rest = np.full((len(heads), 1, 1), -np.inf) if self.sinks is None else self.sinks[:, None, None]
        most = np.maximum(most, rest)
        most = np.where(np.isfinite(most), most, 0.0)
        weights = np.exp(scores - most)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(rest - most)
        weights = weights / np.where(total == 0, 1.0, total)
        if gone is not None:
            weights = weights * ~gone
        return np.asarray((weights @ values).transpose(1, 0, 2).reshape(len(self.q), -1))


@hypothesis(Attention)
def arithmetic(case: Case, node: Attention) -> Iterator[Guess]:
    """The scale, the heads, the operands, the softmax."""
    right = Right.of(case, node)
    _, heads, dim = right.q.shape
    kv = right.k.shape[1]
    own = "1/sqrt(d)" if node.scale == dim**-0.5 else f"{node.scale:g}"
    yield f"scale {own}, heads and window as the file states, where the oracle's differ", right()
    width = node.norm.width
    for scale, said in (
        (1 / dim, f"by 1/d instead of {own}"), (1.0, ""), (dim**0.5, f"by sqrt(d) instead of {own}"),
        (node.scale**2, f"by {own} twice"), (dim**-0.5, f"by 1/sqrt(d) instead of {own}"),
        ((width / heads) ** -0.5, f"by 1/sqrt(width / heads) instead of {own}"),
        ((heads * dim) ** -0.5, f"by 1/sqrt(heads x d) instead of {own}"),
        ((kv * dim) ** -0.5, "by 1/sqrt(kv heads x d)"),
    ):  # fmt: skip
        if abs(scale / node.scale - 1) > 1e-9:
            yield f"scores scaled {said}" if said else "scores not scaled", replace(right, scale=scale)()
    interleaved = np.arange(heads) % kv
    yield "kv heads interleaved (h mod n_kv) instead of blocked (h div group)", right(heads=interleaved)
    yield "every query head reads kv head 0", right(heads=right.blocked * 0)
    for by in (1, -1):
        yield "kv heads shifted by one", right(heads=(right.blocked + by) % kv)
    yield "keys and values exchanged", replace(right, k=right.v, v=right.k)()
    yield "keys used as values", replace(right, v=right.k)()
    yield "softmax over the keys left out (scores averaged)", replace(right, scale=0.0)()
    if node.temper is not None:
        yield "late queries not sharpened, as early ones are not", replace(right, q=case.inputs[0])()


@hypothesis(Attention)
def sinks(case: Case, node: Attention) -> Iterator[Guess]:
    """What takes its part of the softmax without being a key."""
    right = Right.of(case, node)
    own = right.sinks
    if own is None:
        clause = "a sink of score 0 in the softmax (one added to its sum)"
        yield clause, replace(right, sinks=np.zeros(node.heads))()
        return
    yield "sinks left out of the softmax", replace(right, sinks=None)()
    yield "sinks taken as 0 (one added to the softmax's sum)", replace(right, sinks=own * 0)()
    yield "one sink for all heads, that of head 0", replace(right, sinks=own * 0 + own[0])()
    yield "one sink for all heads, their mean", replace(right, sinks=own * 0 + own.mean())()
    yield "sinks scaled as scores are", replace(right, sinks=own * right.scale)()
    yield "sinks with the opposite sign", replace(right, sinks=-own)()
    yield "sinks as they are in place of their exponentials", replace(right, sinks=np.log(np.abs(own)))()
    grouped = own.reshape(-1, node.heads // node.kv_heads).T.reshape(-1)
    yield "sinks of heads in the order of another grouping", replace(right, sinks=grouped)()
    for by in (1, -1):
        yield "sinks shifted by one head", replace(right, sinks=np.roll(own, by))()
        other = case.neighbour(node.sinks or "", by)
        if other is not None:
            yield f"sinks of the layer {'behind' if by > 0 else 'before'}", replace(right, sinks=other)()


@hypothesis(Attention)
def caps(case: Case, node: Attention) -> Iterator[Guess]:
    """The bound of the scores."""
    right = Right.of(case, node)
    cap = right.softcap
    if cap is None:
        return
    yield f"scores not capped at {cap:g}", replace(right, softcap=None)()
    yield f"scores cut off at {cap:g}, not bent", replace(right, bend=lambda x: np.clip(x, -1.0, 1.0))()
    yield f"scores capped at {cap:g} before they are scaled", replace(right, softcap=cap * right.scale)()
    for other in (30.0, 50.0):
        if other != cap:
            yield f"scores capped at {other:g} instead of {cap:g}", replace(right, softcap=other)()


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
    others = {other.window for other in case.nodes(Attention)} - {node.window, None}
    for other in sorted(filter(None, others)):
        yield (
            f"window {other} of other layers in a layer that has {window or 'none'}",
            right(sees=right.seen(other)),
        )


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
        clause = f"positions evicted past {length} are read as zeros"
        yield clause, right(gone=right.distance >= length)


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
        yield f"cache row {lost} not written (zeros)", replace(right, k=keys, v=values)()
        yield f"values of cache row {lost} not written (zeros)", replace(right, v=values)()
        yield f"keys of cache row {lost} not written (zeros)", replace(right, k=keys)()
        sees = right.mask.copy()
        sees[:, lost] = False
        yield f"position {lost} is not seen", right(sees=sees)
