"""Rotary positions of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prill_runtime.models.base import Node, Pass, Tensor, Value
from prill_runtime.ops.protocol import Array, RopeLayout, Yarn


@dataclass(frozen=True)
class Rope(Node):
    """Rotary positions of the first `dim` components of each head.

    Attributes:
        factor: positions are divided by it. scaling: the file's name for that. divisors: name of a tensor
            (dim/2,), one for each frequency. yarn: factor counts by frequency. scale: of cosines and sines.
        long: name of divisors in place of the others for sequences beyond `original` positions.
        local: the rotation of layers with a window in a model that has two.
    """

    layout: RopeLayout
    dim: int
    base: float
    factor: float = 1.0
    scaling: str = "none"
    divisors: str | None = None
    yarn: Yarn | None = None
    scale: float = 1.0
    long: str | None = None
    original: int = 0
    local: bool = False

    def tensors(self) -> Iterator[Tensor]:
        for name in (self.divisors, self.long):
            if name is not None:
                yield Tensor(name, (self.dim // 2,))

    def effective(self) -> dict[str, Value]:
        if self.local:
            return {"rope_base_local": self.base}
        return {"rope_base": self.base, "rope_dim": self.dim, "rope_scaling": self.scaling,
                "rope_factor": self.factor}  # fmt: skip

    def features(self) -> set[str]:
        has = {"rope": True, "yarn": self.yarn is not None, "longrope": self.long is not None,
               "two_bases": self.local}  # fmt: skip
        return {name for name, true in has.items() if true}

    def settings(self, weights: Mapping[str, Array]) -> dict[str, Any]:
        """What `Backend.rope` takes besides the layout: what a backend makes its frequencies of."""
        divisors = None if self.divisors is None else weights[self.divisors]
        given = {"base": self.base, "dim": self.dim, "factor": self.factor, "freq_factors": divisors}
        more = {"yarn": self.yarn, "long": self.long and (weights[self.long], self.original)}
        if self.scale != 1.0:
            given["scale"] = self.scale
        return given | {name: value for name, value in more.items() if value is not None}

    def __call__(self, p: Pass, x: Array, stage: str) -> Array:
        """x (row, head, dim) turned to its positions."""
        at, settings = p.step.positions, self.settings(p.weights)
        if self.long is None or len(p.step.sequences) == 1:
            return p.tap(stage, p.ops.rope(x, at, layout=self.layout, **settings))
        # Which divisors count, the length of each sequence says.
        parts = [rows for _, rows in p.step.sequences]
        turned = [p.ops.rope(x[rows], at[rows], layout=self.layout, **settings) for rows in parts]
        return p.tap(stage, p.ops.concatenate(turned))
