"""Ways to get a projection wrong: the wiring, the bias, the bytes of its weight."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prill_harness.stages.hypotheses.case import Array, Case, Guess, hypothesis
from prill_harness.stages.hypotheses.storage import misreadings
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.network import Embed, Head

Product = Linear | Head


def _part(node: Product, array: Array) -> Array:
    """The rows that are a node's own of a tensor that others share; other tensors whole."""
    if isinstance(node, Head) or node.of is None:
        return array
    return array[node.first : node.first + node.rows]


def _tensors(case: Case, node: Product) -> tuple[Array, Array | None] | None:
    weight, bias = case.weight(f"{node.name}.weight"), case.weight(f"{node.name}.bias")
    return None if weight is None else (_part(node, weight), None if bias is None else _part(node, bias))


def held(node: Product, product: Array) -> Array:
    """A product as the stage has it: logits within their cap."""
    cap = node.softcap if isinstance(node, Head) else None
    return product if cap is None else np.asarray(cap * np.tanh(product / cap))


@hypothesis(Linear, Head)
def products(case: Case, node: Product) -> Iterator[Guess]:
    """The wiring, the bias, the bytes of its weight."""
    for ways in (_wiring, _bytes):
        for clause, product in ways(case, node):
            yield clause, held(node, product)


def _wiring(case: Case, node: Product) -> Iterator[Guess]:
    """The bias, the orientation, the rows, another tensor."""
    found = _tensors(case, node)
    if found is None:
        return
    weight, bias = found
    stem, x = node.name, case.inputs[0]
    add = 0.0 if bias is None else bias
    right = x @ weight.T
    yield f"rows of {stem} as the file states, where the oracle's differ", right + add
    if bias is not None:
        yield f"bias of {stem} left out", right
        yield f"bias of {stem} added twice", right + 2 * bias
        yield f"bias of {stem} subtracted", right - bias
    yield f"{stem} never loaded (zeros)", np.zeros_like(right) + add
    if weight.shape[0] == weight.shape[1]:
        yield f"{stem} transposed", x @ weight + add
    swapped = weight.reshape(-1).reshape(weight.shape[::-1]).T
    yield f"{stem} read with its dimensions swapped", x @ swapped.T + add
    for by in (1, -1):
        yield f"rows of {stem} shifted by one", x @ np.roll(weight, by, axis=0).T + add
        yield f"columns of {stem} shifted by one", x @ np.roll(weight, by, axis=1).T + add
    last = weight.copy()
    last[:, -1] = 0
    yield f"last column of {stem} left out of the sum", x @ last.T + add
    if weight.shape[1] % 32 == 0 and weight.shape[1] > 32:
        last[:, -32:] = 0
        yield f"last block of 32 columns of {stem} left out of the sum", x @ last.T + add
    if weight.shape[0] % 2 == 0:
        halves = np.concatenate(np.split(weight, 2)[::-1])
        yield f"halves of {stem} exchanged", x @ halves.T + add
    for name, other in _others(case, node):
        if other.shape == weight.shape:
            yield f"{name} used instead of {stem}", x @ other.T + add


@hypothesis(Head)
def capped(case: Case, node: Head) -> Iterator[Guess]:
    """Logits capped as another architecture's are, or not as their own."""
    product = case.want
    if node.softcap is not None:
        found = _tensors(case, node)
        if found is None:
            return
        product = case.inputs[0] @ found[0].T + (0.0 if found[1] is None else found[1])
        yield f"logits not capped at {node.softcap:g}", product
    for cap in (30.0, 50.0):
        if cap != node.softcap:
            yield f"softly capped at {cap:g} (cap tanh(x / cap))", cap * np.tanh(product / cap)


@hypothesis(Linear, stages=("q", "k"))
def head_layout(case: Case, node: Linear) -> Iterator[Guess]:
    """Rows of a head in rotary order of the other convention."""
    want = case.want.reshape(len(case.want), node.heads or 1, -1)
    half, odd = divmod(want.shape[-1], 2)
    if odd:  # no pairs to exchange
        return
    split = want.reshape(*want.shape[:-1], half, 2).swapaxes(-1, -2)
    yield "rows of each head in half-split order instead of pairs", split
    joined = want.reshape(*want.shape[:-1], 2, half).swapaxes(-1, -2)
    yield "rows of each head in pair order instead of half-split", joined


def _others(case: Case, node: Product) -> Iterator[tuple[str, Array]]:
    """What a slip of the wiring would read: the neighbours in the block, the same one a block away, and the
    rows of others in a tensor that they share; the embedding table for a head."""
    if isinstance(node, Head):
        embed = next(stage.node for stage in case.table.values() if isinstance(stage.node, Embed))
        table = case.weight(f"{embed.name}.weight")
        if table is not None and embed.name != node.name:
            yield embed.name, table
        return
    layer, leaf = case.stage.layer or 0, node.name.rpartition(".")[2]
    linear = [(s, s.node) for s in case.table.values() if s.layer == layer and isinstance(s.node, Linear)]
    names = [other.name for _, other in linear if other.of is None and other.name != node.name]
    names += [f"blk.{layer + step}.{leaf}" for step in (-1, 1) if layer + step >= 0]
    for name in names:
        array = case.weight(f"{name}.weight")
        if array is not None:
            yield name, _part(node, array) if name.endswith(f".{leaf}") else array
    for stage, other in linear:
        shared = case.weight(f"{node.name}.weight")
        if other.name == node.name and other != node and shared is not None:
            yield f"the {stage.kind} rows of {node.name}", _part(other, shared)


def _bytes(case: Case, node: Product) -> Iterator[Guess]:
    """The weight's bytes, or its bias's, decoded the wrong way."""
    found = _tensors(case, node)
    if found is None:
        return
    stem, (weight, bias) = node.name, found
    add = 0.0 if bias is None else bias
    whole = case.weight(f"{stem}.weight")
    assert whole is not None
    for clause, decoded in misreadings(case, f"{stem}.weight", whole.shape):
        yield f"{stem}: {clause}", case.inputs[0] @ _part(node, decoded).T + add
    fused = case.weight(f"{stem}.bias")
    if fused is not None:
        for clause, decoded in misreadings(case, f"{stem}.bias", fused.shape):
            yield f"bias of {stem}: {clause}", case.inputs[0] @ weight.T + _part(node, decoded)
