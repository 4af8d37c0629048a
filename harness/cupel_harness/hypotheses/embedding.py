"""Ways to get the embedding wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupel_harness.hypotheses.case import Case, Guess, hypothesis


@hypothesis("embed")
def embedding(case: Case) -> Iterator[Guess]:
    table = case.weight("token_embd.weight")  # (vocab, width)
    learned = case.weight("position_embd.weight")  # (context, width)
    if table is None:
        return
    ids, n = np.array(case.ids), len(case.ids)
    places = 0.0 if learned is None else learned[:n]
    yield "row of the next id (id + 1)", table[(ids + 1) % len(table)] + places
    yield "row of the previous id (id - 1)", table[ids - 1] + places
    yield "scaled by sqrt(width)", table[ids] * table.shape[1] ** 0.5 + places
    yield "token shifted by one position", table[np.roll(ids, 1)] + places
    if learned is not None:
        yield "position embedding left out", table[ids]
        yield "positions counted from 1 instead of 0", table[ids] + learned[1 : n + 1]
        yield "positions counted from -1 instead of 0", table[ids] + learned[np.arange(n) - 1]
        yield "every position taken as 0", table[ids] + learned[0]
        yield "position embedding added twice", table[ids] + 2 * learned[:n]
