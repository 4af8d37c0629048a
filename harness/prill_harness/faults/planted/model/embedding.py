"""Faults of the embedding tables, of tokens and of learned positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, node, op

EMBED = ("embed",)


@fault(area="embedding", blames=EMBED, models=ONE)
def embed_off_by_one() -> Iterator[Patch]:
    """Every id gets the row of the next one."""
    yield op("embed", lambda o, self, table, ids: o(self, table, (ids + 1) % len(table)))


@fault(area="embedding", blames=EMBED, models=ONE)
def embed_scaled() -> Iterator[Patch]:
    """Rows are multiplied by the root of the width, as only other architectures do."""
    yield op(
        "embed", lambda o, self, table, ids: o(self, table, ids) * self.dtype.type(table.shape[1] ** 0.5)
    )


@fault(area="embedding", blames=EMBED, models=ONE)
def embed_repeated_id_lost() -> Iterator[Patch]:
    """Of an id that occurs twice only the first gets its row."""

    def embed(original: Any, self: Any, table: Any, ids: Any) -> Any:
        rows = original(self, table, ids)
        _, first = np.unique(ids, return_index=True)
        lost = np.ones(len(ids), bool)
        lost[first] = False
        rows[lost] = 0
        return rows

    yield op("embed", embed)


def _positions(changed: Callable[[Any, int], Any]) -> Patch:
    """Learned positions `changed(positions, table rows)`."""

    def embed(original: Any, self: Any, p: Any) -> Any:
        moved = changed(p.step.positions, self.context)
        return original(self, replace(p, step=replace(p.step, positions=moved)))

    return node("Embed", embed)


@fault(area="embedding", blames=EMBED, needs=("learned_positions",))
def learned_positions_ignored() -> Iterator[Patch]:
    """Every token gets the learned position 0."""
    yield _positions(lambda positions, rows: positions * 0)


@fault(area="embedding", blames=EMBED, needs=("learned_positions",))
def learned_positions_from_one() -> Iterator[Patch]:
    """Learned positions are counted from 1."""
    yield _positions(lambda positions, rows: np.minimum(positions + 1, rows - 1))


@fault(area="embedding", blames=EMBED, needs=("learned_positions",))
def learned_positions_wrap() -> Iterator[Patch]:
    """Learned positions start again after 256."""
    yield _positions(lambda positions, rows: positions % 256)


@fault(area="options", blames=EMBED, needs=("embedding_scale",))
def embedding_not_scaled() -> Iterator[Patch]:
    """Rows of the embedding are not multiplied by the root of the width."""
    yield op("scale", lambda o, self, x, by: x.copy())
