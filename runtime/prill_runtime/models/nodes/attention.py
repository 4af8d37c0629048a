"""The stream comes in; what its positions take from one another goes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prill_runtime.models.base import CacheLayout, Node, Pass, Stage, Value
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.norms import Norm
from prill_runtime.models.nodes.rope import Rope
from prill_runtime.ops.protocol import Array


@dataclass(frozen=True)
class Attention(Node):
    """Causal attention over a sequence's cache, from the norm before it to the projection after it.

    Attributes:
        at: name of the block, with its dot. layer: its place in the cache. heads: of queries; each
            heads / kv_heads of them share a head of keys. size: components of a head.
    """

    at: str
    layer: int
    norm: Norm
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    heads: int
    kv_heads: int
    size: int
    scale: float
    rope: Rope | None = None
    window: int | None = None

    @property
    def cache(self) -> CacheLayout:
        return CacheLayout(self.kv_heads, self.size, self.size, self.window)

    def effective(self) -> dict[str, Value]:
        said = {"n_heads": self.heads, "n_kv_heads": self.kv_heads, "head_dim": self.size}
        return said if self.window is None else {**said, "window": self.window}  # type: ignore[return-value]

    def features(self) -> set[str]:
        has = {"gqa": self.kv_heads != self.heads, "window": self.window is not None,
               "fused_qkv": self.q.name == self.k.name}  # fmt: skip
        return {name for name, true in has.items() if true}

    def stages(self, source: str) -> Iterator[Stage]:
        yield from self.norm.stages(source)
        for part in (self.q, self.k, self.v):
            yield from part.stages(self.norm.name)
        read = [self.q.stage, self.k.stage, self.v.stage]
        if self.rope is not None:
            for number, turned in enumerate((f"{self.at}q_rope", f"{self.at}k_rope")):
                yield Stage(turned, (read[number],), (), self.rope)
                read[number] = turned
        yield Stage(f"{self.at}attn", tuple(read), (), self)
        yield from self.out.stages(f"{self.at}attn")

    def __call__(self, p: Pass, x: Array) -> Array:
        q, k, v = self.project(p, self.norm(p, x))
        if self.rope is not None:
            q, k = self.rope(p, q, f"{self.at}q_rope"), self.rope(p, k, f"{self.at}k_rope")
        return self.out(p, p.tap(f"{self.at}attn", self.attend(p, q, k, v)))

    def project(self, p: Pass, h: Array) -> Iterator[Array]:
        """Queries, keys and values (row, head, size); with a tensor that they share one product is made."""
        products: dict[str, Array] = {}
        for part in (self.q, self.k, self.v):
            if part.name not in products:
                products[part.name] = part.product(p, h)
            yield part(p, h, products[part.name])

    def attend(self, p: Pass, q: Array, k: Array, v: Array) -> Array:
        """Append k, v (row, kv_head, size) to each sequence's cache and attend with q (row, head, size)."""
        mixed = []
        for cache, rows in p.step.sequences:
            cache.append(self.layer, k[rows], v[rows])
            keys, values = cache.view(self.layer)
            mixed.append(
                p.ops.attention(
                    q[rows], keys, values, start=cache.length, scale=self.scale, window=self.window
                )
            )
        return mixed[0] if len(mixed) == 1 else p.ops.concatenate(mixed)
