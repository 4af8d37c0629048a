"""Device memory as the forward passes see it: rows with a shape, that reshape and slice without moving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import numpy as np
from numpy.typing import DTypeLike, NDArray

from prill_runtime.device.machine.base import Pointer
from prill_runtime.errors import PrillError

if TYPE_CHECKING:
    from prill_runtime.device.ops.backend import CudaBackend

F32: Final = np.dtype(np.float32)


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
        ops: CudaBackend,
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
        """Some rows: a slice or an array of indices; or `[:, i]`, one part of every row."""
        if isinstance(key, slice):
            low, high, step = key.indices(self.shape[0])
            if step != 1:
                raise PrillError("rows are sliced one by one", where="device array", got=key)
            shape = (max(high - low, 0), *self.shape[1:])
            part = DeviceArray(self.ops, self.allocation, shape, self.pitch, self.offset + low * self.pitch)
            part.whole = None if shape == self.shape else self.whole or self
            return part
        if isinstance(key, tuple) and len(key) == 2 and key[0] == slice(None) and self.ndim > 2:
            inner = prod(self.shape[2:])
            shape = (self.shape[0], *self.shape[2:])
            return DeviceArray(
                self.ops, self.allocation, shape, self.pitch, self.offset + int(key[1]) * inner
            )
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

    @property
    def pointer(self) -> Pointer:
        return self.allocation.pointer + self.offset

    def __len__(self) -> int:
        return self.count
