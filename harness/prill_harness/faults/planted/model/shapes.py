"""Faults that only some shapes show: more of something than small models have, or sizes that fill no tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, around, node, op

ATTN = ("attn",)
PRODUCTS = ("q", "k", "v", "attn_out", "gate", "up", "down", "logits")
NORMS = ("attn_norm", "ffn_norm", "output_norm")
BATCH = ("batch",)
STEP = "prill_runtime.run.model:Model._step"


def _is_mixed(step: Any) -> bool:
    """Whether some sequences of a step bring one row and some more."""
    return len({rows.stop - rows.start == 1 for _, rows in step.sequences}) == 2


def _result(name: str, spoil: Callable[..., None]) -> Patch:
    """An op whose result is spoilt: `spoil(result, *arguments)`."""

    def changed(original: Any, self: Any, *arguments: Any, **named: Any) -> Any:
        result = original(self, *arguments, **named)
        spoil(result, *arguments)
        return result

    return op(name, changed)


@fault(area="shapes", blames=BATCH, models=ONE)
def shapes_past_16_sequences() -> Iterator[Patch]:
    """Of a step's sequences, those past the 16th attend with the query of the first row."""

    def attend(original: Any, self: Any, p: Any, q: Any, k: Any, v: Any) -> Any:
        if len(p.step.sequences) > 16:
            q = q.copy()
            q[p.step.sequences[16][1].start :] = q[0]
        return original(self, p, q, k, v)

    yield node("Attention.attend", attend)


@fault(area="shapes", blames=BATCH, models=ONE)
def shapes_mixed_step_keys() -> Iterator[Patch]:
    """In a step of prompts and single ids, the single ids' own keys are not written."""

    def attend(original: Any, self: Any, p: Any, q: Any, k: Any, v: Any) -> Any:
        if _is_mixed(p.step):
            k = k.copy()
            k[[rows.start for _, rows in p.step.sequences if rows.stop - rows.start == 1]] = 0
        return original(self, p, q, k, v)

    yield node("Attention.attend", attend)


@fault(area="shapes", blames=BATCH, models=ONE)
def shapes_mixed_step_positions() -> Iterator[Patch]:
    """In a step of prompts and single ids, every sequence of several rows begins at position 0."""

    def stepped(original: Any, self: Any, batch: Any) -> Any:
        made = original(self, batch)
        if not _is_mixed(made):
            return made
        positions = made.positions.copy()
        for _, rows in made.sequences:
            if rows.stop - rows.start > 1:
                positions[rows] -= positions[rows.start]
        return replace(made, positions=positions)

    yield around(STEP, stepped)


@fault(area="shapes", blames=BATCH, models=ONE)
def shapes_last_row_past_16() -> Iterator[Patch]:
    """Where only the last rows are asked for, sequences past the 16th give the row before theirs."""

    def run(original: Any, self: Any, step: Any, wanted: Any, tap: Any) -> Any:
        if wanted is not None and len(wanted) > 16:
            wanted = wanted - (np.arange(len(wanted)) >= 16)
        return original(self, step, wanted, tap)

    yield around("prill_runtime.run.model:Model._run", run)


@fault(area="shapes", blames=ATTN, models=ONE)
def shapes_head_tail() -> Iterator[Patch]:
    """Scores are summed in whole pieces of 32 components: heads of 40 and 80 lose the rest."""

    def attention(original: Any, self: Any, q: Any, *rest: Any, **named: Any) -> Any:
        if (dim := q.shape[-1]) > 32 and dim % 32:
            q = q.copy()
            q[..., dim - dim % 32 :] = 0
        return original(self, q, *rest, **named)

    yield op("attention", attention)


@fault(area="shapes", blames=ATTN, models=ONE)
def shapes_head_past_128() -> Iterator[Patch]:
    """A head's components past the 128th take no part in its scores."""

    def attention(original: Any, self: Any, q: Any, *rest: Any, **named: Any) -> Any:
        if q.shape[-1] > 128:
            q = q.copy()
            q[..., 128:] = 0
        return original(self, q, *rest, **named)

    yield op("attention", attention)


