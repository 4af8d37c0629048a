"""Decode a tensor's blocks to float32 weights, bit for bit as the formats define them.

Source of the formats: ggml-quants.c and ggml-common.h of ggml. The order of the float32 operations is part of
the definition, since each one rounds.
"""

# ruff: noqa: N801 (the classes bear the names of the formats)

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any, ClassVar, Final

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_runtime.errors import InvalidParameter, UnsupportedModel

# Weights decoded at a time: keeps the temporaries small enough for the CPU's cache.
STRIP_WEIGHTS: Final = 1 << 16

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Fields = NDArray[np.void]


class BlockFormat(ABC):
    """One block format, declared by its type and the layout of a block's bytes.

    Attributes:
        type: the ggml type.
        layout: packed little-endian fields of one block.
        weights: in one block.
    """

    type: ClassVar[T]
    layout: ClassVar[np.dtype[np.void]]
    weights: ClassVar[int]
    registry: ClassVar[dict[T, type[BlockFormat]]] = {}

    def __init_subclass__(cls, type: T, layout: list[tuple[Any, ...]]) -> None:
        cls.type, cls.layout = type, np.dtype(layout)
        cls.weights, nbytes = GGML_QUANT_SIZES[type]
        if cls.layout.itemsize != nbytes:
            raise TypeError(f"{type.name}: a block is {nbytes} bytes, its layout {cls.layout.itemsize}")
        cls.registry[type] = cls

    @staticmethod
    @abstractmethod
    def decode(b: Fields) -> NDArray[Any]:
        """Decode the fields (n,) of n blocks to float32; the last axes hold each block's weights in order."""


def dequantize(raw: Bytes, type: T, shape: tuple[int, ...]) -> Floats:
    """Decode a whole tensor.

    Args:
        raw: the tensor's bytes, shape (nbytes,).
        type: a supported type.
        shape: of the result, row-major; rows are whole blocks.

    Returns:
        A new array of that shape, never a view of `raw`.

    Raises:
        UnsupportedModel: the type has no decoder here.
        InvalidParameter: the bytes do not fit the shape.
    """
    block = BlockFormat.registry.get(type)
    if block is None:
        known = ", ".join(known.name for known in supported_types())
        raise UnsupportedModel("tensor type has no decoder", expected=f"one of {known}", got=T(type).name)
    count = prod(shape)
    n_blocks, rest = divmod(count, block.weights)
    if rest or raw.nbytes != n_blocks * block.layout.itemsize or (shape and shape[-1] % block.weights):
        raise InvalidParameter(
            f"bytes of a {type.name} tensor do not fit its shape {shape}",
            expected=f"rows of {block.weights} weights in {block.layout.itemsize} bytes",
            got=f"{raw.nbytes} bytes",
        )
    fields = np.ascontiguousarray(raw).view(block.layout)  # (block,)
    out = np.empty((n_blocks, block.weights), np.float32)
    step = STRIP_WEIGHTS // block.weights
    with np.errstate(all="ignore"):  # infinite and NaN scales are the file's own, and go through
        for start in range(0, n_blocks, step):
            part = fields[start : start + step]
            out[start : start + step] = block.decode(part).reshape(len(part), block.weights)
    return out.reshape(shape)


def supported_types() -> tuple[T, ...]:
    """Every type that dequantize() decodes, in the order of ggml's numbering."""
    return tuple(sorted(BlockFormat.registry))


def scale(field: NDArray[Any]) -> Floats:
    """A half-precision scale per block, (block,) to (block, 1) float32."""
    return field.astype(np.float32)[:, None]


def pieces(packed: Bytes, bits: int) -> Bytes:
    """Split bytes into `bits`-wide numbers, low bits first: (…, byte) to (…, 8 / bits, byte)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


class F32(BlockFormat, type=T.F32, layout=[("x", "<f4")]):
    """Weights as they are."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        return b["x"]


