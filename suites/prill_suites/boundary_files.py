"""A whole file that loads, broken in one place each: what a library has to refuse, or to survive."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFReader, GGUFValueType

HUGE = (1 << 63, (1 << 64) - 1)
SIZES = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
FORMS = {GGUFValueType.UINT32: "<I", GGUFValueType.FLOAT32: "<f"}


class Broken(NamedTuple):
    """A change of the file.

    Attributes:
        strict: whether every engine has to refuse it; else it may be loaded, if it is survived.
    """

    name: str
    change: dict[str, Any]
    strict: bool = True


def broken(model: Path) -> Iterator[Broken]:
    """Each defect: counts that lie, sizes out of range, tensors out of place, files that end early."""
    file, whole = GGUFReader(model), model.stat().st_size
    table, data = file.tensors[0].field.offset, file.data_offset
    for at in (0, 3, 7, 12, 20, 24, 40, 1000, table, data, whole // 2, whole - 1):
        yield Broken(f"cut to {at} bytes", {"cut": int(at)})
    yield Broken("another magic", put(0, b"GGML"))
    yield Broken("version 0", put(4, struct.pack("<I", 0)))
    for count in (*HUGE, 1 << 32):
        yield Broken(f"{count} tensors", put(8, struct.pack("<Q", count)))
        yield Broken(f"{count} keys", put(16, struct.pack("<Q", count)))
        yield Broken(f"a key of {count} bytes", put(24, struct.pack("<Q", count)))
    architecture = str(file.fields["general.architecture"].contents())
    for name in SIZES:
        for size in (0, 2**32 - 1):
            yield from _valued(file, f"{architecture}.{name}", size)
    for eps in (float("nan"), -1.0):
        yield from _valued(file, f"{architecture}.attention.layer_norm_rms_epsilon", eps)
    yield from _valued(file, f"{architecture}.rope.freq_base", float("inf"))
    yield from _valued(file, f"{architecture}.attention.head_count_kv", 3)
    for count in HUGE:
        tokens = file.fields["tokenizer.ggml.tokens"]
        at = tokens.offset + sum(part.nbytes for part in tokens.parts[:4])
        yield Broken(f"{count} tokens counted", put(at, struct.pack("<Q", count)))
        yield Broken(f"a token of {count} bytes", put(at + 8, struct.pack("<Q", count)))
    yield from _tensors(file)
    texts = [part for part in file.fields["tokenizer.ggml.tokens"].parts if part.dtype == "uint8"]
    yield Broken("two tokens of one text", put(_place(file, texts[5]), bytes(texts[4])), strict=False)
    yield Broken("a token that is not UTF-8", put(_place(file, texts[5]), b"\xff"), strict=False)
    yield Broken("weights that are not numbers", put(whole - 64, b"\xff" * 64), strict=False)


def _tensors(file: GGUFReader) -> Iterator[Broken]:
    for tensor in (file.tensors[0], file.tensors[-1]):
        name, dims, kind, offset = (tensor.field.parts[at] for at in (1, 3, 4, 5))
        places = [(_place(file, part)) for part in (name, dims, kind, offset)]
        yield Broken(f"{tensor.name} has another name", put(places[0], b"?"))
        for value in (0, 33, *HUGE):
            yield Broken(f"{tensor.name} is {value} wide", put(places[1], struct.pack("<Q", value)))
        yield Broken(f"{tensor.name} has type 4", put(places[2], struct.pack("<I", 4)))
        yield Broken(f"{tensor.name} has type 2^32 - 1", put(places[2], b"\xff" * 4))
        for value in (1 << 40, *HUGE, (1 << 64) - 32):
            yield Broken(f"{tensor.name} begins at {value}", put(places[3], struct.pack("<Q", value)))


def _valued(file: GGUFReader, key: str, value: float) -> Iterator[Broken]:
    field = file.fields.get(key)
    if field is not None and (form := FORMS.get(field.types[-1])):
        part = field.parts[field.data[0]]
        yield Broken(f"{key} is {value}", put(_place(file, part), struct.pack(form, value)))


def _place(file: GGUFReader, part: Any) -> int:
    """Where a part of a field lies in the file."""
    return int(part.__array_interface__["data"][0] - file.data.__array_interface__["data"][0])


def put(offset: int, data: bytes) -> dict[str, Any]:
    return {"put": [[int(offset), data.hex()]]}
