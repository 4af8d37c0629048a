"""Device memory as the forward passes see it: rows with a shape, that reshape and slice without moving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from typing import Any, Final, TypeAlias
from weakref import ref

import numpy as np
from numpy.typing import DTypeLike, NDArray

from prill_runtime.device.machine.base import Device, Pointer
from prill_runtime.device.memory.arena import Arena
from prill_runtime.device.memory.matrix import DeviceMatrix, Matrix
from prill_runtime.errors import PrillError

F32: Final = np.dtype(np.float32)
BLOCK_THREADS: Final = 256


class Allocation:
    """Memory of an arena, given back with the last array that looks at it."""

    def __init__(self, pointer: Pointer, free: Callable[[Pointer], None]) -> None:
        self.pointer, self._free = pointer, free

    def __del__(self) -> None:
        self._free(self.pointer)


class DeviceArray:
    """float32 rows in device memory: (row, …), rows `pitch` values apart, each row contiguous.

    It supports what forward passes do to an array between two ops; `copy` and NumPy get a host copy.
    """

    def __init__(
        self,
        ops: DeviceMemory,
        allocation: Allocation,
        shape: tuple[int, ...],
        pitch: int | None = None,
        offset: int = 0,
    ) -> None:
        self.ops, self.allocation, self.shape = ops, allocation, shape
        self.pitch = prod(shape[1:]) if pitch is None else pitch
        self.offset = offset
        self.halves: Allocation | None = (
            None  # the same rows in half precision, once a product has needed them
        )
        self.whole: DeviceArray | None = None  # the rows that these are a part of
        self._beside: ref[Allocation] | None = None

    @property
    def pointer(self) -> Pointer:
        return self.allocation.pointer + 4 * self.offset

    @property
    def dtype(self) -> np.dtype[Any]:
        return F32

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    @property
    def width(self) -> int:
        """Values of a row."""
        return prod(self.shape[1:])

    @property
    def contiguous(self) -> bool:
        return self.pitch == self.width or self.shape[0] == 1

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: int) -> DeviceArray:
        known = prod(n for n in shape if n >= 0)
        whole = tuple(self.size // known if n < 0 else n for n in shape)
        if (whole[0] != self.shape[0] and not self.contiguous) or prod(whole) != self.size:
            raise PrillError("cannot reshape rows", where="device array", expected=self.shape, got=shape)
        return DeviceArray(
            self.ops, self.allocation, whole, None if self.contiguous else self.pitch, self.offset
        )

    def __getitem__(self, key: Any) -> DeviceArray:
        """Some rows: a slice or an array of indices; or `[:, low:high]`, a part of every row."""
        if isinstance(key, slice):
            low, high, step = key.indices(self.shape[0])
            if step != 1:
                raise PrillError("rows are sliced one by one", where="device array", got=key)
            shape = (max(high - low, 0), *self.shape[1:])
            part = DeviceArray(self.ops, self.allocation, shape, self.pitch, self.offset + low * self.pitch)
            part.whole = None if shape == self.shape else self.whole or self
            return part
        if isinstance(key, tuple) and len(key) == 2 and key[0] == slice(None) and isinstance(key[1], slice):
            low, high, step = key[1].indices(self.shape[1])
            if step == 1:
                inner = prod(self.shape[2:])
                shape = (self.shape[0], high - low, *self.shape[2:])
                return DeviceArray(self.ops, self.allocation, shape, self.pitch, self.offset + low * inner)
        if isinstance(key, np.ndarray):
            return self.ops.rows(self, key)
        raise PrillError("device arrays take rows alone", where="device array", got=repr(key))

    def beside(self, width: int) -> DeviceArray:
        """Memory (row, width) for what a kernel is about to compute of these rows.

        For some rows of an array, the same rows of one result, as long as another part of that is held: what
        is computed of a batch's sequences lies one below the other.
        """
        if (whole := self.whole) is None:
            return self.ops.empty(len(self), width)
        allocation = None if whole._beside is None else whole._beside()
        if allocation is None:
            allocation = self.ops.empty(len(whole), width).allocation
            whole._beside = ref(allocation)
        first = (self.offset - whole.offset) // whole.pitch
        return DeviceArray(self.ops, allocation, (len(self), width), offset=first * width)

    def copy(self) -> NDArray[np.float32]:
        """A host copy."""
        return self.ops.download(self)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return self.copy().astype(dtype or F32, copy=False)


def neighbours(parts: Sequence[DeviceArray]) -> DeviceArray | None:
    """Contiguous arrays as one, where they lie one below the other already."""
    first = parts[0]
    ends = accumulate((part.size for part in parts), initial=first.offset)
    if not all(
        part.allocation is first.allocation and part.offset == end
        for part, end in zip(parts, ends, strict=False)
    ):
        return None
    return DeviceArray(
        first.ops, first.allocation, (sum(map(len, parts)), *first.shape[1:]), offset=first.offset
    )


class DeviceIds:
    """Integers (row,) in device memory; `tables` keeps what was computed from them, by what it depends on."""

    def __init__(self, allocation: Allocation, count: int, offset: int = 0) -> None:
        self.allocation, self.count, self.offset = allocation, count, offset
        self.tables: dict[Any, DeviceArray] = {}
        self.parts: dict[tuple[int, int], DeviceIds] = {}

    @property
    def pointer(self) -> Pointer:
        return self.allocation.pointer + self.offset

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> DeviceIds:
        """Some of them; the same object for the same ones."""
        low, high, _ = rows.indices(self.count)
        if (low, high) not in self.parts:
            self.parts[low, high] = DeviceIds(self.allocation, high - low, self.offset + 4 * low)
        return self.parts[low, high]


Operand: TypeAlias = DeviceArray | NDArray[Any]
Weight: TypeAlias = DeviceMatrix | Operand
Indices: TypeAlias = DeviceIds | NDArray[Any]


def grid_of(count: int, threads: int = BLOCK_THREADS) -> tuple[int]:
    """A grid of enough thread blocks for one thread each."""
    return (max(1, -(-count // threads)),)


class DeviceMemory:
    """The arrays of one device and one arena: made, filled, joined and read.

    Results live in the arena's part for activations until the last array that looks at them goes.
    """

    def __init__(self, device: Device, arena: Arena) -> None:
        self.device, self.arena = device, arena
        self._results: str | None = None

    def empty(self, *shape: int, purpose: str = "activations") -> DeviceArray:
        """Memory for an array that a kernel is about to write."""
        if purpose != "activations":
            return DeviceArray(self, self.allocate(4 * prod(shape), purpose), shape)
        if self._results is not None:
            return DeviceArray(self, self.allocate(4 * prod(shape), self._results, passing=True), shape)
        return DeviceArray(
            self, self.allocate(4 * prod(shape), rows=shape[0] if len(shape) > 1 else 1), shape
        )

    def allocate(
        self, nbytes: int, purpose: str = "activations", *, rows: int = 1, passing: bool = False
    ) -> Allocation:
        """Memory of the arena, as `Region.alloc`; activations of a step are padded by its rows."""
        return Allocation(self.arena.alloc(purpose, nbytes, rows, passing), self.arena.free)

    @contextmanager
    def results(self, purpose: str) -> Iterator[None]:
        """Results of the ops inside go to this part of the arena, to be read and given back at once."""
        self._results = purpose
        try:
            yield
        finally:
            self._results = None

    def upload(self, array: NDArray[Any], dtype: DTypeLike = np.float32, rows: int = 1) -> Allocation:
        """A host array on the device, padded by so many rows."""
        host = np.ascontiguousarray(array, dtype)
        allocation = self.allocate(host.nbytes, rows=rows)
        self.device.upload(allocation.pointer, host)
        return allocation

    def on(self, x: Weight) -> DeviceArray:
        """x as contiguous rows on the device."""
        if isinstance(x, DeviceMatrix):
            return self.expand(x)
        if not isinstance(x, DeviceArray):
            return DeviceArray(self, self.upload(x, rows=len(x) if x.ndim > 1 else 1), x.shape)
        if x.contiguous:
            return x
        out = self.empty(*x.shape)
        self.copy(x, out)
        return out

    def copy(self, x: DeviceArray, out: DeviceArray) -> None:
        """Queue a copy of the rows of x into contiguous ones."""
        args = {"x": x.pointer, "y": 0, "out": out.pointer, "count": x.size, "width": x.width,
                "pitch": x.pitch}  # fmt: skip
        self.device.launch("copy_rows", grid_of(x.size), BLOCK_THREADS, args)

    def ids(self, ids: Indices) -> DeviceIds:
        """Ids on the device."""
        return (
            ids if isinstance(ids, DeviceIds) else DeviceIds(self.upload(ids, np.int32, len(ids)), len(ids))
        )

    def download(self, x: DeviceArray) -> NDArray[np.float32]:
        x = self.on(x)
        return self.device.download(x.pointer, x.shape, np.float32)

    def matrix(self, weight: Weight) -> DeviceMatrix | DeviceArray:
        """A weight as the kernels take it; a host array as F32 rows padded to whole chunks."""
        if isinstance(weight, DeviceMatrix | DeviceArray):
            return weight
        padded = np.zeros((weight.shape[0], -(-weight.shape[1] // 4) * 4), np.float32)
        padded[:, : weight.shape[1]] = weight
        return DeviceArray(self, self.upload(padded), weight.shape, padded.shape[1])

    def fields(self, weight: DeviceMatrix | DeviceArray) -> tuple[Matrix, str]:
        """Struct Matrix and kernel suffix; rows of values are an F32 matrix where they are whole chunks."""
        if isinstance(weight, DeviceMatrix):
            return weight.fields, weight.kind
        rows, cols = weight.shape
        return Matrix(weight.pointer, 0, 0, 0, rows, cols, -(-cols // 4), 0), "f32"

    def expand(self, weight: DeviceMatrix, rows: int | None = None) -> DeviceArray:
        """The first rows of a matrix, or all, as values."""
        rows = weight.rows if rows is None else rows
        out = self.empty(rows, weight.cols)
        args = {"table": weight.fields, "ids": 0, "out": out.pointer, "rows": rows}
        self.device.launch(f"embed_{weight.kind}", grid_of(rows * weight.pitch), BLOCK_THREADS, args)
        return out

    def rows(self, x: DeviceArray, which: NDArray[Any]) -> DeviceArray:
        """The rows of these indices; a row of whole chunks."""
        whole = self.on(x)
        picked = [whole[int(i) : int(i) + 1] for i in which]
        return self.concatenate(picked) if len(picked) != 1 else picked[0]

    def concatenate(self, arrays: Sequence[Operand]) -> DeviceArray:
        """Rows of all, one below the other; those that lie so already are not moved."""
        parts = [self.on(array) for array in arrays]
        if (whole := neighbours(parts)) is not None:
            return whole
        out = self.empty(sum(map(len, parts)), *parts[0].shape[1:])
        low = 0
        for part in parts:
            self.copy(part, out[low:])
            low += len(part)
        return out