class F16(BlockFormat, type=T.F16, layout=[("x", "<f2")]):
    """IEEE half precision."""

    @staticmethod
    def decode(b: Fields) -> NDArray[Any]:
        return b["x"].astype(np.float32)


class BF16(BlockFormat, type=T.BF16, layout=[("x", "<u2")]):
    """The upper half of a float32."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        return (b["x"].astype(np.uint32) << np.uint32(16)).view(np.float32)


class Q8_0(BlockFormat, type=T.Q8_0, layout=[("d", "<f2"), ("q", "i1", 32)]):
    """d q, q signed 8-bit."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        return scale(b["d"]) * b["q"].astype(np.float32)


class Q4_0(BlockFormat, type=T.Q4_0, layout=[("d", "<f2"), ("q", "u1", 16)]):
    """d (q - 8); the low nibbles hold the first half of the block, the high ones the second."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        q = pieces(b["q"], 4).reshape(-1, 32)
        return scale(b["d"]) * (q.astype(np.float32) - np.float32(8))


class Q4_1(BlockFormat, type=T.Q4_1, layout=[("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]):
    """d q + m, nibbles as in Q4_0."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        q = pieces(b["q"], 4).reshape(-1, 32)
        return scale(b["d"]) * q.astype(np.float32) + scale(b["m"])


def _five_bits(b: Fields) -> Floats:
    """Nibbles as in Q4_0, the fifth bits in one 32-bit mask: (block, 32)."""
    high = np.unpackbits(b["h"], axis=-1, bitorder="little")
    return (pieces(b["q"], 4).reshape(-1, 32) | (high << np.uint8(4))).astype(np.float32)


class Q5_0(BlockFormat, type=T.Q5_0, layout=[("d", "<f2"), ("h", "u1", 4), ("q", "u1", 16)]):
    """d (q - 16)."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        return scale(b["d"]) * (_five_bits(b) - np.float32(16))


class Q5_1(BlockFormat, type=T.Q5_1, layout=[("d", "<f2"), ("m", "<f2"), ("h", "u1", 4), ("q", "u1", 16)]):
    """d q + m."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        return scale(b["d"]) * _five_bits(b) + scale(b["m"])


class Q2_K(
    BlockFormat, type=T.Q2_K, layout=[("s", "u1", 16), ("q", "u1", (2, 32)), ("d", "<f2"), ("dmin", "<f2")]
):
    """(d s) q - (dmin m): 16 groups of 16, scale s in the low nibble, minimum m in the high one."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        s, m = b["s"] & np.uint8(15), b["s"] >> np.uint8(4)  # (block, group)
        q = pieces(b["q"], 2).reshape(-1, 16, 16).astype(np.float32)
        return _grouped(b["d"], s) * q - _grouped(b["dmin"], m)


class Q3_K(
    BlockFormat, type=T.Q3_K, layout=[("h", "u1", 32), ("q", "u1", (2, 32)), ("s", "u1", 12), ("d", "<f2")]
):
    """(d (s - 32)) (q - 4): 16 groups of 16; third bits in a mask, scales 4 + 2 bits."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        low = pieces(b["s"][:, :8], 4).reshape(-1, 16)
        high = pieces(b["s"][:, 8:], 2).reshape(-1, 16)
        s = (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)  # (block, group)
        third = pieces(b["h"], 1).reshape(-1, 16, 16)
        q = pieces(b["q"], 2).reshape(-1, 16, 16) | (third << np.uint8(2))
        return _grouped(b["d"], s) * (q.astype(np.float32) - np.float32(4))


