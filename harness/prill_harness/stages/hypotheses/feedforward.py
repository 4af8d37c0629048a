"""Ways to get activations and residual connections wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from prill_harness.stages.hypotheses.case import Array, Case, Guess, hypothesis
from prill_runtime.models.nodes.feedforward import Dense
from prill_runtime.models.nodes.network import Layer

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


CALLED = {"silu": "SiLU", "gelu_tanh": "GELU (tanh)", "gelu_erf": "GELU (erf)"}
"""The names above of a node's activations."""


@hypothesis(Dense)
def activations(case: Case, node: Dense) -> Iterator[Guess]:
    """Another function, the gate, a clamp."""
    own = CALLED[node.activation]
    act, others = ACTIVATIONS[own], {name: f for name, f in ACTIVATIONS.items() if name != own}
    if node.gate is None:
        for name, activation in others.items():
            yield f"{name} instead of {own}", activation(case.inputs[0])
        return
    gate, up = case.inputs
    yield "gate and up exchanged", act(up) * gate
    yield f"{own}(gate) without the product with up", act(gate)
    yield "up alone, without the gate", up
    yield f"{own}(up) without the gate", act(up)
    for name, activation in others.items():
        yield f"{name} instead of {own}", activation(gate) * up
    for limit in (7.0, 10.0):
        yield f"gate clamped at {limit:g}", act(np.minimum(gate, limit)) * up


@hypothesis(Layer)
def residuals(case: Case, node: Layer) -> Iterator[Guess]:
    """What is added to the residual stream."""
    stream, *branches = case.inputs
    branch = np.add.reduce(branches)
    yield "residual left out (the branch alone)", branch
    yield "branch left out (the residual alone)", stream
    for name, one in zip(case.stage.inputs[1:], branches, strict=True):
        if len(branches) > 1:
            yield f"{name} left out of the sum", stream + branch - one
    yield "branch added twice", stream + 2 * branch
    yield "residual added twice", 2 * stream + branch
    yield "branch subtracted", stream - branch
    yield "branch added to itself instead of the residual", 2 * branch
