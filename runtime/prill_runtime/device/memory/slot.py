"""The device's record of a sequence, and the ring through which the host reads the ids chosen there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from prill_runtime.device.machine.base import Device, Pointer
from prill_runtime.device.memory.arena import Arena
from prill_runtime.device.memory.array import Allocation

SEQUENCE_DTYPE: Final = np.dtype(
    [("keys", "<u8"), ("values", "<u8"), ("capacity", "<i4"), ("length", "<i4"), ("offset", "<i4"),
     ("token", "<i4"), ("step", "<i4")],
    align=True,
)  # fmt: skip
"""The kernels' struct Sequence."""
TOKEN_OFFSET: Final = 28  # offset of the token in it
RING_IDS: Final = 64
"""Ids that may be queued before the host reads them."""
SLOT_DTYPE: Final = np.dtype(
    [
        ("sequence", SEQUENCE_DTYPE),
        ("position", "<i4"),
        ("ids", "<i4", RING_IDS),
        ("logprobs", "<f8", RING_IDS),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class CacheView:
    """One layer of a cache, as attention reads it.

    Attributes:
        sequence: the kernel's struct Sequence. reach: positions a launch has to cover.
        start: committed positions, None when only the device knows them.
    """

    sequence: Pointer
    layer: int
    kv_heads: int
    reach: int
    start: int | None


class Slot:
    """The state of the one sequence that is being continued: a SLOT_DTYPE in device memory.

    The last kernel of a step writes the id it chose, or an error code (`refusal`), into the ring, and sets
    token, length and position for the next step.
    """

    def __init__(self, device: Device, arena: Arena) -> None:
        self._device = device
        self.allocation = Allocation(arena.alloc("scratch", SLOT_DTYPE.itemsize), arena.free)

    @property
    def pointer(self) -> Pointer:
        return self.allocation.pointer

    def at(self, field: str) -> Pointer:
        """Address of a field."""
        fields: Any = SLOT_DTYPE.fields
        return self.pointer + int(fields[field][1])

    @property
    def targets(self) -> dict[str, int]:
        """The arguments that tell a choosing kernel where the slot is."""
        names = ("sequence", "position", "ids", "logprobs")
        return {name: self.at(name) for name in names} | {"ring": RING_IDS}

    def arm(self, sequence: np.ndarray[Any, np.dtype[np.void]]) -> None:
        """Load a sequence (one SEQUENCE_DTYPE); the next id chosen is the first of the ring."""
        state = np.zeros(1, SLOT_DTYPE)
        state["sequence"] = sequence
        state["position"] = state["sequence"]["offset"] + state["sequence"]["length"]
        self._device.upload(self.pointer, state)

    def read(self, first: int, count: int, mark: int | None = None) -> tuple[list[int], list[float]]:
        """Ids and logprobs of `count` choices from the `first` on, counted since the slot was armed.

        Args:
            mark: a mark behind the last of them; without one, wait for everything that is queued.
        """
        if mark is None:
            state = self._device.download(self.pointer, (1,), SLOT_DTYPE)[0]
        else:
            state = self._device.peek(self.pointer, (1,), SLOT_DTYPE, mark)[0]
        places = np.arange(first, first + count) % RING_IDS
        return state["ids"][places].tolist(), state["logprobs"][places].tolist()
