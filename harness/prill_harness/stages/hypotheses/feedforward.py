"""Ways to get activations and residual connections wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from prill_harness.stages.hypotheses.case import Array, Case, Guess, hypothesis

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)))


def gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "SiLU": lambda x: x * _sigmoid(x),
    "GELU (tanh)": gelu_tanh,
    "GELU (erf)": lambda x: np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2)))),
    "quick GELU": lambda x: x * _sigmoid(1.702 * x),
    "ReLU": lambda x: np.maximum(x, 0),
    "sigmoid": _sigmoid,
    "no activation": lambda x: x,
}


@hypothesis("act")
def activations(case: Case) -> Iterator[Guess]:
    """Another function, the gate, a clamp."""
    if len(case.inputs) == 1:
        x = case.inputs[0]
        for name, activation in ACTIVATIONS.items():
            if name != "GELU (tanh)":
                yield f"{name} instead of GELU (tanh)", activation(x)
        return
    gate, up = case.inputs
    silu = ACTIVATIONS["SiLU"]
    yield "gate and up exchanged", silu(up) * gate
    yield "SiLU(gate) without the product with up", silu(gate)
    yield "up alone, without the gate", up
    yield "SiLU(up) without the gate", silu(up)
    for name, activation in ACTIVATIONS.items():
        if name != "SiLU":
            yield f"{name} instead of SiLU", activation(gate) * up
    for limit in (7.0, 10.0):
        yield f"gate clamped at {limit:g}", silu(np.minimum(gate, limit)) * up


@hypothesis("ffn_in", "out")
def residuals(case: Case) -> Iterator[Guess]:
    """What is added to the residual stream."""
    stream, branch = case.inputs
    yield "residual left out (the branch alone)", branch
    yield "branch left out (the residual alone)", stream
    yield "branch added twice", stream + 2 * branch
    yield "residual added twice", 2 * stream + branch
    yield "branch subtracted", stream - branch
    yield "branch added to itself instead of the residual", 2 * branch
