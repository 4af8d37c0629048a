"""Open a GGUF file: metadata and tensor table checked, weights mapped, or an error of one sentence."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType
from numpy.typing import NDArray

from prill_runtime.errors import InvalidParameter, ModelFileError, UnsupportedModel
from prill_runtime.gguf import split
from prill_runtime.gguf.header import (
    MAX_KEY,
    MAX_KEYS,
    SMALLEST_PAIR,
    Cursor,
    Packed,
    Value,
    quoted,
    unpacked,
)
from prill_runtime.gguf.tensors import MAX_TENSORS, SMALLEST_ENTRY, StoredTensor, read_table
from prill_runtime.gguf.vocabulary import check_tokenizer

__all__ = ["GGUFFile", "Value", "check_tokenizer", "open_gguf"]

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ARCHITECTURE: Final = "general.architecture"
ALIGNMENT: Final = "general.alignment"
DIGESTED_BYTES: Final = 1 << 18  # digested at a time: they stay in a processor's own cache


class GGUFFile:
    """One open file, or all parts of a split one, its whole header checked; a context manager.

    Attributes:
        path: as given; of a split model, the first part's.
        version: 2 or 3.
        alignment: of tensor data, bytes.
        metadata: key to value; arrays are lists. Of a split model, the first part's.
        tensors: name to StoredTensor, in file order, part after part.
        size: bytes, all parts together.
        place: which part of how many the file is, (0, 1) when it is whole.
        further: the other parts of a model that was opened by its first.
    """

    def __init__(
        self,
        path: Path,
        file: io.FileIO,
        version: int,
        alignment: int,
        metadata: Mapping[str, Value],
        tensors: Mapping[str, StoredTensor],
    ) -> None:
        self.path, self.version, self.alignment = path, version, alignment
        self.metadata: Mapping[str, Value] = MappingProxyType(dict(metadata))
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(dict(tensors))
        self.place = split.place(metadata)
        self.further: tuple[GGUFFile, ...] = ()
        self._file = file
        self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._map)

    def join(self, further: Sequence[GGUFFile]) -> None:
        """Become the whole split model: take over the other parts, their tensors and their closing."""
        tensors = dict(self.tensors)
        for number, part in enumerate(further, 1):
            tensors |= {name: replace(info, part=number) for name, info in part.tensors.items()}
        self.further, self.tensors = tuple(further), MappingProxyType(tensors)
        self.size += sum(part.size for part in further)

    @property
    def architecture(self) -> str:
        """The metadata's general.architecture; empty in a part that is not the first."""
        return str(self.metadata.get(ARCHITECTURE, ""))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that the model lies in; a tensor's `part` counts along them."""
        return (self.path, *(part.path for part in self.further))

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the whole file, computed on first use; other threads can run meanwhile.

        For a split model it covers all parts in order, as `cat PARTS | sha256sum` does.

        Raises:
            InvalidParameter: first used after close(), or closed while it was computed.
        """
        self._require_open()
        digest, piece = hashlib.sha256(), memoryview(bytearray(min(DIGESTED_BYTES, self.size)))
        for part in (self, *self.further):
            part._file.seek(0)
            while count := part._file.readinto(piece):
                digest.update(piece[:count])
                self._require_open()
        return digest.hexdigest()

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as they lie in the file: a read-only view, shape (nbytes,).

        Raises:
            ModelFileError: no tensor of that name.
            InvalidParameter: the file was closed.
        """
        self._require_open()
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(
                f"tensor {quoted(name)} is missing", where=_shown(self.path), expected="it in the table"
            )
        mapped = (self, *self.further)[info.part]._map
        assert mapped is not None
        return np.frombuffer(mapped, np.uint8, info.nbytes, info.offset)

    def close(self) -> None:
        """Release the mapping; views that are still held keep it alive."""
        mapped, self._map = self._map, None
        if mapped is not None:
            try:
                mapped.close()
            except BufferError:
                del mapped
        self._file.close()
        for part in self.further:
            part.close()

    def _require_open(self) -> None:
        if self._map is None:
            raise InvalidParameter("the model file was closed", where=_shown(self.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_gguf(path: str | Path) -> GGUFFile:
    """Check the whole header, then map the file; the first part of a split model opens all the others too.

    Raises:
        ModelFileError: the file cannot be read, breaks the GGUF format, or contradicts itself; a part of a
            split model is missing or belongs to another.
        UnsupportedModel: a big-endian file.
    """
    first = _open_one(Path(path))
    number, count = first.place
    if number or count == 1:
        return first
    further: list[GGUFFile] = []
    try:
        for other in range(1, count):
            further.append(_open_one(split.sibling(first.path, other, count)))
        split.check(
            _shown(first.path), [(part.place, part.metadata, part.tensors) for part in (first, *further)]
        )
    except BaseException:
        for part in (first, *further):
            part.close()
        raise
    first.join(further)
    return first


def _open_one(path: Path) -> GGUFFile:
    """Open one file, without the other parts of a split model."""
    file, size = _open_regular(path)
    try:
        return _parse(path, file, size)
    except OSError as error:
        file.close()
        raise ModelFileError(f"reading failed: {error.strerror}", where=_shown(path)) from None
    except BaseException:
        file.close()
        raise


def _open_regular(path: Path) -> tuple[io.FileIO, int]:
    """Open a regular file and tell its size; never block on a pipe, and refuse directories and devices."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _not_regular(path)
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelFileError(
            f"cannot be opened ({reason})", where=_shown(path), expected="a readable GGUF file"
        ) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb", buffering=0), status.st_size


def _not_regular(path: Path) -> ModelFileError:
    kind = "a directory" if path.is_dir() else "a pipe, socket or device"
    return ModelFileError("not a file", where=_shown(path), expected="a regular file", got=kind)


def _parse(path: Path, file: io.FileIO, size: int) -> GGUFFile:
    cursor = Cursor(file, size, _shown(path))
    version = _read_version(cursor)
    at = cursor.pos
    n_tensors = cursor.integer(GGUFValueType.UINT64, "tensor count")
    n_keys = cursor.integer(GGUFValueType.UINT64, "metadata count")
    cursor.room_for(n_tensors, SMALLEST_ENTRY, MAX_TENSORS, "tensor count", at)
    cursor.room_for(n_keys, SMALLEST_PAIR, MAX_KEYS, "metadata count", at + 8)
    packed, types, offsets = _read_metadata(cursor, n_keys)
    alignment = _alignment(cursor, packed, types, offsets)
    _check_architecture(cursor, packed, offsets)
    tensors = read_table(cursor, n_tensors, alignment)
    check_tokenizer(packed, path=_shown(path), offsets=offsets)
    split.check_keys(packed, path=_shown(path))
    metadata = {key: unpacked(value) for key, value in packed.items()}
    return GGUFFile(path, file, version, alignment, metadata, tensors)


def _read_version(cursor: Cursor) -> int:
    if not cursor.size:
        raise cursor.fail("the file is empty", expected="a GGUF header")
    magic = cursor.bytes(4, "magic")
    if magic != MAGIC:
        raise cursor.fail("bad magic", at=0, expected="'GGUF'", got=ascii(magic)[1:])
    version = cursor.integer(GGUFValueType.UINT32, "version")
    if version in VERSIONS:
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UnsupportedModel("big-endian file", where=f"{cursor.path}, byte 4", expected="little-endian")
    raise cursor.fail("unknown GGUF version", at=4, expected="2 or 3", got=version)


def _read_metadata(
    cursor: Cursor, count: int
) -> tuple[dict[str, Packed], dict[str, GGUFValueType], dict[str, int]]:
    """Values, their types and the offset at which each value begins, by key."""
    packed: dict[str, Packed] = {}
    types: dict[str, GGUFValueType] = {}
    offsets: dict[str, int] = {}
    for _ in range(count):
        at = cursor.pos
        key = cursor.text("metadata key", MAX_KEY)
        if not key:
            raise cursor.fail("empty metadata key", at=at, expected=f"1 to {MAX_KEY} bytes", got=0)
        if key in packed:
            raise cursor.fail("duplicate metadata key", at=at, expected="a new key", got=quoted(key))
        offsets[key] = cursor.pos
        types[key], packed[key] = cursor.value(quoted(key))
    return packed, types, offsets


def _alignment(
    cursor: Cursor,
    packed: Mapping[str, Packed],
    types: Mapping[str, GGUFValueType],
    offsets: Mapping[str, int],
) -> int:
    if ALIGNMENT not in packed:
        return int(GGUF_DEFAULT_ALIGNMENT)
    at, type, value = offsets[ALIGNMENT], types[ALIGNMENT], packed[ALIGNMENT]
    if type != GGUFValueType.UINT32 or not isinstance(value, int):
        raise cursor.fail(f"{ALIGNMENT} has the wrong type", at=at, expected="UINT32", got=type.name)
    if value.bit_count() != 1:
        raise cursor.fail(ALIGNMENT, at=at, expected="a power of two", got=value)
    return value


def _check_architecture(cursor: Cursor, packed: Mapping[str, Packed], offsets: Mapping[str, int]) -> None:
    if ARCHITECTURE not in packed:
        if split.place(packed)[0]:
            return  # only the first part of a split model says what it is
        raise cursor.fail(f"{ARCHITECTURE} is missing", expected="it among the metadata")
    value = packed[ARCHITECTURE]
    if not isinstance(value, str) or not value:
        got = quoted(value) if isinstance(value, str) else type(value).__name__
        raise cursor.fail(
            f"{ARCHITECTURE} has the wrong type or is empty",
            at=offsets[ARCHITECTURE],
            expected="a name",
            got=got,
        )


def _shown(path: Path) -> str:
    """The path with everything unprintable escaped, so that the sentence stays on one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
