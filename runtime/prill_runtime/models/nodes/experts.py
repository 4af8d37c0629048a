"""A mixture of experts, chosen for each position by a router."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prill_runtime.models.base import Node, Pass, Stage, Tensor, Value
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.norms import Norm
from prill_runtime.ops.protocol import Array


@dataclass(frozen=True)
class ExpertLinear(Node):
    """The products of each row with the matrices of its experts: (row, used, rows).

    Attributes:
        stage: full name. name: the tensor's, without `.weight`. experts, rows, cols: of the tensor.
    """

    stage: str
    name: str
    experts: int
    rows: int
    cols: int
    used: int
    bias: bool = False

    def tensors(self) -> Iterator[Tensor]:
        yield Tensor(f"{self.name}.weight", (self.experts, self.rows, self.cols))
        if self.bias:
            yield Tensor(f"{self.name}.bias", (self.experts, self.rows))

    def features(self) -> set[str]:
        return {"expert_bias"} if self.bias else set()

    def __call__(self, p: Pass, x: Array, routed: Array) -> Array:
        weight, bias = p.weights[f"{self.name}.weight"], p.weights.get(f"{self.name}.bias")
        return p.tap(self.stage, p.ops.expert_linear(x, weight, routed, used=self.used, bias=bias))


@dataclass(frozen=True)
class Experts(Node):
    """A mixture of experts, from the norm before it: each a gated feed-forward layer of its own.

    Attributes:
        router: to one logit for each expert. used: of these, the largest. normalised: the softmax is over the
            chosen, else over all. clamp: limit and alpha of `Backend.swiglu_clamped` in place of SwiGLU.
    """

    at: str
    norm: Norm
    router: Linear
    gate: ExpertLinear
    up: ExpertLinear
    down: ExpertLinear
    used: int
    normalised: bool = True
    clamp: tuple[float, float] | None = None

    @property
    def last(self) -> str:
        """The stage that is added to the stream."""
        return f"{self.at}experts"

    def effective(self) -> dict[str, Value]:
        return {"n_experts": self.router.rows, "n_experts_used": self.used, "ffn": self.up.rows}

    def features(self) -> set[str]:
        return {"experts", "silu" if self.clamp is None else "clamped", "gate"}

    def stages(self, source: str) -> Iterator[Stage]:
        yield from self.norm.stages(source)
        yield from self.router.stages(self.norm.name)
        routed, act = f"{self.at}routed", f"{self.at}expert_act"
        yield Stage(routed, (self.router.stage,), (), self)
        for part in (self.gate, self.up):
            yield Stage(part.stage, (self.norm.name, routed), (part.name,), part)
        yield Stage(act, (self.gate.stage, self.up.stage), (), self)
        yield Stage(self.down.stage, (act, routed), (self.down.name,), self.down)
        yield Stage(self.last, (self.down.stage, routed), (), self)

    def __call__(self, p: Pass, x: Array) -> Array:
        h = self.norm(p, x)
        logits = self.router(p, h)
        routed = p.tap(f"{self.at}routed", p.ops.route(logits, used=self.used, normalised=self.normalised))
        gate, up = self.gate(p, h, routed), self.up(p, h, routed)
        if self.clamp is None:
            act = p.ops.swiglu(gate, up)
        else:
            limit, alpha = self.clamp
            act = p.ops.swiglu_clamped(gate, up, limit=limit, alpha=alpha)
        down = self.down(p, p.tap(f"{self.at}expert_act", act), routed)
        return p.tap(self.last, p.ops.mix(down, routed))
