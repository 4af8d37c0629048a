"""The witness: a second, naive forward pass over the same file.

The witness judges the oracle, so it shares nothing with it: it imports nothing of the runtime, reads and
dequantises through the `gguf` package, and computes in float64 from the published descriptions (Llama:
Touvron et al. 2023, with RoFormer's rotation on neighbouring pairs, as llama.cpp's converter lays them out;
GPT-2: Radford et al. 2019). It is slow and plain on purpose: one sequence, no cache, one query at a time.
Matrices are dequantised a few rows at a time, so a large file needs little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
GROUP = "prill.witnesses"  # entry points NAME = "module:function", the function a Forward
Forward = Callable[["Reading", Sequence[int]], Float]
VALUES_AT_ONCE = 1 << 22  # of a matrix, dequantised together: 32 MiB
VALUES_HELD = 1 << 24  # kept for the next pass: 128 MiB


@dataclass(frozen=True)
class Reading:
    """A file as the witness reads it: metadata, tensors, and changes made to see whether they matter.

    Attributes:
        keys: every metadata value by its full name. tensors: as gguf maps them, by name.
        changed: tensor name -> other values (rows, columns) or (n,); None removes the tensor.
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
        """x, or x with random last bits if there is a jitter."""
        return x if self.jitter is None else x * (1 + 2.0**-52 * self.jitter.uniform(-1, 1, x.shape))

    def rounded(self) -> Reading:
        """The same file, read with different rounding."""
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


def logits(reading: Reading, ids: Sequence[int]) -> Float:
    """Row i predicts the token after ids[i]: (len(ids), vocabulary), float64.

    Raises:
        KeyError: an architecture that the witness does not know (see `knows`), or a tensor that is absent.
        Exception: whatever an installed reading raises.
    """
    installed = _installed(reading.architecture)
    forward: Forward = installed.load() if installed else FORWARD[reading.architecture]
    return forward(reading, ids)


def knows(reading: Reading) -> bool:
    """Whether the witness can read the architecture."""
    return reading.architecture in FORWARD or _installed(reading.architecture) is not None


def whose(reading: Reading) -> str:
    """`module:function of PACKAGE VERSION` that reads the architecture; empty for those of this file."""
    found = _installed(reading.architecture)
    return f"{found.value} of {found.dist.name} {found.dist.version}" if found and found.dist else ""


@cache
def _installed(architecture: str) -> EntryPoint | None:
    """The reading that another package brings for an architecture that is not in FORWARD."""
    found = () if architecture in FORWARD else entry_points(group=GROUP, name=architecture)
    return next(iter(found), None)


