"""Faults of a mixture of experts: its router, its matrices, its activation, its sum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import forgotten, op, option, wiring

AREA = "options"
ROUTED, ACT, SUM = ("routed",), ("expert_act",), ("experts",)
CLOSE = 0.02  # logits
PRODUCTS = ("expert_gate", "expert_up", "expert_down")


@fault(area=AREA, blames=ROUTED, needs=("experts",))
def softmax_before_choice() -> Iterator[Patch]:
    """The router's softmax is over all experts, and the weights of the chosen are not brought to 1."""
    yield option("route", normalised=False)


@fault(area=AREA, blames=ROUTED, needs=("experts",))
def one_expert_less() -> Iterator[Patch]:
    """The expert with the smallest weight is left out."""
    yield option("route", used=lambda used: used - 1)


@fault(area=AREA, blames=ROUTED, needs=("experts",))
def ties_to_highest_id() -> Iterator[Patch]:
    """Of experts with equal logits those with the highest ids are chosen."""
    yield op("route", lambda o, self, logits, **how: o(self, logits[:, ::-1], **how)[:, ::-1].copy())


@fault(area=AREA, blames=ROUTED, needs=("experts",))
def close_experts_exchanged() -> Iterator[Patch]:
    """Where their logits are close, the first expert that is left out is chosen instead of the last one."""

    def route(original: Any, self: Any, logits: Any, *, used: int, **how: Any) -> Any:
        best = np.argsort(-logits, axis=-1, kind="stable")[:, used - 1 : used + 1]
        pair = np.take_along_axis(logits, best, axis=-1)
        moved = logits.copy()
        for row in np.flatnonzero(np.ptp(pair, axis=-1) < CLOSE):
            moved[row, best[row]] = pair[row, ::-1]
        return original(self, moved, used=used, **how)

    yield op("route", route)


@fault(area=AREA, blames=("router",), needs=("experts", "expert_bias"))
def router_bias_dropped() -> Iterator[Patch]:
    """The router leaves out its bias."""
    yield forgotten("ffn_gate_inp.bias")


@fault(area=AREA, blames=PRODUCTS, needs=("expert_bias",))
def expert_bias_dropped() -> Iterator[Patch]:
    """Experts leave out their biases."""
    yield op("expert_linear", lambda o, self, *given, bias=None, **how: o(self, *given, **how))


@fault(area=AREA, blames=PRODUCTS, needs=("experts",))
def experts_shifted() -> Iterator[Patch]:
    """Each expert has the matrix of the one before it."""
    yield op("expert_linear", lambda o, self, x, weight, *given, **how: o(
        self, x, np.roll(weight, 1, axis=0), *given, **how))  # fmt: skip


@fault(area=AREA, blames=("expert_gate",), needs=("experts",))
def experts_exchanged() -> Iterator[Patch]:
    """The first two experts have each other's gate matrix."""

    def exchanged(weights: Any) -> None:
        for name in weights:
            if name.endswith("ffn_gate_exps.weight"):
                weights[name] = weights[name][[1, 0, *range(2, len(weights[name]))]]

    yield wiring(exchanged)


@fault(area=AREA, blames=SUM, needs=("experts",))
def experts_not_weighted() -> Iterator[Patch]:
    """What experts made is added without their weights."""
    yield op("mix", lambda o, self, x, routed: o(self, x, (routed != 0).astype(routed.dtype)))


@fault(area=AREA, blames=SUM, needs=("experts",))
def experts_weighted_by_rank() -> Iterator[Patch]:
    """The largest weight goes to the expert with the lowest id, the smallest to that with the highest."""

    def mix(original: Any, self: Any, x: Any, routed: Any) -> Any:
        ranked = routed.copy()
        for row in ranked:
            row[row != 0] = -np.sort(-row[row != 0])
        return original(self, x, ranked)

    yield op("mix", mix)


@fault(area=AREA, blames=ACT, needs=("clamped",))
def clamp_left_out() -> Iterator[Patch]:
    """Neither half of a clamped SwiGLU is clamped."""
    yield option("swiglu_clamped", limit=float("inf"))


@fault(area=AREA, blames=ACT, needs=("clamped",))
def clamp_of_gate_alone() -> Iterator[Patch]:
    """The gate of a clamped SwiGLU is clamped, the linear half not."""

    def swiglu(original: Any, self: Any, gate: Any, up: Any, *, limit: float, alpha: float) -> Any:
        return original(self, np.minimum(gate, limit), up, limit=float("inf"), alpha=alpha)

    yield op("swiglu_clamped", swiglu)


@fault(area=AREA, blames=ACT, needs=("clamped",))
def linear_half_not_raised() -> Iterator[Patch]:
    """Nothing is added to the linear half of a clamped SwiGLU."""

    def swiglu(original: Any, self: Any, gate: Any, up: Any, **how: Any) -> Any:
        return original(self, gate, up, **how) - original(self, gate, np.zeros_like(up), **how)

    yield op("swiglu_clamped", swiglu)


@fault(area=AREA, blames=ACT, needs=("clamped",))
def clamped_alpha_one() -> Iterator[Patch]:
    """The sigmoid of a clamped SwiGLU is that of the gate, which has a factor."""
    yield option("swiglu_clamped", alpha=1.0)
