"""Queries or keys come in; turned to their positions they come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prill_runtime.models.base import Node, Pass, Tensor, Value
from prill_runtime.ops.protocol import Array, RopeLayout


@dataclass(frozen=True)
class Rope(Node):
    """Rotary positions of the first `dim` components of each head.

    Attributes:
        factor: positions are divided by it. scaling: the file's name for that. divisors: name of a tensor
            (dim/2,), one for each frequency.
    """

    layout: RopeLayout
    dim: int
    base: float
    factor: float = 1.0
    scaling: str = "none"
    divisors: str | None = None

    def tensors(self) -> Iterator[Tensor]:
        if self.divisors is not None:
            yield Tensor(self.divisors, (self.dim // 2,))

    def effective(self) -> dict[str, Value]:
        return {"rope_base": self.base, "rope_dim": self.dim, "rope_scaling": self.scaling,
                "rope_factor": self.factor}  # fmt: skip

    def features(self) -> set[str]:
        return {"rope"}

    def settings(self, weights: Mapping[str, Array]) -> dict[str, Any]:
        """What `Backend.rope` takes besides the layout: what a backend makes its frequencies of."""
        divisors = None if self.divisors is None else weights[self.divisors]
        return {"base": self.base, "dim": self.dim, "factor": self.factor, "freq_factors": divisors}

    def __call__(self, p: Pass, x: Array, stage: str) -> Array:
        """x (row, head, dim) turned to its positions."""
        turned = p.ops.rope(x, p.step.positions, layout=self.layout, **self.settings(p.weights))
        return p.tap(stage, turned)