def linear(reading: Reading, name: str, x: Float) -> Float:
    """x (n, columns) times the transpose of matrix `name` (rows, columns), plus its bias if it has one."""
    count = reading.count(f"{name}.weight")
    step, x = max(1, VALUES_AT_ONCE // x.shape[1]), reading.moved(x)
    pieces = [x @ reading.rows(f"{name}.weight", low, low + step).T for low in range(0, count, step)]
    y = np.concatenate(pieces, axis=1)
    return y + reading.all(f"{name}.bias") if reading.has(f"{name}.bias") else y


def embedded(reading: Reading, name: str, ids: Sequence[int]) -> Float:
    """Rows of a table, one for each id: (len(ids), width)."""
    return np.concatenate([reading.rows(name, i, i + 1) for i in ids])


def head(reading: Reading, x: Float) -> Float:
    """Logits from the last norm's output; a file without a head of its own uses its embedding table."""
    return linear(reading, "output" if reading.has("output.weight") else "token_embd", x)


def softmax(scores: Float) -> Float:
    """Probabilities over the last axis."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def attention(q: Float, k: Float, v: Float, window: int = 0) -> Float:
    """Causal attention of q (n, heads, size) over k, v (n, cache heads, size): (n, heads * size).

    Query t sees keys 0..t, or the last `window` of them. Consecutive query heads share a cache head.
    """
    n, heads, size = q.shape
    shared = heads // k.shape[1]
    out = np.zeros_like(q)
    for t in range(n):
        first = max(0, t + 1 - window) if window else 0
        for h in range(heads):
            keys, values = k[first : t + 1, h // shared], v[first : t + 1, h // shared]
            out[t, h] = softmax(keys @ q[t, h] / math.sqrt(size)) @ values
    return out.reshape(n, heads * size)


def llama(r: Reading, ids: Sequence[int]) -> Float:
    """RMSNorm, rotation, grouped queries, SwiGLU; biases, window, frequency factors if the file has them."""
    heads, size, eps = r.key("attention.head_count"), r.head_size, _eps(r, "rms_")
    n, window = len(ids), int(r.key("attention.sliding_window", 0))
    cos, sin = _rotation(r, n, r.rope_size)

    def norm(name: str, x: Float) -> Float:
        x = r.moved(x)
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean + eps) * r.all(f"{name}.weight"))

    x = embedded(r, "token_embd.weight", ids)
    for layer in range(r.key("block_count")):
        at = f"blk.{layer}."
        h = norm(f"{at}attn_norm", x)
        q = _rotated(linear(r, f"{at}attn_q", h).reshape(n, heads, size), cos, sin)
        k = _rotated(linear(r, f"{at}attn_k", h).reshape(n, r.groups, size), cos, sin)
        v = linear(r, f"{at}attn_v", h).reshape(n, r.groups, size)
        x = x + linear(r, f"{at}attn_output", attention(q, k, v, window))
        h = norm(f"{at}ffn_norm", x)
        gate = linear(r, f"{at}ffn_gate", h)
        x = x + linear(r, f"{at}ffn_down", gate * _sigmoid(gate) * linear(r, f"{at}ffn_up", h))
    return head(r, norm("output_norm", x))


def _rotation(r: Reading, n: int, dim: int) -> tuple[Float, Float]:
    """Cosine and sine of every position and pair: (n, dim / 2) each.

    Pair i turns by position / scale * base^(-2i / dim) / factor_i; only a scale of type linear counts, or one
    without a type (`rope.scale_linear`, an older key).
    """
    base = float(r.key("rope.freq_base", 10000.0))
    bare = float(r.key("rope.scale_linear", 1.0))
    kind = r.key("rope.scaling.type", "none" if bare == 1.0 else "linear")
    scale = float(r.key("rope.scaling.factor", bare)) if kind == "linear" else 1.0
    speed = base ** (-2.0 * np.arange(dim // 2) / dim)
    if r.has("rope_freqs.weight"):
        speed = speed / r.all("rope_freqs.weight")
    angle = np.arange(n)[:, None] / scale * speed
    return np.cos(angle), np.sin(angle)


def _rotated(x: Float, cos: Float, sin: Float) -> Float:
    """x (n, heads, size) with pairs (2i, 2i + 1) rotated; components beyond the pairs are unchanged."""
    out = x.copy()
    for i in range(cos.shape[1]):
        a, b, c, s = x[..., 2 * i], x[..., 2 * i + 1], cos[:, i, None], sin[:, i, None]
        out[..., 2 * i], out[..., 2 * i + 1] = a * c - b * s, a * s + b * c
    return out


def gpt2(r: Reading, ids: Sequence[int]) -> Float:
    """LayerNorm with bias, learned positions, fused query, key and value, GELU by tanh."""
    heads, size, eps, n = r.key("attention.head_count"), r.head_size, _eps(r, ""), len(ids)

    def norm(name: str, x: Float) -> Float:
        x = r.moved(x)
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
        return np.asarray(centred / scale * r.all(f"{name}.weight") + r.all(f"{name}.bias"))

    x = embedded(r, "token_embd.weight", ids) + r.rows("position_embd.weight", 0, n)
    for layer in range(r.key("block_count")):
        at = f"blk.{layer}."
        q, k, v = np.split(linear(r, f"{at}attn_qkv", norm(f"{at}attn_norm", x)), 3, axis=1)
        q, k, v = (part.reshape(n, heads, size) for part in (q, k, v))
        x = x + linear(r, f"{at}attn_output", attention(q, k, v))
        up = linear(r, f"{at}ffn_up", norm(f"{at}ffn_norm", x))
        gelu = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + linear(r, f"{at}ffn_down", gelu)
    return head(r, norm("output_norm", x))


def _eps(r: Reading, kind: str) -> float:
    return float(r.keys[f"{r.architecture}.attention.layer_norm_{kind}epsilon"])


def _sigmoid(x: Float) -> Float:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


FORWARD: dict[str, Forward] = {"llama": llama, "gpt2": gpt2}
"""By the file's own name of the architecture; others are installed, or the witness does not know them."""
