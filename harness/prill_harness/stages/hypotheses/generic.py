"""Mistakes any stage can make: nothing written, a factor, an offset, a shift, another order of the heads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prill_harness.stages.hypotheses.case import Case, Guess, hypothesis
from prill_runtime.models.base import Node


@hypothesis(Node)
def whole_array(case: Case, node: Node) -> Iterator[Guess]:
    """Nothing, the input, a factor, an offset."""
    want, got = case.want, case.got
    yield "all zeros: the stage was not written", np.zeros_like(want)
    for source in case.inputs:
        if source.size == want.size:
            yield "equal to its input: the stage was skipped", source
    yield "sign flipped", -want
    power = float((want**2).sum())
    factor = float((want * got).sum()) / power if power else 1.0
    yield f"scaled by {factor:.6g}", want * factor
    if len(want) > 2:
        offset = np.median(got - want, axis=0)
        yield "the same vector added to every token: a bias missing or added", want + offset


@hypothesis(Node)
def order(case: Case, node: Node) -> Iterator[Guess]:
    """The right values in other places."""
    want = case.want
    for by in (1, -1):
        yield "elements shifted by one", np.roll(want, by, axis=-1)
        if len(want) > 1:
            yield "tokens shifted by one position", np.roll(want, by, axis=0)
    if want.ndim == 2 and want.shape[0] == want.shape[1]:
        yield "transposed", want.T
    heads = case.heads
    width = want.reshape(len(want), -1).shape[1]
    if heads and width % heads == 0 and width > heads:
        by_head = want.reshape(len(want), heads, -1)
        yield "heads in reverse order", by_head[:, ::-1]
        yield "heads and dimensions interleaved", by_head.swapaxes(1, 2)


@hypothesis(Node)
def rounded(case: Case, node: Node) -> Iterator[Guess]:
    """The right values in a smaller type."""
    yield "rounded to float16", case.want.astype(np.float16).astype(np.float64)
    bits = case.want.astype(np.float32).view(np.uint32)
    kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    yield "rounded to bfloat16", kept.astype(np.float64)
    yield "clipped to the float16 range", np.clip(case.want, -65504, 65504)
