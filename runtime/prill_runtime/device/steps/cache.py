"""The KV cache in device memory: of a sequence, and of whichever sequence a captured graph is run for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from prill_runtime.device.machine.base import Pointer
from prill_runtime.device.memory.arena import OutOfDeviceMemory, padded
from prill_runtime.device.memory.array import F32, Allocation, grid_of
from prill_runtime.device.memory.slot import SEQUENCE_DTYPE, CacheView
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.errors import PrillError
from prill_runtime.models.cache import KVCache

if TYPE_CHECKING:
    from prill_runtime.models.nodes.network import Network

STATE_BYTES: Final = SEQUENCE_DTYPE.itemsize
"""Bytes of every open cache besides its keys and values."""
MOST_SESSIONS: Final = 1024
"""Caches of a model that may be open at once, if there are positions for so many."""


def nbytes_of(network: Network, positions: int) -> int:
    """Bytes of keys and values for so many positions."""
    kept = (layout.kv_heads * (layout.key_size + layout.value_size) for layout in network.caches)
    return F32.itemsize * positions * sum(kept)


class DeviceCache(KVCache):
    """KVCache whose rows lie in the arena.

    It counts the positions here too. Kernels read the count from a `record` uploaded before a step; where
    many steps follow without the host, their last kernel counts on in that record.
    """

    def __init__(self, ops: CudaBackend, network: Network, capacity: int, offset: int = 0) -> None:
        self.ops = ops
        super().__init__(*network.cache_shape, capacity, F32, offset)

    def _reserve(self, dtype: np.dtype[Any]) -> None:
        self._bytes = int(np.prod(self.shape)) * dtype.itemsize
        self._allocation: Allocation | None = None
        self._state: Allocation | None = None
        pool, each = self.ops.arena.regions["cache"], 2 * self._bytes // self.capacity
        if pool.live >= MOST_SESSIONS:
            raise OutOfDeviceMemory(
                "too many sequences are open at once", where="KV cache",
                expected=f"at most {MOST_SESSIONS}", got=pool.live + 1, hint="close one",
            )  # fmt: skip
        try:
            # Keys and values in one block, so that the pool is divided into as few blocks as there are
            # caches.
            self._allocation = self.ops.allocate(2 * self._bytes, "cache")
        except OutOfDeviceMemory:
            held = f"{pool.held // each} positions in {pool.live} open sequences"
            raise OutOfDeviceMemory(
                "no room for another sequence",
                where="KV cache",
                expected=f"at most {max(0, pool.gap - padded(0)) // each} positions, beside {held}",
                got=f"{self.capacity} positions",
                hint="close a session, ask for a smaller capacity, or open the engine with cache=POSITIONS",
            ) from None
        self._state = self.ops.allocate(STATE_BYTES, "scratch")

    @property
    def state(self) -> Pointer:
        """Address of the kernels' struct Sequence.

        Raises:
            PrillError: the cache is closed.
        """
        if self._state is None:
            raise PrillError("the cache is closed", where="KV cache", hint="open a new one")
        return self._state.pointer

    @property
    def dtype(self) -> np.dtype[Any]:
        return F32

    @property
    def nbytes(self) -> int:
        return 0 if self._allocation is None else 2 * self._bytes

    def record(self, token: int = 0, length: int | None = None) -> np.ndarray[Any, np.dtype[np.void]]:
        """The kernels' struct Sequence: this one or its first `length` positions, and the id to feed."""
        if self._allocation is None:
            raise PrillError("the cache is closed", where="KV cache", hint="open a new one")
        keys = self._allocation.pointer
        length = self.length if length is None else length
        return np.array(
            [(keys, keys + self._bytes, self.capacity, length, self.offset, token, 0)], SEQUENCE_DTYPE
        )

    def arm(self) -> None:
        """Upload the record; once before every step."""
        self.ops.device.upload(self.state, self.record())

    def append(self, layer: int, k: Any, v: Any) -> None:
        if self._pending[layer]:
            raise PrillError("a layer was appended to twice in one step", where="KV cache", got=layer)
        self.require(len(k))
        append(self.ops, self.state, self.shape, layer, k, v)
        self._pending[layer] += len(k)

    def view(self, layer: int) -> tuple[Any, Any]:
        reach = self.length + self._pending[layer]
        view = CacheView(self.state, layer, self.shape[1], reach, self.length)
        return view, view

    def close(self) -> None:
        """Free the memory."""
        self._allocation = self._state = None


class SlotCache(DeviceCache):
    """The cache of a captured graph: whichever sequence the slot describes when the graph is replayed.

    Its launches cover `capacity` positions; how many there are stands in the slot alone, not in `length`.
    """

    def __init__(self, ops: CudaBackend, network: Network, capacity: int, slot: Allocation) -> None:
        self._slot = slot
        super().__init__(ops, network, capacity)

    def _reserve(self, dtype: np.dtype[Any]) -> None:
        self._bytes, self._allocation, self._state = 0, None, self._slot

    def view(self, layer: int) -> tuple[Any, Any]:
        view = CacheView(self.state, layer, self.shape[1], self.capacity, None)
        return view, view


def append(ops: CudaBackend, sequence: Pointer, shape: tuple[int, ...], layer: int, k: Any, v: Any) -> None:
    """Queue a copy of new rows k, v (row, kv_head, dim) to behind a sequence's committed ones."""
    k, v = (x if hasattr(x, "pitch") else ops.on(x) for x in (k, v))
    args = {"sequence": sequence, "k": k.pointer, "v": v.pointer, "rows": len(k), "kv_heads": shape[1],
            "head_dim": shape[3], "k_pitch": k.pitch, "v_pitch": v.pitch, "layer": layer}  # fmt: skip
    ops.device.launch("cache_append", grid_of(len(k) * shape[1] * shape[3]), 256, args)