class Q4_K(
    BlockFormat, type=T.Q4_K, layout=[("d", "<f2"), ("dmin", "<f2"), ("s", "u1", 12), ("q", "u1", (4, 32))]
):
    """(d s) q - (dmin m): 8 groups of 32."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        s, m = _six_bit_pairs(b["s"])
        q = pieces(b["q"], 4).reshape(-1, 8, 32).astype(np.float32)
        return _grouped(b["d"], s) * q - _grouped(b["dmin"], m)


class Q5_K(
    BlockFormat,
    type=T.Q5_K,
    layout=[("d", "<f2"), ("dmin", "<f2"), ("s", "u1", 12), ("h", "u1", 32), ("q", "u1", (4, 32))],
):
    """Q4_K with the fifth bit of group i in bit i of the mask's bytes."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        s, m = _six_bit_pairs(b["s"])
        q = pieces(b["q"], 4).reshape(-1, 8, 32) | (pieces(b["h"], 1) << np.uint8(4))
        return _grouped(b["d"], s) * q.astype(np.float32) - _grouped(b["dmin"], m)


class Q6_K(
    BlockFormat,
    type=T.Q6_K,
    layout=[("l", "u1", (2, 64)), ("h", "u1", (2, 32)), ("s", "i1", 16), ("d", "<f2")],
):
    """(d s) (q - 32): 16 groups of 16; low nibbles and upper two bits apart."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        low = pieces(b["l"], 4).reshape(-1, 16, 16)
        high = pieces(b["h"], 2).reshape(-1, 16, 16)
        q = (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)
        return _grouped(b["d"], b["s"]) * q


# Twice the E2M1 values; the exponent below is therefore halved.
_E2M1: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
# 2^(e - 128), subnormal for e of 0 and 1
_E8M0_HALF: Final = np.ldexp(np.ones(256, np.float32), np.arange(256) - 128).astype(np.float32)


class MXFP4(BlockFormat, type=T.MXFP4, layout=[("e", "u1"), ("q", "u1", 16)]):
    """2^(e - 127) times an E2M1 number (OCP Microscaling Formats 1.0), nibbles as in Q4_0."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        d: Floats = _E8M0_HALF[b["e"]][:, None]
        q: Floats = _E2M1[pieces(b["q"], 4).reshape(-1, 32)]
        return d * q


# Sixteen levels that are closer together where weights are more frequent (ggml-quants, kvalues_iq4nl).
_LEVELS: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # fmt: skip


class IQ4_NL(BlockFormat, type=T.IQ4_NL, layout=[("d", "<f2"), ("q", "u1", 16)]):
    """d times a level, nibbles as in Q4_0."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        return scale(b["d"]) * _LEVELS[pieces(b["q"], 4).reshape(-1, 32)]


class IQ4_XS(
    BlockFormat, type=T.IQ4_XS, layout=[("d", "<f2"), ("t", "<u2"), ("s", "u1", 4), ("q", "u1", (8, 16))]
):
    """(d (s - 32)) times a level: 8 groups of 32, each with nibbles as in Q4_0; scales 4 + 2 bits."""

    @staticmethod
    def decode(b: Fields) -> Floats:
        low = np.stack([b["s"] & np.uint8(15), b["s"] >> np.uint8(4)], axis=-1).reshape(-1, 8)
        high = (b["t"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & np.uint16(3)
        s = (low | (high << np.uint16(4))).astype(np.float32) - np.float32(32)  # (block, group)
        return _grouped(b["d"], s) * _LEVELS[pieces(b["q"], 4).reshape(-1, 8, 32)]


def _grouped(d: NDArray[Any], s: NDArray[Any]) -> Floats:
    """The block's scale times each group's, rounded to float32: (block, group, 1)."""
    return (scale(d) * s.astype(np.float32))[..., None]


def _six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes hold 8 scales and 8 minima of 6 bits: (block, 12) to two of (block, 8).

    Groups 0-3 lie in the low six bits of bytes 0-3 (scales) and 4-7 (minima); groups 4-7 have their low
    nibbles in bytes 8-11 and their upper two bits on top of bytes 0-3 and 4-7.
    """
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = [first & np.uint8(63), (low & np.uint8(15)) | (first >> np.uint8(6) << np.uint8(4))]
    minima = [second & np.uint8(63), (low >> np.uint8(4)) | (second >> np.uint8(6) << np.uint8(4))]
    return np.concatenate(scales, axis=-1), np.concatenate(minima, axis=-1)
