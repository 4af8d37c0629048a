"""Ways to get the embedding wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prill_harness.stages.hypotheses.case import Array, Case, Guess, hypothesis
from prill_harness.stages.hypotheses.storage import misreadings
from prill_runtime.models.nodes.network import Embed


def _tables(case: Case, node: Embed) -> tuple[Array | None, Array | None]:
    """(vocab, width), and (context, width) where positions are learned."""
    learned = None if node.positions is None else case.weight(f"{node.positions}.weight")
    return case.weight(f"{node.name}.weight"), learned


@hypothesis(Embed)
def embedding(case: Case, node: Embed) -> Iterator[Guess]:
    """The row, the positions, the scale."""
    table, learned = _tables(case, node)
    if table is None:
        return
    ids, n = np.array(case.ids), len(case.ids)
    places = np.zeros((n, table.shape[1])) if learned is None else learned[:n]
    if node.scale is not None:
        yield f"scale {node.scale:g} left out", table[ids] + places
        if learned is not None:
            yield "positions scaled, too", (table[ids] + places) * node.scale
        table = table * node.scale
    yield "row of the next id (id + 1)", table[(ids + 1) % len(table)] + places
    yield "row of the previous id (id - 1)", table[ids - 1] + places
    yield "scaled by sqrt(width)", table[ids] * table.shape[1] ** 0.5 + places
    yield "token shifted by one position", table[np.roll(ids, 1)] + places
    yield "token shifted by one position", table[np.roll(ids, -1)] + places
    yield "every token taken as the first", table[np.full(n, ids[0])] + places
    yield "table read with its dimensions swapped", table.reshape(table.shape[::-1]).T[ids] + places
    if learned is not None:
        yield "position embedding left out", table[ids]
        yield "token embedding left out", places
        shifted = learned[np.minimum(np.arange(n) + 1, len(learned) - 1)]
        yield "positions counted from 1 instead of 0", table[ids] + shifted
        yield "positions counted from -1 instead of 0", table[ids] + learned[np.arange(n) - 1]
        yield "positions counted from -1 instead of 0", table[ids] + learned[np.maximum(np.arange(n) - 1, 0)]
        yield "every position taken as 0", table[ids] + learned[0]
        yield "position embedding added twice", table[ids] + 2 * places
        for last in (64, 128, 256):
            if last < n:
                yield f"positions start again after {last}", table[ids] + learned[np.arange(n) % last]


@hypothesis(Embed)
def bytes_of_the_table(case: Case, node: Embed) -> Iterator[Guess]:
    """The table's bytes decoded the wrong way."""
    table, learned = _tables(case, node)
    ids = np.array(case.ids)
    places = 0.0 if learned is None else learned[: len(ids)]
    if table is not None:
        for clause, wrong in misreadings(case, f"{node.name}.weight", table.shape):
            yield f"{node.name}: {clause}", wrong[ids] * (node.scale or 1.0) + places
    if table is not None and learned is not None:
        for clause, wrong in misreadings(case, f"{node.positions}.weight", learned.shape):
            yield f"{node.positions}: {clause}", table[ids] * (node.scale or 1.0) + wrong[: len(ids)]
