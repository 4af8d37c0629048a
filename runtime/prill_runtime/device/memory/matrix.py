"""A tensor's bytes come in; device memory in which its blocks lie repacked for 16-byte loads goes out."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_runtime.device.machine.base import Pointer
from prill_runtime.device.memory.arena import Arena
from prill_runtime.errors import UnsupportedModel
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.quants.layouts import STRIP, dequantize

STAGING: Final = 32 << 20
"""Bytes of the file that are on their way to the device at a time; one row at least."""


@dataclass(frozen=True, slots=True)
class Format:
    """How one type lies in device memory.

    Attributes:
        chunk: weights that a lane takes at a time. high: bytes of a chunk's high bits.
        scales, per: bytes of scales for every `per` chunks. block: bytes of scales for every 256 weights.
        quants: bytes of a chunk's values, or of their low bits.
    """

    chunk: int
    high: int = 0
    scales: int = 0
    per: int = 1
    block: int = 0
    quants: int = 16


FORMATS: Final[dict[T, Format]] = {
    T.F32: Format(4),
    T.F16: Format(8),
    T.BF16: Format(8),
    T.Q8_0: Format(16, scales=2, per=2),
    T.Q4_0: Format(32, scales=2),
    T.Q4_1: Format(32, scales=4),
    T.Q5_0: Format(32, high=4, scales=2),
    T.Q5_1: Format(32, high=4, scales=4),
    T.Q4_K: Format(32, scales=2, block=4),
    T.Q5_K: Format(32, high=4, scales=2, block=4),
    T.Q6_K: Format(32, high=8, scales=2, block=2),
    T.Q2_K: Format(32, scales=2, block=4, quants=8),
    T.Q3_K: Format(32, high=4, scales=2, block=2, quants=8),
    T.MXFP4: Format(32, scales=1),
}
PLAIN: Final = (T.F32, T.F16, T.BF16)


def streams(type: T, shape: tuple[int, ...]) -> dict[str, int]:
    """Bytes of each stream of a matrix (out, in): q, h, s and d, those the format has.

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
    """Bytes of a matrix that are on their way to the device at a time."""
    return min(max(STAGING, info.nbytes // prod(info.shape[:-1])), info.nbytes)


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
    def fields(self) -> tuple[int, ...]:
        """The kernel's struct Matrix."""
        at = self.pointers
        return (at["q"], at.get("h", 0), at.get("s", 0), at.get("d", 0),
                self.rows, self.cols, self.pitch, self.cols // 256)  # fmt: skip

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

    def free(self) -> None:
        for pointer in self.pointers.values():
            self._arena.free(pointer)
        self.pointers = {}


def is_zero(raw: NDArray[np.uint8], type: T) -> bool:
    """Whether every weight is zero; looks no further than the first that is not."""
    weights, nbytes = GGML_QUANT_SIZES[type]
    step = max(1, STRIP // weights) * nbytes
    for low in range(0, raw.nbytes, step):
        piece = raw[low : low + step]
        if dequantize(piece, type, (len(piece) // nbytes * weights,)).any():
            return False
    return True
