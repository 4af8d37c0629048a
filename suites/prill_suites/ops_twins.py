"""Every op again, one number at a time in float64, as the papers write it: the twins of the backends' ops."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.numbers.compare import largest, smallest

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
    yarn: Any = None,
    scale: float = 1.0,
    long: tuple[Floats, int] | None = None,
) -> Floats:
    """Su et al. 2021: pair i of every head is a complex number, turned by position x base^(-2i/dim), and
    `scale` times as long; of texts longer than those before `long`, its divisors are taken."""
    out = np.array(x)
    if long is not None and max(positions) + 1 > long[1]:
        freq_factors = long[0]
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if layout == "norm" else (i, i + dim // 2)
        divisor = factor if yarn is None else 1 / (1 - (share := slow(i, base, dim, yarn)) + share / factor)
        divisor *= 1.0 if freq_factors is None else float(freq_factors[i])
        for row, position in enumerate(positions):
            angle = position * base ** (-2 * i / dim) / divisor
            for head in range(x.shape[1]):
                turned = complex(x[row, head, a], x[row, head, b]) * cmath.rect(scale, angle)
                out[row, head, a], out[row, head, b] = turned.real, turned.imag
    return out


def slow(pair: int, base: float, dim: int, yarn: Any) -> float:
    """Peng et al. 2023, equations 17 and 18: 0 for a pair that turns `fast` times over the original
    positions, 1 for one that turns `slow` times; rounded outwards where the model does."""
    first, last = (
        dim / 2 * math.log(yarn.original / (2 * math.pi * turns), base) for turns in (yarn.fast, yarn.slow)
    )
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = largest(first, 0), smallest(last, dim - 1)
    return smallest(1.0, largest(0.0, (pair - first) / (last - first)))


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
    q: Floats,
    k: Floats,
    v: Floats,
    *,
    start: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Floats | None = None,
) -> Floats:
    """Causal attention, one query head and one row at a time.

    Args:
        q: (row, head, dim). k, v: (kv_head, length, dim). Row i stands at position start + i.
        sinks: (head,) scores of a key whose value is nought.
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
            if softcap is not None:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            sink = [] if sinks is None else [float(sinks[head])]
            weights = softmax_row([*scores, *sink])[: len(scores)]
            out[row, head] = np.array(weights) @ v[head // group, seen]
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


def swiglu_clamped(gate: Floats, up: Floats, *, limit: float, alpha: float) -> Floats:
    """gpt-oss: the gate is at most the limit, the linear half within it, and one is added to that."""
    out = []
    for g, u in zip(gate.ravel().tolist(), up.ravel().tolist(), strict=True):
        g, u = smallest(g, limit), largest(-limit, smallest(u, limit))
        out.append(g * sigmoid(alpha * g) * (u + 1))
    return np.array(out).reshape(gate.shape)


def geglu(gate: Floats, up: Floats) -> Floats:
    """Shazeer 2020, by the tanh form: gelu(gate) up."""
    return gelu_tanh(gate) * up


def gelu_erf(x: Floats) -> Floats:
    """Hendrycks and Gimpel 2016, the exact form."""
    return np.array([v / 2 * math.erfc(-v / math.sqrt(2)) for v in x.ravel().tolist()]).reshape(x.shape)


def scale(x: Floats, by: float) -> Floats:
    """x by."""
    return np.array([v * by for v in x.ravel().tolist()]).reshape(x.shape)


def layer(x: Floats, *, by: float, parallel: bool) -> Floats:
    """Wang and Komatsuzaki 2021: both branches, x by and GELU, of what comes in; or one after the other."""
    attended = x + by * x
    return attended + gelu_tanh(x if parallel else attended)


def softcap(x: Floats, cap: float) -> Floats:
    """Gemma 2: cap tanh(x / cap)."""
    return np.array([cap * math.tanh(v / cap) for v in x.ravel().tolist()]).reshape(x.shape)


def temper(x: Floats, positions: Sequence[int], *, beta: float, original: int) -> Floats:
    """Llama 4: queries beyond each multiple of the original length are sharper."""
    return np.array(
        [row * (1 + beta * math.log(1 + at // original)) for row, at in zip(x, positions, strict=True)]
    )


def route(logits: Floats, *, used: int, normalised: bool) -> Floats:
    """Shazeer et al. 2017: of every row the `used` largest, the lower id of equals, and their softmax; or
    theirs of the softmax over all."""
    out = np.zeros(logits.shape)
    for row, values in enumerate(logits.tolist()):
        best = sorted(range(len(values)), key=lambda expert: (-values[expert], expert))[:used]
        over_all = softmax_row(values)
        among = softmax_row([values[expert] for expert in best])
        for expert, weight in zip(best, among, strict=True):
            out[row, expert] = weight if normalised else over_all[expert]
    return out


def expert_linear(
    x: Floats, weight: Floats, routed: Floats, *, used: int, bias: Floats | None = None
) -> Floats:
    """Row r, place p: the matrix of the row's p-th expert, ascending, times the row, or its p-th row."""
    out = np.zeros((len(x), used, weight.shape[1]))
    for row, weights in enumerate(routed):
        for place, expert in enumerate(np.flatnonzero(weights).tolist()):
            own = x[row] if x.ndim == 2 else x[row, place]
            add = [0.0] * len(weight[expert]) if bias is None else bias[expert].tolist()
            sums = (math.fsum((own * each).tolist()) for each in weight[expert])
            out[row, place] = [a + b for a, b in zip(sums, add, strict=True)]
    return out


def mix(x: Floats, routed: Floats) -> Floats:
    """The sum of what a row's experts made, each times its weight."""
    out = np.zeros((len(x), x.shape[2]))
    for row, weights in enumerate(routed):
        for place, expert in enumerate(np.flatnonzero(weights).tolist()):
            out[row] += weights[expert] * x[row, place]
    return out


def gelu_tanh(x: Floats) -> Floats:
    """Hendrycks and Gimpel 2016, the tanh form."""
    root = math.sqrt(2 / math.pi)
    flat = [v / 2 * (1 + math.tanh(root * (v + 0.044715 * v**3))) for v in x.ravel().tolist()]
    return np.array(flat).reshape(x.shape)


def add(a: Floats, b: Floats) -> Floats:
    """a + b."""
    pairs = zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)
    return np.array([p + q for p, q in pairs]).reshape(a.shape)
