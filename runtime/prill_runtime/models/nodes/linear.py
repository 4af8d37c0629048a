"""The product with a matrix of the file, or with some of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prill_runtime.models.base import Node, Pass, Stage, Tensor
from prill_runtime.ops.protocol import Array


@dataclass(frozen=True)
class Linear(Node):
    """x · weightᵀ + bias.

    Attributes:
        stage: full name. name: the tensor's, without `.weight`. rows, cols: out and in.
        heads: the result is (row, head, rows / heads); without, (row, rows).
        first, of: the first of its rows in a tensor of `of` rows that others share.
    """

    stage: str
    name: str
    rows: int
    cols: int
    bias: bool = False
    heads: int | None = None
    first: int = 0
    of: int | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield Tensor(f"{self.name}.weight", (self.of or self.rows, self.cols))
        if self.bias:
            yield Tensor(f"{self.name}.bias", (self.of or self.rows,))

    def features(self) -> set[str]:
        return {"bias"} if self.bias else set()

    def stages(self, source: str) -> Iterator[Stage]:
        yield Stage(self.stage, (source,), (self.name,), self)

    def product(self, p: Pass, x: Array) -> Array:
        """(row, rows of the whole tensor)."""
        return p.ops.linear(x, p.weights[f"{self.name}.weight"], p.weights.get(f"{self.name}.bias"))

    def shared(self, p: Pass, x: Array, products: dict[str, Array]) -> Array:
        """As a call; `products` keeps that of a whole tensor for the others that have rows of it."""
        if self.name not in products:
            products[self.name] = self.product(p, x)
        return self(p, x, products[self.name])

    def __call__(self, p: Pass, x: Array, product: Array | None = None) -> Array:
        """`product`: that of the whole tensor, where somebody has it."""
        y = self.product(p, x) if product is None else product
        if self.of is not None:
            y = y[:, self.first : self.first + self.rows]
        return p.tap(
            self.stage, y if self.heads is None else y.reshape(-1, self.heads, self.rows // self.heads)
        )
