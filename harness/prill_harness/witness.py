"""A GGUF file and token ids come in; logits of a second, naive reading of the same file come out.

The witness judges the oracle, so it shares nothing with it: it imports nothing of the runtime, reads and
dequantises through the `gguf` package, and computes in float64 from the published descriptions of the models
(Llama: Touvron et al. 2023, RoFormer's rotation on neighbouring pairs, as llama.cpp's converter lays them out;
GPT-2: Radford et al. 2019, learned positions, GELU by tanh). It is slow and plain on purpose: one sequence, no
cache, one query at a time. Matrices are dequantised a few rows at a time, so a large file needs little memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Forward = Callable[["Reading", Sequence[int]], Float]
VALUES_AT_ONCE = 1 << 22  # of a matrix, dequantised together: 32 MiB
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Reading:
    """A file as the witness reads it: metadata, tensors, and what sensitivity tests changed in either.

    Attributes:
        keys: every metadata value by its full name. tensors: as gguf maps them, by name.
        scaled: tensor name -> factor for its values; a tensor at factor None is taken to be absent.
    """

    keys: Mapping[str, Any]
    tensors: Mapping[str, Any]
    scaled: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture", ""))

    def key(self, name: str, default: Any = None) -> Any:
        """The value under the architecture's prefix; of an array with one value a layer, the first."""
        value = self.keys.get(f"{self.architecture}.{name}", default)
        return value[0] if isinstance(value, list) else value

    def has(self, name: str) -> bool:
        return name in self.tensors and self.scaled.get(name, 1.0) is not None

    def rows(self, name: str, low: int, high: int) -> Float:
        """Rows [low, high) of a matrix, dequantised: (rows, columns)."""
        tensor = self.tensors[name]
        values = gguf.quants.dequantize(np.asarray(tensor.data[low:high]), tensor.tensor_type)
        return np.asarray(values, np.float64) * (self.scaled.get(name) or 1.0)

    def vector(self, name: str) -> Float:
        """A norm, bias or table of frequencies: (n,)."""
        return self.rows(name, 0, len(self.tensors[name].data))

    def with_key(self, name: str, value: Any) -> Reading:
        """The same file with another value under the architecture's prefix."""
        return replace(self, keys={**self.keys, f"{self.architecture}.{name}": value})

    def with_tensor(self, name: str, factor: float | None) -> Reading:
        """The same file with a tensor's values multiplied, or (None) without the tensor."""
        return replace(self, scaled={**self.scaled, name: factor})


def read(path: str | Path) -> Reading:
    """Open a file, all parts of a split one; nothing is dequantised yet."""
    keys: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for number, part in enumerate(_parts(Path(path))):
        reader = gguf.GGUFReader(part)
        if not number:
            keys = {name: value.contents() for name, value in reader.fields.items()}
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    return Reading(keys, tensors)


def _parts(path: Path) -> Iterator[Path]:
    named = PART.match(path.name)
    if named is None:
        yield path
        return
    stem, _, count = named.groups()
    for number in range(1, int(count) + 1):
        yield path.with_name(f"{stem}-{number:05d}-of-{count}.gguf")


def logits(reading: Reading, ids: Sequence[int]) -> Float:
    """Row i predicts the token after ids[i]: (len(ids), vocabulary), float64.

    Raises:
        KeyError: an architecture that the witness does not know (see `knows`), or a tensor that is absent.
    """
    return FORWARD[reading.architecture](reading, ids)


def knows(reading: Reading) -> bool:
    """Whether the witness can read the architecture."""
    return reading.architecture in FORWARD


def linear(reading: Reading, name: str, x: Float) -> Float:
    """x (n, columns) times the transpose of matrix `name` (rows, columns), plus its bias where there is one."""
    count, columns = len(reading.tensors[f"{name}.weight"].data), x.shape[1]
    step = max(1, VALUES_AT_ONCE // columns)
    pieces = [x @ reading.rows(f"{name}.weight", low, low + step).T for low in range(0, count, step)]
    y = np.concatenate(pieces, axis=1)
    return y + reading.vector(f"{name}.bias") if reading.has(f"{name}.bias") else y


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
    """RMSNorm, rotation, grouped queries, SwiGLU; biases, window, frequency factors where the file has them."""
    heads, width, eps = r.key("attention.head_count"), r.key("embedding_length"), _eps(r, "rms_")
    size = r.key("attention.key_length", width // heads)
    groups = r.key("attention.head_count_kv", heads)
    n, window = len(ids), int(r.key("attention.sliding_window", 0))
    cos, sin = _rotation(r, n, int(r.key("rope.dimension_count", size)))

    def norm(name: str, x: Float) -> Float:
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean + eps) * r.vector(f"{name}.weight"))

    x = embedded(r, "token_embd.weight", ids)
    for layer in range(r.key("block_count")):
        at = f"blk.{layer}."
        h = norm(f"{at}attn_norm", x)
        q = _rotated(linear(r, f"{at}attn_q", h).reshape(n, heads, size), cos, sin)
        k = _rotated(linear(r, f"{at}attn_k", h).reshape(n, groups, size), cos, sin)
        v = linear(r, f"{at}attn_v", h).reshape(n, groups, size)
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
        speed = speed / r.vector("rope_freqs.weight")
    angle = np.arange(n)[:, None] / scale * speed
    return np.cos(angle), np.sin(angle)


def _rotated(x: Float, cos: Float, sin: Float) -> Float:
    """x (n, heads, size) with neighbours (2i, 2i + 1) turned; components beyond the pairs stay."""
    out = x.copy()
    for i in range(cos.shape[1]):
        a, b, c, s = x[..., 2 * i], x[..., 2 * i + 1], cos[:, i, None], sin[:, i, None]
        out[..., 2 * i], out[..., 2 * i + 1] = a * c - b * s, a * s + b * c
    return out


def gpt2(r: Reading, ids: Sequence[int]) -> Float:
    """LayerNorm with bias, learned positions, fused query, key and value, GELU by tanh."""
    heads, width, eps, n = r.key("attention.head_count"), r.key("embedding_length"), _eps(r, ""), len(ids)
    size = r.key("attention.key_length", width // heads)

    def norm(name: str, x: Float) -> Float:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
        return np.asarray(centred / scale * r.vector(f"{name}.weight") + r.vector(f"{name}.bias"))

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
"""By the file's own name of the architecture; what is not here the witness does not know."""
