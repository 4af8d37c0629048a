"""Faults of the feed-forward layer, its matrix products and activations, and of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, node, op, wiring

ACT = ("act",)
STREAM = ("ffn_in", "out")
BRANCH = ("ffn_norm", "gate", "up", "act", "down")
PRODUCTS = ("q", "k", "v", "attn_out", "gate", "up", "down", "logits")


@fault(area="feed-forward", blames=ACT, needs=("gate",))
def gate_up_swapped() -> Iterator[Patch]:
    """Gate and up change places."""
    yield op("swiglu", lambda o, self, gate, up: o(self, up, gate))


@fault(area="feed-forward", blames=ACT, needs=("silu",))
def silu_without_gate() -> Iterator[Patch]:
    """The SiLU is taken of up, and the gate left out."""
    yield op("swiglu", lambda o, self, gate, up: o(self, up, np.ones_like(up)))


@fault(area="feed-forward", blames=ACT, needs=("silu",))
def sigmoid_for_silu() -> Iterator[Patch]:
    """The gate passes through a sigmoid, not through SiLU."""

    def swiglu(original: Any, self: Any, gate: Any, up: Any) -> Any:
        with np.errstate(over="ignore"):
            return np.asarray(up / (1 + np.exp(-gate)))

    yield op("swiglu", swiglu)


@fault(area="feed-forward", blames=ACT, needs=("silu",))
def gelu_for_silu() -> Iterator[Patch]:
    """The gate passes through GELU, not through SiLU."""
    yield op("swiglu", lambda o, self, gate, up: np.asarray(self.gelu_tanh(gate) * up))


@fault(area="feed-forward", blames=ACT, needs=("gate",))
def gate_clamped() -> Iterator[Patch]:
    """The gate is clamped at 7, as only another architecture does."""
    yield op("swiglu", lambda o, self, gate, up: o(self, np.minimum(gate, gate.dtype.type(7)), up))


@fault(area="feed-forward", blames=ACT, needs=("gelu_tanh",))
def gelu_erf() -> Iterator[Patch]:
    """GELU is computed with erf, where the model has the tanh form."""
    from math import erf

    erfs = np.vectorize(erf, otypes=[float])
    yield op("gelu_tanh", lambda o, self, x: (x / 2 * (1 + erfs(x / 2**0.5))).astype(self.dtype))


@fault(area="feed-forward", blames=ACT, needs=("gelu_tanh",))
def gelu_quick() -> Iterator[Patch]:
    """GELU is approximated by x sigmoid(1.702 x)."""
    yield op(
        "gelu_tanh",
        lambda o, self, x: self.swiglu(x * self.dtype.type(1.702), np.ones_like(x)) / self.dtype.type(1.702),
    )


@fault(area="feed-forward", blames=ACT, needs=("gelu_tanh",))
def relu_for_gelu() -> Iterator[Patch]:
    """ReLU takes the place of GELU."""
    yield op("gelu_tanh", lambda o, self, x: np.maximum(x, 0))


@fault(area="feed-forward", blames=STREAM, models=ONE)
def residual_dropped() -> Iterator[Patch]:
    """The branch replaces the stream where it is added to it."""
    yield op("add", lambda o, self, a, b: b.copy())


@fault(area="feed-forward", blames=STREAM, models=ONE)
def residual_in_bfloat16() -> Iterator[Patch]:
    """The stream is kept in bfloat16."""

    def add(original: Any, self: Any, a: Any, b: Any) -> Any:
        bits = original(self, a, b).astype(np.float32).view(np.uint32)
        return ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32).astype(self.dtype)

    yield op("add", add)


@fault(area="feed-forward", blames=BRANCH, models=ONE)
def gross_no_ffn() -> Iterator[Patch]:
    """The feed-forward branch is left out of every layer."""

    def forward(original: Any, self: Any, p: Any) -> Any:
        stream: dict[str, Any] = {}

        def around_it(stage: str, x: Any) -> Any:
            block, _, kind = stage.rpartition(".")
            if kind in BRANCH:
                return x  # nobody is shown what is not there
            x = p.tap(stage, stream[block] if kind == "out" else x)
            if kind == "ffn_in":
                stream[block] = x
            return x

        return original(self, replace(p, tap=around_it))

    yield node("Network", forward)


@fault(area="feed-forward", blames=("down",), models=ONE)
def ffn_down_of_next_layer() -> Iterator[Patch]:
    """The first layer uses the feed-forward output matrix of the second."""

    def moved(weights: Any) -> None:
        weights["blk.0.ffn_down.weight"] = weights["blk.1.ffn_down.weight"]

    yield wiring(moved)


@fault(area="feed-forward", blames=PRODUCTS, needs=("bias",))
def linear_bias_dropped() -> Iterator[Patch]:
    """Matrix products leave out their bias."""
    yield op("linear", lambda o, self, x, weight, bias=None: o(self, x, weight))


@fault(area="feed-forward", blames=PRODUCTS, needs=("bias",))
def linear_bias_twice() -> Iterator[Patch]:
    """Matrix products add their bias twice."""
    yield op(
        "linear", lambda o, self, x, weight, bias=None: o(self, x, weight, None if bias is None else 2 * bias)
    )


@fault(area="feed-forward", blames=PRODUCTS, models=ONE)
def linear_tail_dropped() -> Iterator[Patch]:
    """Matrix products sum over whole groups of 32 columns and no rest."""

    def linear(original: Any, self: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        whole = x.shape[-1] - x.shape[-1] % 32
        return original(self, x[:, :whole], weight[:, :whole], bias)

    yield op("linear", linear)


@fault(area="feed-forward", blames=PRODUCTS, models=ONE)
def linear_input_in_half() -> Iterator[Patch]:
    """Activations are rounded to half precision before every matrix product."""

    def linear(original: Any, self: Any, x: Any, *rest: Any) -> Any:
        with np.errstate(over="ignore"):
            return original(self, x.astype(np.float16).astype(self.dtype), *rest)

    yield op("linear", linear)


@fault(area="options", blames=ACT, models=ONE)
def tanh_for_erf() -> Iterator[Patch]:
    """GELU is computed with tanh, where the model has the exact form."""
    yield op("gelu_erf", lambda o, self, x: self.gelu_tanh(x))


@fault(area="options", blames=ACT, needs=("gelu_tanh", "gate"))
def silu_for_gelu() -> Iterator[Patch]:
    """The gate passes through SiLU, not through GELU."""
    yield op("geglu", lambda o, self, gate, up: self.swiglu(gate, up))


@fault(area="options", blames=("ffn_norm",), models=ONE)
def branches_in_sequence() -> Iterator[Patch]:
    """In a layer whose branches are side by side the feed-forward layer reads the stream behind attention."""

    def layer(original: Any, self: Any, p: Any, x: Any) -> Any:
        if not self.parallel:
            return original(self, p, x)
        attended = self.attention(p, x)
        made = self.dense(p, p.ops.add(x, attended))
        return p.tap(f"{self.at}out", p.ops.add(x, p.ops.add(attended, made)))

    yield node("Layer", layer)


@fault(area="options", blames=("ffn_norm",), models=ONE)
def branches_in_parallel() -> Iterator[Patch]:
    """In a layer whose branches are in sequence the feed-forward layer reads the stream before attention."""

    def layer(original: Any, self: Any, p: Any, x: Any) -> Any:
        if self.parallel:
            return original(self, p, x)
        attended = p.tap(f"{self.at}ffn_in", p.ops.add(x, self.attention(p, x)))
        return p.tap(f"{self.at}out", p.ops.add(attended, self.dense(p, x)))

    yield node("Layer", layer)
