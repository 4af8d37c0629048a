"""Read scalars, strings and arrays from a GGUF header, each checked, or fail in one sentence.

Nothing is allocated before its length is checked against the file, and less than 64 MB is held until the
whole header has proved sound: the strings of arrays stay undecoded in the header buffer.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import Any, Final, TypeAlias, overload

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from prill_runtime.errors import ModelFileError

Value: TypeAlias = int | float | bool | str | list[Any]

READ_BYTES: Final = 1 << 20
MAX_HEADER: Final = 32 << 20  # bytes; vocabularies of 200,000 tokens with merges need 13 MB
MAX_TEXT: Final = 2 << 20  # bytes of all single strings together
MAX_ELEMENTS: Final = 3 << 19  # array elements of all arrays together
MAX_KEYS: Final = 16_384
MAX_KEY: Final = 65_535
# key length, one letter, value type, one byte of value
SMALLEST_PAIR: Final = 8 + 1 + 4 + 1

_FORMATS: Final = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "B",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_STRUCTS: Final = {type: struct.Struct(f"<{letter}") for type, letter in _FORMATS.items()}
_DTYPES: Final = {type: np.dtype(f"<{letter}") for type, letter in _FORMATS.items()}


def quoted(text: str) -> str:
    """Text from the file, escaped and shortened for a one-line sentence."""
    return ascii(text if len(text) <= 64 else f"{text[:61]}...")


class Strings(Sequence[str]):
    """A checked array of strings, decoded one at a time out of the header buffer."""

    def __init__(self, buffer: bytearray, starts: array[int]) -> None:
        self._buffer, self._starts = buffer, starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._starts[index]
        length = int.from_bytes(self._buffer[start - 8 : start], "little")
        return self._buffer[start : start + length].decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        buffer, length_at = self._buffer, _STRUCTS[GGUFValueType.UINT64].unpack_from
        for start in self._starts:
            (length,) = length_at(buffer, start - 8)
            yield buffer[start : start + length].decode("utf-8")


Packed: TypeAlias = int | float | bool | str | Strings | NDArray[Any]


def unpacked(value: Packed) -> Value:
    """A value as callers see it: arrays become lists."""
    if isinstance(value, Strings):
        return list(value)
    return value.tolist() if isinstance(value, np.ndarray) else value


class Cursor:
    """A position in the header of an open file; every method checks, then advances.

    Raises:
        ModelFileError: from every method, when the file breaks the format there.
    """

    def __init__(self, file: FileIO, size: int, path: str) -> None:
        self.pos, self.size = 0, size
        self._file, self.path = file, path
        self._buffer = bytearray()
        self._text = self._elements = 0

    def fail(
        self, what: str, *, at: int | None = None, expected: object = None, got: object = None
    ) -> ModelFileError:
        """The error for a defect at byte `at` (default: here)."""
        where = f"{self.path}, byte {self.pos if at is None else at}"
        return ModelFileError(what, where=where, expected=expected, got=got)

    def take(self, length: int, what: str) -> int:
        """Read `length` more bytes into the buffer and step over them; returns the offset of the first."""
        start, end = self.pos, self.pos + length
        if end > self.size:
            raise self.fail(
                f"{what} runs past the end of the file",
                expected=f"{length} bytes",
                got=f"{self.size - start} left",
            )
        if end > MAX_HEADER:
            raise self.fail(
                f"{what} makes the header too large", expected=f"at most {MAX_HEADER} bytes", got=end
            )
        while len(self._buffer) < end:
            chunk = self._file.read(min(READ_BYTES, MAX_HEADER - len(self._buffer)))
            if not chunk:
                raise self.fail(f"{what} is cut off", expected=f"{length} bytes", got=len(self._buffer))
            self._buffer += chunk
        self.pos = end
        return start

    def room_for(self, count: int, smallest: int, limit: int, what: str, at: int) -> None:
        """Refuse a count that the rest of the file cannot hold, or that exceeds the limit."""
        left = self.size - self.pos
        if count * smallest > left:
            most = left // smallest
            raise self.fail(
                f"{what} runs past the end of the file", at=at, expected=f"at most {most}", got=count
            )
        if count > limit:
            raise self.fail(f"{what} is too large", at=at, expected=f"at most {limit}", got=count)

    def number(self, type: GGUFValueType, what: str) -> int | float | bool:
        """One little-endian number or truth value."""
        reader = _STRUCTS[type]
        start = self.take(reader.size, what)
        (value,) = reader.unpack_from(self._buffer, start)
        if type == GGUFValueType.BOOL:
            if value > 1:
                raise self.fail(f"truth value of {what}", at=start, expected="0 or 1", got=value)
            return bool(value)
        return value  # type: ignore[no-any-return]

    def integer(self, type: GGUFValueType, what: str) -> int:
        """One number of an integer type."""
        return int(self.number(type, what))

    def bytes(self, length: int, what: str) -> bytes:
        """The next bytes, as they are."""
        start = self.take(length, what)
        return bytes(self._buffer[start : start + length])

    def text(self, what: str, limit: int | None = None) -> str:
        """A length and that many bytes of UTF-8."""
        at = self.pos
        length = self.integer(GGUFValueType.UINT64, f"length of {what}")
        self.room_for(length, 1, MAX_TEXT if limit is None else limit, f"length of {what}", at)
        if limit is None:
            self._text += length
            if self._text > MAX_TEXT:
                raise self.fail("too much text", at=at, expected=f"at most {MAX_TEXT} bytes", got=self._text)
        return self._decoded(self.take(length, what), length, what)

    def value(self, key: str) -> tuple[GGUFValueType, Packed]:
        """A value type and the value itself; for an array the type is ARRAY."""
        type = self._value_type(f"value type of {key}")
        if type == GGUFValueType.STRING:
            return type, self.text(key)
        return type, self._array(key) if type == GGUFValueType.ARRAY else self.number(type, key)

    def _value_type(self, what: str) -> GGUFValueType:
        at = self.pos
        number = self.integer(GGUFValueType.UINT32, what)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.fail(f"unknown {what}", at=at, expected="0 to 12", got=number) from None

    def _array(self, key: str) -> Strings | NDArray[Any]:
        at = self.pos
        type = self._value_type(f"element type of {key}")
        if type == GGUFValueType.ARRAY:
            raise self.fail(f"nested array in {key}", at=at, expected="an array of values", got="of arrays")
        count_at = self.pos
        count = self.integer(GGUFValueType.UINT64, f"element count of {key}")
        size = 8 if type == GGUFValueType.STRING else _STRUCTS[type].size
        self.room_for(count, size, MAX_ELEMENTS - self._elements, f"element count of {key}", count_at)
        self._elements += count
        if type == GGUFValueType.STRING:
            return self._strings(count, key)
        start = self.take(count * size, f"array {key}")
        values = np.frombuffer(bytes(self._buffer[start : self.pos]), _DTYPES[type])
        if type != GGUFValueType.BOOL:
            return values
        if (wrong := np.flatnonzero(values > 1)).size:
            at = start + int(wrong[0])
            raise self.fail(f"truth value in {key}", at=at, expected="0 or 1", got=int(values[wrong[0]]))
        return values.astype(np.bool_)

    def _strings(self, count: int, key: str) -> Strings:
        """Step over the strings without decoding them: a vocabulary has 10^5 of them, so the loop is bare."""
        starts: array[int] = array("I")
        buffer, length_at = self._buffer, _STRUCTS[GGUFValueType.UINT64].unpack_from
        pos, filled = self.pos, len(self._buffer)
        for index in range(count):
            start = pos + 8
            if start > filled:
                self.pos = pos
                self.take(8, f"length of string {index} of {key}")
                filled = len(buffer)
            (length,) = length_at(buffer, pos)
            if start + length > filled:
                self.pos = start
                self.take(length, f"string {index} of {key}")
                filled = len(buffer)
            pos = start + length
            try:
                buffer[start:pos].decode("utf-8")
            except UnicodeDecodeError:
                self._decoded(start, length, f"string {index} of {key}")
            starts.append(start)
        self.pos = pos
        return Strings(buffer, starts)

    def _decoded(self, start: int, length: int, what: str) -> str:
        raw = bytes(self._buffer[start : start + length])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + error.start
            got = f"byte 0x{raw[error.start]:02x}"
            raise self.fail(f"{what} is not text", at=at, expected="UTF-8", got=got) from None
