"""A device on which nothing runs: it counts what a model would allocate, for a rehearsal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from prill_runtime.device.machine.base import Device, Graph, Pointer, Shape
from prill_runtime.device.machine.compile import emulator_target

DRY_BYTES: Final = 1 << 50
"""More bytes than any purpose of an arena uses."""


class DryGraph(Graph):
    """A graph of launches that do nothing."""

    nodes = 0

    def replay(self) -> None:
        """Nothing was captured."""

    def close(self) -> None:
        """Nothing is held."""


class DryDevice(Device):
    """Endless memory that reads as zeros, and launches that are dropped.

    A pass on it makes the same allocations in the same order as on a real device, so the arena's counts are
    what the real device will need.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spec, self.name, self.target, self.multiprocessors = "dry", "dry run", emulator_target(), 1
        self._next: Pointer = DRY_BYTES

    def alloc(self, nbytes: int) -> Pointer:
        pointer, self._next = self._next, self._next + nbytes
        return pointer

    def free(self, pointer: Pointer) -> None:
        """Does nothing: addresses are not reused."""

    def upload(self, pointer: Pointer, array: NDArray[Any]) -> None:
        """Nothing: no content is kept."""

    def download(self, pointer: Pointer, shape: Shape, dtype: DTypeLike) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def mark(self) -> int:
        return 0

    def peek(self, pointer: Pointer, shape: Shape, dtype: DTypeLike, mark: int) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def fill(self, pointer: Pointer, nbytes: int, value: int = 0) -> None:
        """Nothing: no content is kept."""

    def copy(self, target: Pointer, source: Pointer, nbytes: int) -> None:
        """Nothing: no content is kept."""

    def synchronize(self) -> None:
        """Nothing is ever queued."""

    def event(self) -> float:
        return 0.0

    def elapsed(self, begin: float, end: float) -> float:
        return end - begin

    def attributes(self, pointer: Pointer) -> dict[str, str]:
        return {"memory": "device"}

    def memory(self) -> tuple[int, int]:
        return 16 * DRY_BYTES, 16 * DRY_BYTES

    def close(self) -> None:
        """Nothing is held."""

    def module(self, *names: str) -> None:
        """Nothing is compiled."""

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: int | Sequence[int],
        args: Mapping[str, Any],
        shared: int = 0,
    ) -> None:
        """Nothing runs."""

    def _load(self, name: str) -> Mapping[str, Any]:
        return {}

    def _launch(
        self, kernel: str, function: Any, grid: Shape, block: Shape, shared: int, packed: bytes
    ) -> None:
        """Nothing runs."""

    def _begin(self) -> None:
        """Nothing is recorded."""

    def _end(self, keep: bool) -> Graph | None:
        return DryGraph() if keep else None
