"""The feed-forward layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from prill_runtime.errors import UnsupportedModel
from prill_runtime.models.base import Node, Pass, Stage, Value
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.norms import Norm
from prill_runtime.ops.protocol import Array

GATED: Final = {"silu": "swiglu", "gelu_tanh": "geglu"}
PLAIN: Final = {"gelu_tanh": "gelu_tanh", "gelu_erf": "gelu_erf"}
"""Ops of the activations: of a gate times up, and of up alone."""


@dataclass(frozen=True)
class Dense(Node):
    """The feed-forward layer, from the norm before it: down(activation(gate) · up), or down(activation(up)).

    `post`: the norm of what is added to the stream.

    Raises:
        UnsupportedModel: an activation that no op computes.
    """

    at: str
    norm: Norm
    up: Linear
    down: Linear
    gate: Linear | None = None
    activation: str = "silu"
    post: Norm | None = None

    def __post_init__(self) -> None:
        known = GATED if self.gate is not None else PLAIN
        if self.activation not in known:
            raise UnsupportedModel(
                "this activation is not implemented", where=f"{self.at}act", expected=" or ".join(known),
                got=repr(self.activation),
            )  # fmt: skip

    @property
    def last(self) -> str:
        """The stage that is added to the stream."""
        return self.down.stage if self.post is None else self.post.name

    def effective(self) -> dict[str, Value]:
        return {"ffn": self.up.rows}

    def features(self) -> set[str]:
        has = {self.activation: True, "gate": self.gate is not None, "post_norm": self.post is not None,
               "fused_gate_up": self.gate is not None and self.gate.name == self.up.name}  # fmt: skip
        return {name for name, true in has.items() if true}

    def stages(self, source: str) -> Iterator[Stage]:
        yield from self.norm.stages(source)
        inputs = [part for part in (self.gate, self.up) if part is not None]
        for part in inputs:
            yield from part.stages(self.norm.name)
        yield Stage(f"{self.at}act", tuple(part.stage for part in inputs), (), self)
        yield from self.down.stages(f"{self.at}act")
        if self.post is not None:
            yield from self.post.stages(self.down.stage)

    def __call__(self, p: Pass, x: Array) -> Array:
        h, products = self.norm(p, x), dict[str, Array]()
        if self.gate is not None:
            gate = self.gate.shared(p, h, products)
            act = getattr(p.ops, GATED[self.activation])(gate, self.up.shared(p, h, products))
        else:
            act = getattr(p.ops, PLAIN[self.activation])(self.up(p, h))
        down = self.down(p, p.tap(f"{self.at}act", act))
        return down if self.post is None else self.post(p, down)