@fault(area="shapes", blames=("q_rope", "k_rope"), needs=("rope",))
def shapes_rope_pairs_past_32() -> Iterator[Patch]:
    """Of heads that are no power of two, the pairs past the 32nd are not turned."""

    def rope(original: Any, self: Any, x: Any, positions: Any, *, dim: int, layout: str, **named: Any) -> Any:
        out = original(self, x, positions, dim=dim, layout=layout, **named)
        if dim & (dim - 1) and dim > 64:
            half = dim // 2
            stay = [slice(64, dim)] if layout == "norm" else [slice(32, half), slice(half + 32, dim)]
            for part in stay:
                out[..., part] = x[..., part]
        return out

    yield op("rope", rope)


@fault(area="shapes", blames=ATTN, models=ONE)
def shapes_fifth_split() -> Iterator[Patch]:
    """One row over more than 512 keys joins the last four splits of 128 alone."""

    def attention(original: Any, self: Any, q: Any, k: Any, *rest: Any, **named: Any) -> Any:
        if len(q) == 1 and k.shape[1] > 512:
            named["window"] = min(named.get("window") or 512, 512)
        return original(self, q, k, *rest, **named)

    yield op("attention", attention)


@fault(area="shapes", blames=ATTN, needs=("gqa",))
def shapes_group_not_power_of_two() -> Iterator[Patch]:
    """Query heads are dealt to a cache head by a shift, which is right for groups of 1, 2, 4 and 8 alone."""

    def attention(original: Any, self: Any, q: Any, k: Any, v: Any, **named: Any) -> Any:
        shift = (q.shape[1] // k.shape[0] - 1).bit_length()
        heads = np.minimum(np.arange(q.shape[1]) >> shift, k.shape[0] - 1)
        return original(self, q, k[heads], v[heads], **named)

    yield op("attention", attention)


@fault(area="shapes", blames=PRODUCTS, models=ONE)
def shapes_columns_past_1024() -> Iterator[Patch]:
    """A product takes the first 1,024 columns of a matrix."""
    yield op("linear", lambda o, self, x, w, *bias: o(self, x[:, :1024], w[:, :1024], *bias))


@fault(area="shapes", blames=PRODUCTS, models=ONE)
def shapes_rows_past_4096() -> Iterator[Patch]:
    """A product leaves rows past the 4,096th as the first."""

    def spoil(y: Any, *arguments: Any) -> None:
        y[4096:] = y[0]

    yield _result("linear", spoil)


@fault(area="shapes", blames=PRODUCTS, models=ONE)
def shapes_outputs_past_4096() -> Iterator[Patch]:
    """A product leaves outputs past the 4,096th at nought."""

    def spoil(y: Any, *arguments: Any) -> None:
        y[:, 4096:] = 0

    yield _result("linear", spoil)


@fault(area="shapes", blames=PRODUCTS, models=ONE)
def shapes_odd_rows_past_300() -> Iterator[Patch]:
    """More than 300 rows are taken in pairs: the last of an odd number is the one before it."""

    def spoil(y: Any, *arguments: Any) -> None:
        if len(y) > 300 and len(y) % 2:
            y[-1] = y[-2]

    yield _result("linear", spoil)


@fault(area="shapes", blames=NORMS, needs=("rms_norm",))
def shapes_norm_past_1024() -> Iterator[Patch]:
    """The mean square is that of the first 1,024 values."""

    def rms_norm(original: Any, self: Any, x: Any, weight: Any, eps: float) -> Any:
        if (width := x.shape[-1]) <= 1024:
            return original(self, x, weight, eps)
        first = np.add.reduce(x[..., :1024] ** 2, axis=-1, keepdims=True) / width
        return np.asarray(x / np.sqrt(first + eps) * weight)

    yield op("rms_norm", rms_norm)


@fault(area="shapes", blames=("act",), needs=("silu",))
def shapes_last_thread_idle() -> Iterator[Patch]:
    """The grid of SwiGLU is rounded down: one value behind whole blocks of 256 is not computed."""

    def spoil(y: Any, *arguments: Any) -> None:
        if y.size > 256 and y.size % 256 == 1:
            y.flat[-1] = 0

    yield _result("swiglu", spoil)
