"""Matrices in device memory, their blocks repacked for 16-byte loads."""

from __future__ import annotations

from copy import copy
from math import prod
from typing import Final, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_runtime.device.machine.base import Pointer
from prill_runtime.device.machine.formats import FORMATS, PLAIN
from prill_runtime.device.memory.arena import Arena
from prill_runtime.errors import UnsupportedModel
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.quants.layouts import STRIP_WEIGHTS, BlockFormat, dequantize

__all__ = ["FORMATS", "PLAIN", "DeviceMatrix", "is_zero", "staging_bytes", "streams"]

STAGED_BYTES: Final = 32 << 20
"""Bytes of the file staged for upload at a time; at least one row."""


def streams(type: T, shape: tuple[int, ...]) -> dict[str, int]:
    """Bytes of each stream of a matrix (out, in): those of q, h, s and d that the format has.

    Raises:
        UnsupportedModel: a type without kernels.
    """
    if type not in FORMATS:
        known = ", ".join(sorted(kind.name for kind in FORMATS))
        raise UnsupportedModel("tensor type has no kernels", expected=f"one of {known}", got=T(type).name)
    form, rows, cols = FORMATS[type], prod(shape[:-1]), shape[-1]
    chunks = rows * -(-cols // form.chunk)
    sizes = {
        "q": form.quants * chunks,
        "h": form.high * chunks,
        "s": -(-chunks // form.per) * form.scales,
        "d": rows * (cols // 256) * form.block,
    }
    return {name: size for name, size in sizes.items() if size}


def staging_bytes(info: TensorInfo) -> int:
    """Bytes of a matrix staged for upload at a time."""
    return min(max(STAGED_BYTES, info.nbytes // prod(info.shape[:-1])), info.nbytes)


class Matrix(NamedTuple):
    """The kernels' struct Matrix."""

    q: Pointer
    h: Pointer
    s: Pointer
    d: Pointer
    rows: int
    cols: int
    pitch: int
    blocks: int


class DeviceMatrix:
    """A matrix (out, in) in device memory.

    Attributes:
        kind: the suffix of its kernels' names. zero: every weight is zero. streams: bytes of each.
    """

    def __init__(self, arena: Arena, type: T, shape: tuple[int, ...], purpose: str = "weights") -> None:
        self.type, self.shape, self.kind = type, shape, T(type).name.lower()
        self.rows, self.cols = prod(shape[:-1]), shape[-1]
        self.zero = False
        self._arena = arena
        self.streams = streams(type, shape)
        self.pitch = -(-self.cols // FORMATS[type].chunk)
        self.pointers: dict[str, Pointer] = {
            name: arena.alloc(purpose, size) for name, size in self.streams.items()
        }

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(self.streams.values())

    @property
    def fields(self) -> Matrix:
        """The kernel's struct Matrix."""
        at = self.pointers
        streams = (at["q"], at.get("h", 0), at.get("s", 0), at.get("d", 0))
        return Matrix(*streams, self.rows, self.cols, self.pitch, self.cols // 256)

    def part(self, first: int, rows: int) -> DeviceMatrix:
        """Some of its rows, in the same memory."""
        view = copy(self)
        view.rows, view.shape = rows, (rows, self.cols)
        view.pointers = {
            name: at + self.streams[name] // self.rows * first for name, at in self.pointers.items()
        }
        view.streams = {name: size // self.rows * rows for name, size in self.streams.items()}
        return view

    def store(self, raw: NDArray[np.uint8], staging: Pointer, room: int) -> None:
        """Upload the tensor's bytes piece by piece and repack each on the device.

        Args:
            raw: as in the file, (nbytes,). staging: device memory of `room` bytes, one row at least.
        """
        device = self._arena.device
        device.module("repack")
        kernel = "repack_plain" if self.type in PLAIN else f"repack_{self.kind}"
        row_bytes = raw.nbytes // self.rows
        step = max(1, min(self.rows, room // row_bytes))
        fields = {name: self.pointers.get(name, 0) for name in "qhsd"}
        for first in range(0, self.rows, step):
            rows = min(step, self.rows - first)
            device.upload(staging, raw[first * row_bytes : (first + rows) * row_bytes])
            args = {**fields, "raw": staging, "rows": rows, "first": first,
                    "row_bytes": row_bytes, "pitch": self.pitch}  # fmt: skip
            device.launch(kernel, (-(-rows * self.pitch // 256),), 256, args)


def is_zero(raw: NDArray[np.uint8], type: T) -> bool:
    """Whether every weight is zero; stops at the first that is not."""
    weights, nbytes = BlockFormat.registry[type].weights, BlockFormat.registry[type].layout.itemsize
    step = max(1, STRIP_WEIGHTS // weights) * nbytes
    for low in range(0, raw.nbytes, step):
        piece = raw[low : low + step]
        if dequantize(piece, type, (len(piece) // nbytes * weights,)).any():
            return False
    return True
