"""RMSNorm and LayerNorm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prill_runtime.models.base import Node, Pass, Stage, Tensor, Value
from prill_runtime.ops.protocol import Array


@dataclass(frozen=True)
class Norm(Node):
    """A norm over the last axis.

    Attributes:
        name: full name of its stage. tensor: that of its tensors, where it is another.
    """

    name: str
    width: int
    eps: float
    tensor: str = ""

    @property
    def stem(self) -> str:
        """Name of its tensors, without `.weight` or `.bias`."""
        return self.tensor or self.name

    def tensors(self) -> Iterator[Tensor]:
        yield Tensor(f"{self.stem}.weight", (self.width,))

    def effective(self) -> dict[str, Value]:
        return {"norm_eps": self.eps}

    def stages(self, source: str) -> Iterator[Stage]:
        yield Stage(self.name, (source,), (self.stem,), self)

    def __call__(self, p: Pass, x: Array) -> Array:
        raise NotImplementedError


@dataclass(frozen=True)
class RmsNorm(Norm):
    """x / sqrt(mean(x²) + eps) · weight."""

    def features(self) -> set[str]:
        return {"rms_norm"}

    def __call__(self, p: Pass, x: Array) -> Array:
        return p.tap(self.name, p.ops.rms_norm(x, p.weights[f"{self.stem}.weight"], self.eps))


@dataclass(frozen=True)
class LayerNorm(Norm):
    """(x − mean) / sqrt(var + eps) · weight + bias."""

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        yield Tensor(f"{self.stem}.bias", (self.width,))

    def features(self) -> set[str]:
        return {"layer_norm"}

    def __call__(self, p: Pass, x: Array) -> Array:
        weight, bias = (p.weights[f"{self.stem}.{part}"] for part in ("weight", "bias"))
        return p.tap(self.name, p.ops.layer_norm(x, weight, bias, self.eps))
