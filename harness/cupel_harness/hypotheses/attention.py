"""Ways to get causal grouped-query attention wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cupel_harness.hypotheses.case import Array, Case, Guess, hypothesis


def attend(
    q: Array, k: Array, v: Array, *, scale: float, sees: NDArray[np.bool_], heads: NDArray[np.intp]
) -> Array:
    """softmax(q k^T scale) v under a mask.

    Args:
        q: (token, head, dim); k, v: (token, kv head, dim).
        sees: (token, token) True where the row's token sees the column's.
        heads: (head,) the kv head of each query head.

    Returns:
        (token, head * dim)
    """
    scores = np.einsum("thd,shd->hts", q, k[:, heads]) * scale
    scores = np.where(sees, scores, -np.inf)
    weights = np.exp(scores - np.nan_to_num(scores.max(axis=-1, keepdims=True), neginf=0.0))
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    return np.asarray(np.einsum("hts,shd->thd", weights, v[:, heads]).reshape(len(q), -1))


@hypothesis("attn")
def attention(case: Case) -> Iterator[Guess]:
    q, k, v = case.inputs
    n, n_heads, dim = q.shape
    n_kv = k.shape[1]
    row, column = np.indices((n, n))
    causal = column <= row
    blocked = np.arange(n_heads) // (n_heads // n_kv)
    scale = dim**-0.5

    def run(
        scale: float = scale, sees: NDArray[np.bool_] = causal, heads: NDArray[np.intp] = blocked
    ) -> Array:
        return attend(q, k, v, scale=scale, sees=sees, heads=heads)

    yield "scores scaled by 1/d instead of 1/sqrt(d)", run(scale=1 / dim)
    yield "scores not scaled", run(scale=1.0)
    yield "scores scaled by 1/sqrt(width) instead of 1/sqrt(d)", run(scale=(n_heads * dim) ** -0.5)
    yield "scores scaled by 1/sqrt(kv heads x d)", run(scale=(n_kv * dim) ** -0.5)
    yield (
        "kv heads interleaved (h mod n_kv) instead of blocked (h div group)",
        run(heads=np.arange(n_heads) % n_kv),
    )
    yield "every query head reads kv head 0", run(heads=blocked * 0)
    yield "no causal mask", run(sees=causal | True)
    yield "mask off by one: a token sees the next one", run(sees=column <= row + 1)
    yield "mask off by one: a token does not see itself", run(sees=(column < row) | (row + column == 0))
    yield "keys and values exchanged", attend(q, v, k, scale=scale, sees=causal, heads=blocked)
    declared = int(case.number("window"))
    if declared:
        yield f"window {declared} of the file ignored", run()
        for off in (-1, 1):
            yield (
                f"window {declared + off} instead of {declared}",
                run(sees=causal & (row - column < declared + off)),
            )


@hypothesis("attn")
def forgets(case: Case) -> Iterator[Guess]:
    """A window, an eviction or a full cache: the first wrong token tells the length."""
    q, k, v = case.inputs
    n, n_heads, dim = q.shape
    error = np.abs(case.got - case.want).reshape(n, -1).max(axis=1)
    wrong = np.flatnonzero(
        error > max(1e-6 * float(np.abs(case.want).max()), 10 * float(np.median(error[:1])))
    )
    if not len(wrong):
        return
    first = int(wrong[0])
    row, column = np.indices((n, n))
    causal = column <= row
    heads = np.arange(n_heads) // (n_heads // k.shape[1])
    for length in (first - 1, first, first + 1):
        if length > 0:
            seen = causal & (row - column < length)
            clause = f"only the last {length} positions are seen (window or eviction past {length})"
            yield clause, attend(q, k, v, scale=dim**-0.5, sees=seen, heads=heads)
            seen = causal & ((column < length) | (row < length))
            clause = f"positions from {length} on were never written to the cache"
            yield clause, attend(q, k, v, scale=dim**-0.5, sees=seen, heads=heads)
    for lost in {first, n - 1}:
        keys, values = k.copy(), v.copy()
        keys[lost], values[lost] = 0, 0
        clause = f"cache row {lost} not written (zeros)"
        yield clause, attend(q, keys, values, scale=dim**-0.5, sees=causal, heads=heads)
