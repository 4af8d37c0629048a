"""The stream comes in; what the feed-forward layer makes of each position goes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from prill_runtime.errors import UnsupportedModel
from prill_runtime.models.base import Node, Pass, Stage, Value
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.norms import Norm
from prill_runtime.ops.protocol import Array

GATED: Final = {"silu": "swiglu"}
PLAIN: Final = {"gelu_tanh": "gelu_tanh"}
"""Ops of the activations: of a gate times up, and of up alone."""


@dataclass(frozen=True)
class Dense(Node):
    """The feed-forward layer, from the norm before it: down(activation(gate) · up), or down(activation(up)).

    Raises:
        UnsupportedModel: an activation that no op computes.
    """

    at: str
    norm: Norm
    up: Linear
    down: Linear
    gate: Linear | None = None
    activation: str = "silu"

    def __post_init__(self) -> None:
        known = GATED if self.gate is not None else PLAIN
        if self.activation not in known:
            raise UnsupportedModel(
                "this activation is not implemented", where=f"{self.at}act", expected=" or ".join(known),
                got=repr(self.activation),
            )  # fmt: skip

    def effective(self) -> dict[str, Value]:
        return {"ffn": self.up.rows}

    def features(self) -> set[str]:
        return {self.activation, *(("gate",) if self.gate is not None else ())}

    def stages(self, source: str) -> Iterator[Stage]:
        yield from self.norm.stages(source)
        inputs = [part for part in (self.gate, self.up) if part is not None]
        for part in inputs:
            yield from part.stages(self.norm.name)
        yield Stage(f"{self.at}act", tuple(part.stage for part in inputs), (), self)
        yield from self.down.stages(f"{self.at}act")

    def __call__(self, p: Pass, x: Array) -> Array:
        h = self.norm(p, x)
        if self.gate is not None:
            gate = self.gate(p, h)
            act = getattr(p.ops, GATED[self.activation])(gate, self.up(p, h))
        else:
            act = getattr(p.ops, PLAIN[self.activation])(self.up(p, h))
        return self.down(p, p.tap(f"{self.at}act", act))
