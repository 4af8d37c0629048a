"""Prompts on a device: pieces of a sequence appended to its cache, and the last row's logits."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from prill_runtime.device.machine.base import Graph
from prill_runtime.device.memory.array import Allocation, DeviceArray, DeviceIds
from prill_runtime.device.memory.slot import SEQUENCE_DTYPE
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.device.steps.cache import DeviceCache, SlotCache
from prill_runtime.device.steps.lower import to_logits
from prill_runtime.models.base import Pass, Step
from prill_runtime.models.load import Wired

MAX_ROWS: Final = 1024  # of one step; longer prompts go through in pieces
KEPT_GRAPHS: Final = 4
REMEMBERED_LENGTHS: Final = 16
PIECE_DTYPE: Final = np.dtype(
    [("sequence", SEQUENCE_DTYPE), ("positions", "<i4", MAX_ROWS), ("ids", "<i4", MAX_ROWS)]
)  # fmt: skip


class Prefill:
    """Takes the pieces of a prompt through a model; the device reads the sequence's state from memory.

    Queueing the launches of a small model takes longer than running them, so a length that comes a second
    time is captured if its launches do not depend on how long the sequence already is.
    """

    def __init__(self, model: Wired, ops: CudaBackend) -> None:
        self.model, self.ops = model, ops
        self._piece = ops.allocate(PIECE_DTYPE.itemsize, "scratch")
        self._last = ops.empty(1, model.network.width, purpose="scratch")
        self._lengths: deque[int] = deque(maxlen=REMEMBERED_LENGTHS)
        self._graphs: dict[int, Graph] = {}

    def feed(self, cache: DeviceCache, ids: Sequence[int]) -> None:
        """Queue 1 to MAX_ROWS checked ids of a sequence that has room for them, and commit them."""
        rows, first = len(ids), cache.position
        state = np.zeros(1, PIECE_DTYPE)
        state["sequence"] = cache.record()
        state["positions"][0, :rows] = np.arange(first, first + rows)
        state["ids"][0, :rows] = ids
        self.ops.device.upload(self._piece.pointer, state)
        if (graph := self._graph(rows)) is not None:
            graph.replay()
        else:
            self.record(rows, cache.length + rows)
        cache.commit(rows)

    def head(self, logits: DeviceArray) -> None:
        """Queue the computation of the logits (1, vocab) of the last row that was fed."""
        to_logits(self.ops, self.model.network.head, self.model.weights, self._last, logits)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs = {}

    def _graph(self, rows: int) -> Graph | None:
        """The captured launches for so many rows; None the first time, or if they depend on the position."""
        again = rows in self._lengths
        self._lengths.append(rows)
        if rows in self._graphs:
            self._graphs[rows] = self._graphs.pop(rows)  # least recently used first
        elif again and all(
            self.ops.any_reach(rows, layer.attention.size) for layer in self.model.network.layers
        ):
            while len(self._graphs) >= KEPT_GRAPHS:
                self._graphs.pop(next(iter(self._graphs))).close()
            with self.ops.device.capture() as made:
                self.record(rows, self.model.network.context)
            self._graphs[rows] = made[0]
        return self._graphs.get(rows)

    def record(self, rows: int, reach: int) -> None:
        """Queue a pass over the piece's sequence, with attention over `reach` positions."""
        fields: Any = PIECE_DTYPE.fields
        ids, positions = (DeviceIds(self._piece, rows, fields[name][1]) for name in ("ids", "positions"))
        p = in_memory(self.model, self.ops, self._piece, ids, positions, reach)
        hidden: Any = self.model.network(p)
        self.ops.copy(self.ops.on(hidden)[rows - 1 : rows], self._last)


def in_memory(
    model: Wired, ops: CudaBackend, sequence: Allocation, ids: DeviceIds, positions: DeviceIds, reach: int
) -> Pass:
    """A pass over ids that are in device memory.

    Args:
        sequence: begins with the SEQUENCE_DTYPE that the ids continue. reach: positions for attention.
    """
    cache = SlotCache(ops, model.network, reach, sequence)
    step: Any = Step(ids, positions, ((cache, slice(0, len(ids))),))  # type: ignore[arg-type]
    return model.passing(ops, step)  # type: ignore[arg-type]
