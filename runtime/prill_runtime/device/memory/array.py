"""Arrays in device memory as forward passes see them: rows that can be reshaped and sliced in place."""

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
    """Memory of an arena, freed with the last array that refers to it."""

    def __init__(self, pointer: Pointer, free: Callable[[Pointer], None]) -> None:
        self.pointer, self._free = pointer, free

    def __del__(self) -> None:
        self._free(self.pointer)


class DeviceArray:
    """float32 rows in device memory: (row, …), `pitch` values from row to row, each row contiguous.

    It supports what forward passes do to an array between two ops; `copy` and NumPy make a host copy.
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
        self.order: Allocation | None = None  # which rows each expert has, once experts have been multiplied
        self.whole: DeviceArray | None = None  # the rows that these are part of
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
        """Memory (row, width) for what a kernel is about to compute from these rows.

        If these are some rows of an array, it is the same rows of one shared result as long as another part
        of that is held, so that the results for the sequences of a batch are contiguous.
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
    """Arrays as one if they are contiguous already, else None."""
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
    """Integers (row,) in device memory; `tables` caches what was computed from them, by its other inputs."""

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
    """A grid with at least `count` threads."""
    return (max(1, -(-count // threads)),)


class DeviceMemory:
    """Makes, fills, joins and reads the arrays of one device and one arena.

    Results live in the arena's region for activations until the last array that refers to them is gone.
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
        """Memory of the arena, as `Region.alloc`; activations of a step are padded row by row."""
        return Allocation(self.arena.alloc(purpose, nbytes, rows, passing), self.arena.free)

    @contextmanager
    def results(self, purpose: str) -> Iterator[None]:
        """Put the results of the ops inside into this region of the arena, to be read and freed at once."""
        self._results = purpose
        try:
            yield
        finally:
            self._results = None

    def upload(self, array: NDArray[Any], dtype: DTypeLike = np.float32, rows: int = 1) -> Allocation:
        """Copy a host array to the device, padded for so many rows."""
        host = np.ascontiguousarray(array, dtype)
        allocation = self.allocate(host.nbytes, rows=rows)
        self.device.upload(allocation.pointer, host)
        return allocation

    def on(self, x: Weight) -> DeviceArray:
        """x as contiguous rows on the device, uploaded if it is a host array."""
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
        """A weight in the form that kernels take; a host array becomes F32 rows padded to whole chunks."""
        if isinstance(weight, DeviceMatrix | DeviceArray):
            return weight
        padded = np.zeros((weight.shape[0], -(-weight.shape[1] // 4) * 4), np.float32)
        padded[:, : weight.shape[1]] = weight
        return DeviceArray(self, self.upload(padded), weight.shape, padded.shape[1])

    def fields(self, weight: DeviceMatrix | DeviceArray) -> tuple[Matrix, str]:
        """Struct Matrix and kernel suffix; an array counts as an F32 matrix if its rows are whole chunks."""
        if isinstance(weight, DeviceMatrix):
            return weight.fields, weight.kind
        rows, cols = weight.shape
        return Matrix(weight.pointer, 0, 0, 0, rows, cols, -(-cols // 4), 0), "f32"

    def expand(self, weight: DeviceMatrix, rows: int | None = None) -> DeviceArray:
        """The first rows of a matrix, or all, dequantised."""
        rows = weight.rows if rows is None else rows
        out = self.empty(rows, weight.cols)
        args = {"table": weight.fields, "ids": 0, "out": out.pointer, "rows": rows}
        self.device.launch(f"embed_{weight.kind}", grid_of(rows * weight.pitch), BLOCK_THREADS, args)
        return out

    def rows(self, x: DeviceArray, which: NDArray[Any]) -> DeviceArray:
        """The rows with these indices; each must be whole chunks."""
        whole = self.on(x)
        picked = [whole[int(i) : int(i) + 1] for i in which]
        return self.concatenate(picked) if len(picked) != 1 else picked[0]

    def concatenate(self, arrays: Sequence[Operand]) -> DeviceArray:
        """The rows of all arrays, one below the other; not copied if they are contiguous already."""
        parts = [self.on(array) for array in arrays]
        if (whole := neighbours(parts)) is not None:
            return whole
        out = self.empty(sum(map(len, parts)), *parts[0].shape[1:])
        low = 0
        for part in parts:
            self.copy(part, out[low:])
            low += len(part)
        return out
