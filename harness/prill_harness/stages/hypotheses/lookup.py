"""Activations that are looked up in a table instead of computed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prill_harness.stages.hypotheses.case import Array, Case, Guess, hypothesis
from prill_harness.stages.hypotheses.feedforward import ACTIVATIONS, CALLED
from prill_runtime.models.nodes.feedforward import Dense

END = 10.0  # beyond it ggml's GELU is its input or 0, whatever the table says


def looked_up(name: str, x: Array) -> Array:
    """ggml's table on a CPU: an entry for each float16, itself a float16."""

    def half(values: Array) -> Array:
        return values.astype(np.float16).astype(np.float64)

    inside = half(ACTIVATIONS[name](half(np.clip(x, -END, END))))
    return np.where(x <= -END, 0.0, np.where(x >= END, x, inside))


@hypothesis(Dense, stages=("act",))
def tables(case: Case, node: Dense) -> Iterator[Guess]:
    """A table of float16, as llama.cpp has it for GELU on a CPU."""
    name = CALLED[node.activation]
    for activation in {name, "GELU (tanh)"} if name.startswith("GELU") else {name}:
        gate, *up = case.inputs
        found = looked_up(activation, gate)
        instead = "" if activation == name else f" instead of {name}"
        yield f"{activation} looked up in a table of float16{instead}", found * up[0] if up else found
