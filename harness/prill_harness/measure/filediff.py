"""Compare two model files, tensor by tensor and key by key.

Weights are compared after dequantising, a strip of rows at a time, so that a quantised file can be compared
with its source. The figure is NMSE: the sum of (a - b)^2 over the sum of a^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from prill_harness.numbers.compare import largest, nmse_of, squares
from prill_runtime.gguf.file import GGUFFile
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.quants.layouts import dequantize, supported_types

STRIP_WEIGHTS = 1 << 20  # weights dequantised at a time; at least one row


class Side(msgspec.Struct, frozen=True):
    """How one file stores a tensor."""

    type: str
    shape: tuple[int, ...]
    nbytes: int


class TensorDiff(msgspec.Struct, frozen=True):
    """One tensor of either file or both.

    Attributes:
        a, b: None if the file has no such tensor.
        same: type, shape and bytes are equal. nmse, largest: of the dequantised weights, and their largest
            difference; None if they cannot be compared. note: why not.
    """

    name: str
    a: Side | None
    b: Side | None
    same: bool
    nmse: float | None = None
    largest: float | None = None
    note: str = ""


class KeyDiff(msgspec.Struct, frozen=True):
    """A metadata key whose values differ; None if the file has no such key.

    Attributes:
        at: for two arrays, the first index at which they differ.
    """

    key: str
    a: Any
    b: Any
    at: int | None = None


class FileDiff(msgspec.Struct, frozen=True):
    """`nmse`: over the weights of all tensors that could be compared; None if there are none."""

    tensors: tuple[TensorDiff, ...]
    metadata: tuple[KeyDiff, ...]
    nmse: float | None

    @property
    def same(self) -> bool:
        return not self.metadata and all(tensor.same for tensor in self.tensors)


def compare(a: GGUFFile, b: GGUFFile) -> FileDiff:
    """Compare B with A; neither needs to be a whole model.

    Tensors come in A's order, followed by those that only B has; so do keys.
    """
    tensors, error, energy, compared = [], 0.0, 0.0, False
    for name in dict.fromkeys((*a.tensors, *b.tensors)):
        found, sums = _tensor(name, a, b)
        tensors.append(found)
        if sums is not None:
            error, energy, compared = error + sums[0], energy + sums[1], True
    keys = [key for key in dict.fromkeys((*a.metadata, *b.metadata)) if not _equal(a, b, key)]
    metadata = tuple(_key(key, a.metadata.get(key), b.metadata.get(key)) for key in keys)
    return FileDiff(tuple(tensors), metadata, nmse_of(error, energy) if compared else None)


def _equal(a: GGUFFile, b: GGUFFile, key: str) -> bool:
    """Whether both have the key with values of one type that are equal, or both NaN."""
    if key not in a.metadata or key not in b.metadata:
        return False
    left, right = a.metadata[key], b.metadata[key]
    return type(left) is type(right) and repr(left) == repr(right)


def _key(key: str, a: Any, b: Any) -> KeyDiff:
    if not (isinstance(a, list) and isinstance(b, list)):
        return KeyDiff(key, a, b)
    shorter = min(len(a), len(b))
    return KeyDiff(key, a, b, next((at for at in range(shorter) if a[at] != b[at]), shorter))


def _tensor(name: str, a: GGUFFile, b: GGUFFile) -> tuple[TensorDiff, tuple[float, float] | None]:
    """The result for one tensor, and its sums of squares if the weights were compared."""
    left, right = a.tensors.get(name), b.tensors.get(name)
    sides = _side(left), _side(right)
    if left is None or right is None:
        return TensorDiff(name, *sides, False, note=f"only in {'B' if left is None else 'A'}"), None
    if left.shape != right.shape:
        return TensorDiff(name, *sides, False, note="another shape"), None
    same = left.type == right.type and np.array_equal(a.raw(name), b.raw(name))
    unknown = [info.type.name for info in (left, right) if info.type not in supported_types()]
    if unknown:
        figure, note = (0.0, "") if same else (None, f"no decoder for {unknown[0]}")
        return TensorDiff(name, *sides, same, figure, figure, note), None
    error = energy = furthest = 0.0
    for x, y in zip(_strips(a, left), _strips(b, right), strict=True):
        sums = (0.0, squares(x, y)[1]) if same else squares(x, y)
        error, energy = error + sums[0], energy + sums[1]
        if not same:
            furthest = largest(furthest, _largest(x, y))
    note = "" if math.isfinite(error + energy) else "not finite"
    return TensorDiff(name, *sides, same, nmse_of(error, energy), furthest, note), (error, energy)


def _side(info: TensorInfo | None) -> Side | None:
    return None if info is None else Side(info.type.name, info.shape, info.nbytes)


def _strips(file: GGUFFile, info: TensorInfo) -> Iterator[NDArray[np.float64]]:
    """The tensor's weights in order, some rows at a time."""
    raw, columns = file.raw(info.name), info.shape[-1]
    rows = math.prod(info.shape[:-1])
    row_bytes, step = info.nbytes // rows, max(1, STRIP_WEIGHTS // columns)
    for low in range(0, rows, step):
        count = min(step, rows - low)
        part = raw[low * row_bytes : (low + count) * row_bytes]
        yield dequantize(part, info.type, (count, columns)).astype(np.float64)


def _largest(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The largest difference; infinite if only one of two values is finite."""
    with np.errstate(invalid="ignore"):
        difference = float(np.abs(x - y).max())
    return math.inf if math.isnan(difference) else difference
