"""Passes that an engine saved by itself: `.npz` of ids and logits, and llama.cpp's file of saved logits.

.npz       `ids` (n,), `logits` (n, vocabulary); several passes as `ids_1`, `logits_1`, …; `model`, the
           file's SHA-256, where it is known
_logits_   written by llama.cpp's perplexity tool for KL divergence: int32 n_ctx, n_vocab, n_chunk; the
           ids of the text; then for the second half of each chunk, without its last position, a row of
           float32 scale and least logprob and n_vocab uint16 (an even number of them)
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from prill_runtime.errors import UsageError
from prill_runtime.gguf.file import open_gguf
from prill_runtime.tokenizer.load import load_tokenizer

SAVED, ARCHIVE = b"_logits_", b"PK\x03\x04"
SIGNS = (SAVED, ARCHIVE)
HEADER = 20  # bytes
UNREADABLE = (ValueError, OSError, EOFError, MemoryError, KeyError, zipfile.BadZipFile, zlib.error)
Rows = NDArray[np.floating]


@dataclass(frozen=True)
class SavedPass:
    """What an engine computed over some ids.

    Attributes:
        ids: the whole sequence.
        first: the position of the first row, counted from 0.
        rows: (positions, vocabulary) logits or logprobs; row i predicts the token after ids[first + i].
            -inf: as small as the file can say, or smaller.
        rounding: (positions,) by how much the file may have rounded each of a row's values.
    """

    ids: tuple[int, ...]
    first: int
    rows: Rows
    rounding: NDArray[np.float64]

    @property
    def whole(self) -> bool:
        """Whether these are the engine's own numbers at every position."""
        return self.first == 0 and len(self.rows) == len(self.ids) and not self.rounding.any()


def read_passes(file: Path, model: str) -> tuple[SavedPass, ...]:
    """The passes of a file over the model at this path.

    Raises:
        UsageError: malformed, of another vocabulary, or of another model.
    """
    with open_gguf(model) as opened:
        tokenizer, sha256 = load_tokenizer(opened.metadata), opened.sha256
    with file.open("rb") as stream:
        saved = stream.read(len(SAVED)) == SAVED
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    found = _saved(file, bos) if saved else _archive(file, sha256)
    for number, each in enumerate(found):
        size, where = each.rows.shape[1], f"{file}, pass {number}"
        if size != tokenizer.vocab_size:
            refuse(where, "another vocabulary", f"{tokenizer.vocab_size} ids", str(size))
        if not all(0 <= token < size for token in each.ids):
            refuse(where, "an id outside the vocabulary", f"ids below {size}", str(max(each.ids)))
    return found


def _archive(file: Path, sha256: str) -> tuple[SavedPass, ...]:
    arrays: Mapping[str, Any]
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except UNREADABLE as error:
        refuse(
            str(file),
            "not a readable archive",
            "an .npz of ids and logits",
            str(error) or type(error).__name__,
        )
    if "model" in arrays and str(arrays["model"]) != sha256:
        refuse(str(file), "of another model", f"sha256 {sha256[:12]}…", f"{str(arrays['model'])[:12]}…")
    passes = []
    for name in (name for name in arrays if name.startswith("ids")):
        ids, rows = arrays[name], arrays.get(name.replace("ids", "logits", 1))
        fits = rows is not None and ids.ndim == 1 and ids.dtype.kind in "iu" and rows.dtype.kind == "f"
        if rows is None or not fits or rows.ndim != 2 or not 0 < len(rows) == len(ids):
            got = f"{ids.shape} and {'none' if rows is None else rows.shape}"
            refuse(f"{file}, {name}", "no pass", "n ids, and floats (n, vocabulary) of logits", got)
        passes.append(SavedPass(tuple(map(int, ids)), 0, rows, np.zeros(len(rows))))
    if not passes:
        refuse(str(file), "no pass", "arrays `ids` and `logits`", ", ".join(arrays) or "nothing")
    return tuple(passes)


def _saved(file: Path, bos: int | None) -> tuple[SavedPass, ...]:
    data = np.fromfile(file, np.uint8)
    context, vocabulary, chunks = (int(each) for each in data[len(SAVED) : HEADER].view("<i4")) if (
        len(data) >= HEADER) else (0, 0, 0)  # fmt: skip
    first, width = context // 2, 2 * ((vocabulary + 1) // 2) + 4
    count = context - 1 - first
    size = HEADER + 4 * context * chunks + 2 * width * count * chunks
    if min(context, vocabulary, chunks, count) < 1 or len(data) != size:
        expected = f"{chunks} chunks of {context} ids over {vocabulary}, {size} bytes"
        refuse(str(file), "not a whole file of saved logits", expected, f"{len(data)} bytes")
    start = HEADER + 4 * context * chunks
    texts = data[HEADER:start].view("<i4").reshape(chunks, context)
    told = data[start:].reshape(chunks, count, 2 * width)
    passes = []
    for text, rows in zip(texts, told, strict=True):
        ids = [int(token) for token in text]
        if bos is not None:  # what the tool puts there before it computes, and not into the file
            ids[0] = bos
        scale, least = (rows[:, at : at + 4].copy().view("<f4").astype(np.float64) for at in (0, 4))
        steps = rows[:, 8 : 8 + 2 * vocabulary].copy().view("<u2").astype(np.float64)
        if not (np.isfinite(scale).all() and np.isfinite(least).all() and (scale >= 0).all()):
            refuse(str(file), "a row's scale is no number", "finite scales", str(scale.min()))
        logprobs = np.where((steps > 0) | (scale == 0), scale * steps + least, -np.inf)
        # Scale and least value are float32 themselves.
        rounding = scale[:, 0] / 2 + np.abs(least[:, 0]) * 2.0**-22
        passes.append(SavedPass(tuple(ids), first, logprobs, rounding))
    return tuple(passes)


def refuse(where: str, what: str, expected: str, got: str) -> NoReturn:
    raise UsageError(f"recorded logits: {what}", where=where, expected=expected, got=got)
