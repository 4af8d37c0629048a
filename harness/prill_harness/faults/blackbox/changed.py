"""Faults that every engine in the world obeys: a changed file for the engine, the right one for its judge.

A planted fault patches prill's own code, and a stranger has none of it. It has a file, though, and with one
value of that changed it is wrong in a known way, which its judge has to find and to blame on the right part.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from numpy.typing import NDArray

TOKENIZER, NUMBERS = "tokenizer", "numbers"
HEADS, GROUPS = "ARCH.attention.head_count", "ARCH.attention.head_count_kv"
PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
SCALED = {
    GGMLQuantizationType.Q8_0: 34,
    GGMLQuantizationType.Q4_0: 18,
}  # bytes of blocks that begin with a scale


class Bytes:
    """A file that is changed in place: what is written into an array of it is in the file."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path, "r+")

    @cached_property
    def tensors(self) -> dict[str, ReaderTensor]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def values(self, key: str) -> list[NDArray[Any]]:
        """The values of a key, the architecture in the place of `ARCH`: one array each; none if absent."""
        named = key.replace("ARCH", self._reader.fields["general.architecture"].contents())
        field = self._reader.fields.get(named)
        return [] if field is None else [field.parts[at] for at in field.data]

    def data(self, name: str) -> NDArray[Any] | None:
        """A tensor, (rows, values) where its type has no blocks, (rows, bytes) where it has."""
        return self.tensors[name].data if name in self.tensors else None

    def floats(self, name: str) -> NDArray[Any] | None:
        """A tensor whose type has no blocks."""
        plain = name in self.tensors and self.tensors[name].tensor_type in PLAIN
        return self.tensors[name].data if plain else None

    def flush(self) -> None:
        self._reader.data.flush()


@dataclass(frozen=True)
class Change:
    """One fault.

    Attributes:
        blames: what has to be found wrong: the tokenizer, or the numbers.
        plant: makes it, and says whether the file has what it takes.
    """

    name: str
    summary: str
    blames: str
    plant: Callable[[Bytes], bool]


def of_key(key: str, change: Callable[[Any], Any]) -> Callable[[Bytes], bool]:
    def plant(file: Bytes) -> bool:
        values = file.values(key)
        before = [value[0] for value in values]
        for value in values:
            value[0] = change(value[0])
        return any(value[0] != old for value, old in zip(values, before, strict=True))

    return plant


def scaled(name: str, factor: float) -> Callable[[Bytes], bool]:
    def plant(file: Bytes) -> bool:
        found = file.floats(name)
        if found is None or not found.any():
            return False
        found[...] = found * np.asarray(factor, found.dtype)
        return True

    return plant


def exchanged(one: str, two: str) -> Callable[[Bytes], bool]:
    """Two tensors of one shape and type in each other's place."""

    def plant(file: Bytes) -> bool:
        a, b = file.data(one), file.data(two)
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        a[...], b[...] = b.copy(), a.copy()
        return True

    return plant


def rows_exchanged(name: str, share: int) -> Callable[[Bytes], bool]:
    """The first and the second of `share` equal parts of a matrix's rows; 0: each row and its neighbour."""

    def plant(file: Bytes) -> bool:
        data = file.data(name)
        if data is None or len(data) < max(2, share):
            return False
        if share:
            size = len(data) // share
            data[:size], data[size : 2 * size] = data[size : 2 * size].copy(), data[:size].copy()
        else:
            even = len(data) // 2 * 2
            data[0:even:2], data[1:even:2] = data[1:even:2].copy(), data[0:even:2].copy()
        return True

    return plant


def heads_exchanged(part: str, key: str) -> Callable[[Bytes], bool]:
    """The first two heads of a layer's queries, keys or values."""

    def plant(file: Bytes) -> bool:
        heads = file.values(key) or file.values("ARCH.attention.head_count")
        return int(heads[0][0]) > 1 and rows_exchanged(f"blk.0.attn_{part}.weight", int(heads[0][0]))(file)

    return plant


def block_scale(file: Bytes) -> bool:
    """The scales of a matrix's first rows doubled."""
    for name, tensor in file.tensors.items():
        if tensor.tensor_type in SCALED and name.startswith("blk."):
            size = SCALED[tensor.tensor_type]
            scales = tensor.data[:16].reshape(-1, size)[:, :2]
            scales[...] = (scales.copy().view(np.float16) * np.float16(2)).view(np.uint8)
            return True
    return False


def texts_exchanged(file: Bytes) -> bool:
    """The tokens `a` and `e` in each other's place."""
    tokens = file.values("tokenizer.ggml.tokens")
    places = {bytes(token): token for token in tokens if len(token) == 1}
    one, two = places.get(b"a"), places.get(b"e")
    if one is None or two is None:
        return False
    one[...], two[...] = two.copy(), one.copy()
    return True


def merges_exchanged(file: Bytes) -> bool:
    """An early merge and the last one that is written as long."""
    merges = file.values("tokenizer.ggml.merges")
    if len(merges) < 3:
        return False
    early = merges[1]
    late = next((each for each in reversed(merges[2:]) if each.shape == early.shape), None)
    if late is None:
        return False
    early[...], late[...] = late.copy(), early.copy()
    return True


def scores_reversed(file: Bytes) -> bool:
    """The scores of SentencePiece's pieces, best last."""
    scores = file.values("tokenizer.ggml.scores")
    for score in scores:
        score[0] = -score[0]
    return any(score[0] for score in scores)


def shifted(name: str) -> Callable[[Bytes], bool]:
    def plant(file: Bytes) -> bool:
        data = file.data(name)
        if data is None:
            return False
        data[...] = np.roll(data, 1, axis=0)
        return True

    return plant


def columns_exchanged(name: str) -> Callable[[Bytes], bool]:
    def plant(file: Bytes) -> bool:
        data = file.floats(name)
        if data is None:
            return False
        half = data.shape[1] // 2
        data[...] = np.roll(data, half, axis=1)
        return True

    return plant


def planted(change: Change, model: Path, folder: Path) -> Path | None:
    """A copy of the model with the fault, in `folder`; None if the file has nothing that it changes."""
    copy = folder / f"{change.name}.gguf"
    shutil.copyfile(model, copy)
    file = Bytes(copy)
    if not change.plant(file):
        copy.unlink()
        return None
    file.flush()
    return copy


def end_moved(model: Path, folder: Path, token: int) -> Path:
    """A copy of the model whose text ends at `token`."""
    copy = folder / f"end-{token}.gguf"
    shutil.copyfile(model, copy)
    file = Bytes(copy)
    for value in file.values("tokenizer.ggml.eos_token_id"):
        value[0] = token
    file.flush()
    return copy


def applicable(
    changes: Iterable[Change], model: Path, folder: Path
) -> Generator[tuple[Change, Path], None, None]:
    """Each of the faults that the file has what it takes for, with the copy that has it, which then goes."""
    for change in changes:
        if (copy := planted(change, model, folder)) is not None:
            yield change, copy
            copy.unlink(missing_ok=True)
