"""A block type goes in; small random models of shapes chosen to hurt come out, each with a prompt length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from prill_fixtures import synth
from prill_fixtures.synth import Shape
from prill_harness import faults
from prill_harness.lanes import Lane
from prill_runtime.backends import RoundedBackend
from prill_runtime.engine import Model

TOKENS = 6
VOCABULARY = 320
SEED = 11
# Heads, cache heads, head dimension, width, feed-forward: groups of 1, 4 and 8, odd numbers of heads,
# matrices that are not square, each beside a length of prompt at which tiles and splits of keys end.
MODELS = (
    ((1, 1, 64, 256, 256), 31),
    ((3, 3, 64, 256, 512), 32),
    ((4, 4, 64, 256, 768), 33),
    ((12, 3, 64, 512, 256), 63),
    ((24, 3, 32, 256, 256), 255),
    ((8, 1, 32, 256, 512), 257),
    ((4, 1, 128, 256, 256), 64),
)


def models(folder: Path, quant: str) -> Iterator[tuple[str, Path, int]]:
    """Every model that the block type allows: what it is, its file, and a length of prompt."""
    for (heads, kv_heads, dim, width, ffn), length in MODELS:
        shape = Shape(1, width, heads, kv_heads, dim, ffn, VOCABULARY, tied=True, context=length + TOKENS)
        entries = synth.tensors(shape, quant).values()
        if all(dims[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 for dims, kind in entries):
            file = folder / f"{heads}-{kv_heads}-{dim}-{quant}.gguf"
            synth.write(file, file.stem, shape, quant, SEED)
            yield f"{heads}/{kv_heads} heads of {dim}, width {width}, ffn {ffn}", file, length


def noise(file: Path, lane: Lane, ids: list[int], expected: NDArray[np.floating]) -> float:
    """NMSE about the mean that the lane's rounding of activations leaves in the last rows of logits.

    Float64 but for that rounding: in the exact lane there is none.
    """
    if lane.activations == "f32":
        return 0.0
    rounded = RoundedBackend("float64", lane.activations)  # type: ignore[arg-type]
    with faults.only(()), Model.load(file, backend=rounded) as model:
        rows = model.forward([(model.new_cache(len(ids)), ids)])[0][-1 - len(expected) : -1]
    error = (logprobs(rows) - logprobs(expected)) ** 2
    return float(error.mean() / expected.var(axis=-1).mean())


def logprobs(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """log softmax of every row (position, vocab), in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
