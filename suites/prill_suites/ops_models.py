"""Small random models of awkward shapes, of a given block type, each with a prompt length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from prill_fixtures import synth
from prill_fixtures.synth import Shape
from prill_harness.numbers.lanes import Lane
from prill_harness.planting import faults
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.quants import layouts as quants
from prill_runtime.run.model import Model

TOKENS = 6
VOCABULARY = 320  # of the smallest; ids of prompts are below it
SEED = 11
# Heads, cache heads, head dimension, width, feed-forward, vocabulary: groups of 1 to 9, odd numbers of heads,
# matrices that are not square, rows that fill no tile, more columns than a block of threads takes at once,
# each beside a length of prompt at which tiles and splits of keys end; and the keys that a query sees, 0 for
# all: a window that the first tokens leave, and one that begins inside a split of keys.
MODELS = (
    ((1, 1, 64, 256, 256, 320), 31, 0),
    ((3, 3, 64, 256, 512, 320), 32, 0),
    ((12, 4, 64, 256, 768, 320), 33, 0),
    ((12, 3, 64, 512, 256, 513), 63, 0),
    ((24, 3, 32, 256, 256, 320), 253, 0),
    ((8, 1, 32, 256, 512, 320), 257, 0),
    ((4, 1, 128, 256, 256, 320), 64, 0),
    ((32, 4, 40, 256, 256, 511), 6, 0),
    ((8, 2, 80, 256, 256, 320), 13, 0),
    ((8, 1, 96, 256, 256, 513), 62, 0),
    ((5, 1, 256, 256, 256, 511), 126, 0),
    ((2, 1, 64, 256, 256, 320), 509, 0),
    ((7, 1, 32, 256, 256, 320), 9, 0),
    ((9, 1, 32, 256, 256, 320), 3, 0),
    ((4, 1, 64, 1280, 256, 1537), 2, 0),
    ((6, 2, 32, 256, 256, 320), 13, 4),
    ((2, 1, 64, 256, 256, 320), 267, 131),
)


def models(folder: Path, quant: str) -> Iterator[tuple[str, Path, int, dict[str, set[int]]]]:
    """Every model that the block type allows: what it is, its file, a length of prompt, and the sizes that
    decoding TOKENS tokens behind it, and behind one id, divides."""
    for (heads, kv_heads, dim, width, ffn, vocab), length, window in MODELS:
        shape = Shape(
            1, width, heads, kv_heads, dim, ffn, vocab, tied=True, context=length + TOKENS, window=window
        )
        entries = synth.tensors(shape, quant)
        if all(dims[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 for dims, kind in entries.values()):
            file = folder / f"{heads}-{kv_heads}-{dim}-{length}-{quant}.gguf"
            synth.write(file, file.stem, shape, quant, SEED)
            what = f"{heads}/{kv_heads} heads of {dim}, width {width}, ffn {ffn}, vocabulary {vocab}"
            what += f", window {window}" * bool(window)
            yield what, file, length, divided(shape, length)


def random_blocks(random: np.random.Generator, kind: Type, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """The bytes of a matrix (out, in): every byte random, scales between 0.01 and 0.02 in size."""
    block = quants.BlockFormat.registry[kind]
    count = shape[0] * shape[1] // block.weights
    raw: NDArray[np.uint8] = random.integers(0, 256, count * block.layout.itemsize, dtype=np.uint8)
    fields = raw.view(block.layout)
    for name in ("d", "dmin", "m"):
        if name in (block.layout.names or ()):
            fields[name] = random.uniform(0.01, 0.02, count) * random.choice((-1, 1), count)
    if "e" in (block.layout.names or ()):
        fields["e"] = random.integers(118, 124, count)
    if kind in (Type.F32, Type.F16):
        fields["x"] = random.standard_normal(count)
    elif kind == Type.BF16:
        fields["x"] = (random.standard_normal(count).astype("<f4").view("<u4") >> 16).astype("<u2")
    return raw


def divided(shape: Shape, length: int) -> dict[str, set[int]]:
    """Axis -> sizes: keys and heads of attention, rows and columns of matrices, values put into the cache."""
    group, mixed = shape.heads // shape.kv_heads, shape.heads * shape.head_dim
    return {
        "decode.keys": {size + step for size in (1, length) for step in range(1, TOKENS)},
        "decode.dim": {shape.head_dim},
        "decode.group": {group},
        "decode.queries": {group * shape.head_dim // 4},
        "decode.inner": {shape.width, mixed, shape.ffn},
        "decode.width": {shape.width},  # of what is normalised
        "decode.outer": {shape.vocab, shape.width, mixed, shape.ffn},
        "decode.vocabulary": {shape.vocab},
        "decode.appended": {size * shape.kv_heads * shape.head_dim for size in (1, length)},
    }


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
