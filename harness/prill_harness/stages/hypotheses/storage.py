"""Ways to read a tensor's bytes wrong: decoded by other rules, or from another place."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
from numpy.typing import NDArray

from prill_harness.stages.hypotheses.case import Array, Case

ALIGNMENT = 32  # bytes, the format's default
Bytes = NDArray[np.uint8]


def misreadings(case: Case, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """(clause, float64 array of `shape`) for each way to misread the tensor; none without its bytes."""
    found = case.raw(name)
    if found is None:
        return
    data, kind = found
    for clause, wrong in decodings(data, kind):
        yield clause, wrong.reshape(shape)
    for shift in (-ALIGNMENT, ALIGNMENT):
        moved = case.raw(name, shift)
        if moved is not None:
            side = "before" if shift < 0 else "after"
            clause = f"read {ALIGNMENT} bytes {side} its place (offset off by one alignment)"
            yield clause, decoded(moved[0], kind).reshape(shape)


def decoded(data: Bytes, kind: str) -> Array:
    """Blocks of a type as float64, flat."""
    quant = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[quant]
    if kind in ("F32", "F16", "BF16"):
        data = data[: data.size - data.size % size]
    with np.errstate(invalid="ignore"):  # bytes from the wrong place may be NaN
        return np.asarray(gguf.quants.dequantize(data.reshape(-1, size), quant), np.float64).reshape(-1)


def _bfloat(bits: NDArray[np.uint16]) -> Array:
    return np.asarray((bits.astype(np.uint32) << 16).view(np.float32), np.float64)


def decodings(data: Bytes, kind: str) -> Iterator[tuple[str, Array]]:
    """The textbook ways to decode a block type wrongly."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    block = np.ascontiguousarray(data).reshape(-1, size)
    right = decoded(data, kind)
    if kind == "F16":
        yield "float16 read as bfloat16", _bfloat(block.reshape(-1).view(np.uint16))
    if kind == "BF16":
        yield "bfloat16 read as float16", block.reshape(-1).view(np.float16).astype(np.float64)
    if kind == "F32":
        yield (
            "float32 read as float16",
            np.resize(block.reshape(-1).view(np.float16), right.shape).astype(float),
        )
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"):
        halves = right.reshape(-1, 2, 16)
        yield "nibbles interleaved instead of low half then high half", halves.swapaxes(1, 2)
        yield "low and high nibbles exchanged", halves[:, ::-1]
    if kind == "Q8_0":
        quants = block[:, 2:].view(np.int8).astype(np.float64)
        yield "block scale read as bfloat16", quants * _bfloat(block[:, :2].copy().view(np.uint16))
    if kind in ("Q8_0", "Q4_0", "Q5_0"):
        scale = block[:, :2].copy().view(np.float16).astype(np.float64)
        quants = right.reshape(len(block), -1) / np.where(scale == 0, 1, scale)
        yield "block scale left out", quants
        yield "block scales shifted by one block", quants * np.roll(scale, 1, axis=0)
    if kind == "Q4_0":
        yield "offset of 8 left out", right.reshape(len(block), -1) + 8 * scale
    if kind == "Q8_0":
        yield "quants read as unsigned", block[:, 2:].astype(np.float64) * scale
    if kind == "MXFP4":
        yield "E8M0 scale twice as large", right * 2
        yield "E8M0 scale half as large", right / 2
    if kind in ("Q4_K", "Q5_K"):
        bare = block.copy()
        bare[:, 16:] = 0  # no quants: minus the minimum is left
        minimum = decoded(bare, kind)
        yield "minimum added instead of subtracted", right - 2 * minimum
        yield "minimum left out", right - minimum
    if kind == "Q4_K":
        yield "low and high nibbles exchanged", _nibbles(block, 16)
    if kind == "Q6_K":
        high = block[:, 128:192]
        for clause, bits in (
            ("high bits of the two halves exchanged", ((high & 0x33) << 2) | ((high & 0xCC) >> 2)),
            ("high bits in reverse order",
             ((high & 3) << 6) | ((high & 12) << 2) | ((high & 48) >> 2) | ((high & 192) >> 6)),
            ("high bits left out", high * 0),
        ):  # fmt: skip
            wrong = block.copy()
            wrong[:, 128:192] = bits
            yield clause, decoded(wrong, kind)


def _nibbles(block: Bytes, start: int) -> Array:
    wrong = block.copy()
    wrong[:, start:] = (block[:, start:] << 4) | (block[:, start:] >> 4)
    return decoded(wrong, "Q4_K")
