"""A GGUF file comes in; the same file with other values in it, its tensors as numbers, and plain sums go out.

What the witness reads a file with: it imports nothing of the runtime and dequantises through the `gguf`
package. Matrices are dequantised a few rows at a time, so a large file needs little memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
VALUES_AT_ONCE = 1 << 22  # of a matrix, dequantised together: 32 MiB
VALUES_HELD = 1 << 24  # kept for the next pass: 128 MiB


@dataclass(frozen=True)
class Reading:
    """A file as the witness reads it: metadata, tensors, and what was changed in either to see it matter.

    Attributes:
        keys: every metadata value by its full name. tensors: as gguf maps them, by name.
        changed: tensor name -> other values (rows, columns) or (n,); None takes the tensor away.
        held: what was dequantised before, shared by all readings of a file.
        jitter: moves every value that enters a product or a norm by up to 2^-52 of itself, to see what of the
            logits is rounding.
    """

    keys: Mapping[str, Any]
    tensors: Mapping[str, Any]
    changed: Mapping[str, Float | None] = field(default_factory=dict)
    held: dict[tuple[str, int, int], Float] = field(default_factory=dict)
    jitter: np.random.Generator | None = None

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture", ""))

    def key(self, name: str, default: Any = None) -> Any:
        """The value under the architecture's prefix; of an array with one value a layer, the first."""
        value = self.keys.get(f"{self.architecture}.{name}", default)
        return value[0] if isinstance(value, list) else value

    @property
    def head_size(self) -> int:
        """Components of one head's query and key."""
        return int(
            self.key("attention.key_length", self.key("embedding_length") // self.key("attention.head_count"))
        )

    @property
    def groups(self) -> int:
        """Heads of the cache."""
        return int(self.key("attention.head_count_kv", self.key("attention.head_count")))

    @property
    def rope_size(self) -> int:
        """Components of a head that are rotated."""
        return int(self.key("rope.dimension_count", self.head_size))

    def has(self, name: str) -> bool:
        return self.changed[name] is not None if name in self.changed else name in self.tensors

    def count(self, name: str) -> int:
        """Rows of a matrix, or values of a vector."""
        changed = self.changed.get(name)
        return len(self.tensors[name].data if changed is None else changed)

    def rows(self, name: str, low: int, high: int) -> Float:
        """Rows [low, high) of a matrix, dequantised: (rows, columns)."""
        changed = self.changed.get(name)
        if changed is not None:
            return changed[low:high]
        if (name, low, high) in self.held:
            return self.held[name, low, high]
        tensor = self.tensors[name]
        values = gguf.quants.dequantize(np.asarray(tensor.data[low:high]), tensor.tensor_type)
        rows = np.asarray(values, np.float64)
        if sum(array.size for array in self.held.values()) + rows.size <= VALUES_HELD:
            self.held[name, low, high] = rows
        return rows

    def all(self, name: str) -> Float:
        """A whole tensor, for norms, biases and tables: (n,), or (rows, columns)."""
        return self.rows(name, 0, self.count(name))

    def moved(self, x: Float) -> Float:
        """x itself, or with another last bit here and there."""
        return x if self.jitter is None else x * (1 + 2.0**-52 * self.jitter.uniform(-1, 1, x.shape))

    def rounded(self) -> Reading:
        """The same file, read with other roundings."""
        return replace(self, jitter=np.random.default_rng(0))

    def with_keys(self, **values: Any) -> Reading:
        """The same file with other values under the architecture's prefix; `__` stands for a dot."""
        named = {f"{self.architecture}.{name.replace('__', '.')}": value for name, value in values.items()}
        return replace(self, keys={**self.keys, **named})

    def with_tensor(self, name: str, values: Float | None) -> Reading:
        """The same file with other values in a tensor, or (None) without it."""
        return replace(self, changed={**self.changed, name: values})


def read(path: str | Path) -> Reading:
    """Open a file, all parts of a split one; nothing is dequantised yet."""
    first = gguf.GGUFReader(path)
    keys = {name: value.contents() for name, value in first.fields.items()}
    readers = [first, *map(gguf.GGUFReader, _further(Path(path), int(keys.get("split.count", 1))))]
    return Reading(keys, {tensor.name: tensor for reader in readers for tensor in reader.tensors})


def _further(path: Path, count: int) -> list[Path]:
    """The parts behind the first of a split model: NAME-00002-of-COUNT.gguf and so on."""
    name = path.name.removesuffix(f"-00001-of-{count:05}.gguf")
    return [path.with_name(f"{name}-{n:05}-of-{count:05}.gguf") for n in range(2, count + 1)]


def linear(reading: Reading, name: str, x: Float) -> Float:
    """x (n, columns) times the transpose of matrix `name` (rows, columns), plus its bias if it has one."""
    count = reading.count(f"{name}.weight")
    step, x = max(1, VALUES_AT_ONCE // x.shape[1]), reading.moved(x)
    pieces = [x @ reading.rows(f"{name}.weight", low, low + step).T for low in range(0, count, step)]
    y = np.concatenate(pieces, axis=1)
    return y + reading.all(f"{name}.bias") if reading.has(f"{name}.bias") else y


def embedded(reading: Reading, name: str, ids: Sequence[int]) -> Float:
    """The rows of a table that the ids name, one by one: (len(ids), width)."""
    return np.concatenate([reading.rows(name, i, i + 1) for i in ids])


def head(reading: Reading, x: Float) -> Float:
    """Logits from the last norm's output; a file without a head of its own uses its embedding table."""
    return linear(reading, "output" if reading.has("output.weight") else "token_embd", x)


def softmax(scores: Float) -> Float:
    """Probabilities over the last axis."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def attention(
    q: Float,
    k: Float,
    v: Float,
    window: int = 0,
    *,
    scale: float | None = None,
    cap: float = 0.0,
    sinks: Float | None = None,
) -> Float:
    """Causal attention of q (n, heads, size) over k, v (n, cache heads, size): (n, heads * size).

    Query t sees keys 0..t, or the last `window` of them. Consecutive query heads share a cache head. Scores
    are scaled by 1 / sqrt(size) where no scale is given, and kept within ±cap where one is; a head's sink is
    the score of a key whose value is nothing.
    """
    n, heads, size = q.shape
    shared = heads // k.shape[1]
    out = np.zeros_like(q)
    for t in range(n):
        first = max(0, t + 1 - window) if window else 0
        for h in range(heads):
            keys, values = k[first : t + 1, h // shared], v[first : t + 1, h // shared]
            scores = keys @ q[t, h] / math.sqrt(size) if scale is None else keys @ q[t, h] * scale
            if cap:
                scores = cap * np.tanh(scores / cap)
            if sinks is None:
                out[t, h] = softmax(scores) @ values
            else:
                out[t, h] = softmax(np.append(scores, sinks[h]))[:-1] @ values
    return out.reshape(n, heads * size)
