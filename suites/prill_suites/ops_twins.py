"""Every op again, one number at a time in float64, as the papers write it: the twins of the backends' ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Vector = Sequence[float]


def embed(table: Floats, ids: Sequence[int]) -> Floats:
    """Row `id` of the table for every id: (row, width)."""
    return np.array([[float(value) for value in table[i]] for i in ids])


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Zhang and Sennrich 2019."""
    out = []
    for row in x.tolist():
        root = math.sqrt(math.fsum(v * v for v in row) / len(row) + eps)
        out.append([v / root * w for v, w in zip(row, weight.tolist(), strict=True)])
    return np.array(out)


def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
    """Ba et al. 2016, variance over n."""
    out = []
    for row in x.tolist():
        mean = math.fsum(row) / len(row)
        root = math.sqrt(math.fsum((v - mean) ** 2 for v in row) / len(row) + eps)
        scaled = zip(row, weight.tolist(), bias.tolist(), strict=True)
        out.append([(v - mean) / root * w + b for v, w, b in scaled])
    return np.array(out)


def linear(x: Floats, weight: Floats, bias: Floats | None = None) -> Floats:
    """Row r, output o: sum over i of x[r, i] weight[o, i], plus bias[o]."""
    add = bias.tolist() if bias is not None else [0.0] * len(weight)
    pairs = list(zip(weight, add, strict=True))
    return np.array([[math.fsum((row * out).tolist()) + b for out, b in pairs] for row in x])


def rope(
    x: Floats,
    positions: Sequence[int],
    *,
    base: float,
    dim: int,
    layout: str,
    factor: float = 1.0,
    freq_factors: Floats | None = None,
) -> Floats:
    """Su et al. 2021: pair i of every head is a complex number, turned by position x base^(-2i/dim)."""
    out = np.array(x)
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if layout == "norm" else (i, i + dim // 2)
        divisor = factor * (1.0 if freq_factors is None else float(freq_factors[i]))
        for row, position in enumerate(positions):
            angle = position * base ** (-2 * i / dim) / divisor
            for head in range(x.shape[1]):
                turned = complex(x[row, head, a], x[row, head, b]) * complex(math.cos(angle), math.sin(angle))
                out[row, head, a], out[row, head, b] = turned.real, turned.imag
    return out


def softmax_row(row: Vector) -> list[float]:
    """exp(v) over their sum; minus infinity gives 0."""
    top = max(row)
    weights = [math.exp(v - top) for v in row]
    total = math.fsum(weights)
    return [w / total for w in weights]


def softmax(x: Floats) -> Floats:
    """`softmax_row` of every row."""
    return np.array([softmax_row(row) for row in x.tolist()])


def attention(
    q: Floats, k: Floats, v: Floats, *, start: int, scale: float, window: int | None = None
) -> Floats:
    """Causal attention, one query head and one row at a time.

    Args:
        q: (row, head, dim). k, v: (kv_head, length, dim). Row i stands at position start + i.
    """
    rows, heads, dim = q.shape
    group = heads // k.shape[0]
    out = np.zeros((rows, heads, dim))
    for row in range(rows):
        last = start + row
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(heads):
            seen = slice(first, last + 1)
            scores = (k[head // group, seen] @ q[row, head] * scale).tolist()
            out[row, head] = np.array(softmax_row(scores)) @ v[head // group, seen]
    return out.reshape(rows, heads * dim)


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)) without overflow."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))


def swiglu(gate: Floats, up: Floats) -> Floats:
    """Shazeer 2020: gate sigmoid(gate) up."""
    pairs = zip(gate.ravel().tolist(), up.ravel().tolist(), strict=True)
    return np.array([g * sigmoid(g) * u for g, u in pairs]).reshape(gate.shape)


def gelu_tanh(x: Floats) -> Floats:
    """Hendrycks and Gimpel 2016, the tanh form."""
    root = math.sqrt(2 / math.pi)
    flat = [v / 2 * (1 + math.tanh(root * (v + 0.044715 * v**3))) for v in x.ravel().tolist()]
    return np.array(flat).reshape(x.shape)


def add(a: Floats, b: Floats) -> Floats:
    """a + b."""
    pairs = zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)
    return np.array([p + q for p, q in pairs]).reshape(a.shape)
