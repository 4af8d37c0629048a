"""Read the tensor table: names, shapes, types and byte ranges, all checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from prill_runtime.gguf.header import Cursor, quoted

MAX_TENSORS: Final = 16_384
MAX_NAME: Final = 64
MAX_DIMS: Final = 4
# name length, one letter, dimension count, one dimension, type, offset
SMALLEST_ENTRY: Final = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, shape and type of one tensor, wherever it is stored.

    Attributes:
        name: as the file spells it.
        shape: in row-major order, GGUF's dimensions reversed; a matrix is (out, in).
        type: the block format of the bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Length in bytes, padding excluded."""
        per_block, block_bytes = GGML_QUANT_SIZES[self.type]
        return int(prod(self.shape) // per_block * block_bytes)


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorInfo):
    """A tensor of a file, and where it lies.

    Attributes:
        offset: of the first byte, from the start of the file.
        part: of a split model, the file that holds it, counted from 0.
    """

    offset: int
    part: int = 0


def read_table(cursor: Cursor, count: int, alignment: int) -> dict[str, StoredTensor]:
    """Read `count` entries and locate their data behind the table, every byte range checked against the file.

    Raises:
        ModelFileError: an entry is malformed, misplaced, or overlaps another.
    """
    entries: dict[str, tuple[int, TensorInfo, int]] = {}
    for _ in range(count):
        at = cursor.pos
        info, from_data = _read_entry(cursor, alignment)
        if info.name in entries:
            raise cursor.fail("duplicate tensor", at=at, expected="a new name", got=quoted(info.name))
        entries[info.name] = at, info, from_data
    start = -(-cursor.pos // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, (at, info, from_data) in entries.items():
        offset = start + from_data
        if offset + info.nbytes > cursor.size:
            raise cursor.fail(
                f"data of tensor {quoted(name)} runs past the end of the file",
                at=at,
                expected=f"bytes {offset} to {offset + info.nbytes}",
                got=f"a file of {cursor.size} bytes",
            )
        tensors[name] = StoredTensor(name, info.shape, info.type, offset)
    _check_layout(cursor, min(start, cursor.size), tensors.values(), alignment)
    return tensors


def _read_entry(cursor: Cursor, alignment: int) -> tuple[TensorInfo, int]:
    """One entry, and its offset from the start of the data."""
    name = cursor.text("tensor name", MAX_NAME)
    if not name:
        raise cursor.fail("empty tensor name", at=cursor.pos - 8, expected=f"1 to {MAX_NAME} bytes", got=0)
    tensor = f"tensor {quoted(name)}"
    at = cursor.pos
    n_dims = cursor.integer(GGUFValueType.UINT32, f"dimension count of {tensor}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"dimension count of {tensor}", at=at, expected=f"1 to {MAX_DIMS}", got=n_dims)
    at = cursor.pos
    dims = [cursor.integer(GGUFValueType.UINT64, f"dimension of {tensor}") for _ in range(n_dims)]
    if 0 in dims:
        raise cursor.fail(f"dimension of {tensor}", at=at, expected="at least 1", got=0)
    if prod(dims) >= 2**63:
        raise cursor.fail(f"dimensions of {tensor} overflow", at=at, expected="below 2^63 weights", got=dims)
    type_at = cursor.pos
    type = _tensor_type(cursor, tensor)
    per_block, _ = GGML_QUANT_SIZES[type]
    if dims[0] % per_block:
        raise cursor.fail(
            f"row of {tensor} is not whole blocks of {type.name}",
            at=at,
            expected=f"a multiple of {per_block}",
            got=dims[0],
        )
    info = TensorInfo(name, tuple(reversed(dims)), type)
    if info.nbytes > cursor.size:
        raise cursor.fail(
            f"{tensor} is larger than the file and runs past the end of it",
            at=type_at,
            expected=f"at most {cursor.size} bytes",
            got=f"{info.nbytes} ({type.name}, {dims})",
        )
    at = cursor.pos
    offset = cursor.integer(GGUFValueType.UINT64, f"offset of {tensor}")
    if offset % alignment:
        raise cursor.fail(
            f"offset of {tensor} is misaligned", at=at, expected=f"a multiple of {alignment}", got=offset
        )
    return info, offset


def _tensor_type(cursor: Cursor, tensor: str) -> GGMLQuantizationType:
    at = cursor.pos
    number = cursor.integer(GGUFValueType.UINT32, f"type of {tensor}")
    try:
        return GGMLQuantizationType(number)
    except ValueError:
        raise cursor.fail(
            f"unknown or removed type of {tensor}", at=at, expected="a ggml tensor type", got=number
        ) from None


def _check_layout(cursor: Cursor, start: int, tensors: Iterable[StoredTensor], alignment: int) -> None:
    """Check that the data are contiguous but for padding, from `start` to the end of the file.

    A wrong tensor count would otherwise shift every tensor's data and show no other sign.
    """
    end, before = start, "the header"
    for info in sorted(tensors, key=lambda info: info.offset):
        name = f"tensor {quoted(info.name)}"
        if info.offset < end:
            raise cursor.fail(f"{name} overlaps {before}", at=info.offset, expected=f"no data before {end}")
        _check_gap(cursor, end, info.offset, f"between {before} and {name}", alignment)
        end, before = info.offset + info.nbytes, name
    _check_gap(cursor, end, cursor.size, f"between {before} and the end of the file", alignment)


def _check_gap(cursor: Cursor, start: int, end: int, place: str, alignment: int) -> None:
    if end - start >= alignment:
        raise cursor.fail(
            f"bytes {place} belong to no tensor",
            at=start,
            expected=f"less than {alignment} of padding",
            got=end - start,
        )
