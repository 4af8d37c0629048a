"""Attention, with its projections, rotation and cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prill_runtime.models.base import CacheLayout, Node, Pass, Stage, Tensor, Value
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
        q_norm, k_norm: of each head, before the rotation. softcap: scores stay within it. sinks: name of a
            tensor (heads,), scores of no key. temper: beta and original of late queries (`Backend.temper`).
        post: of what is added to the stream.
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
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    softcap: float | None = None
    sinks: str | None = None
    temper: tuple[float, int] | None = None
    post: Norm | None = None

    @property
    def last(self) -> str:
        """The stage that is added to the stream."""
        return self.out.stage if self.post is None else self.post.name

    def tensors(self) -> Iterator[Tensor]:
        if self.sinks is not None:
            yield Tensor(self.sinks, (self.heads,))

    @property
    def cache(self) -> CacheLayout:
        return CacheLayout(self.kv_heads, self.size, self.size, self.window)

    def effective(self) -> dict[str, Value]:
        said: dict[str, Value] = {"n_heads": self.heads, "n_kv_heads": self.kv_heads, "head_dim": self.size}
        if self.window is not None:
            said["window"] = self.window
        if self.temper is not None:
            said["temperature"] = self.temper[0]
        return said

    def features(self) -> set[str]:
        has = {"gqa": self.kv_heads != self.heads, "window": self.window is not None,
               "fused_qkv": self.q.name == self.k.name, "qk_norm": self.q_norm is not None,
               "softcap": self.softcap is not None, "sinks": self.sinks is not None,
               "temperature": self.temper is not None, "post_norm": self.post is not None}  # fmt: skip
        return {name for name, true in has.items() if true}

    def stages(self, source: str) -> Iterator[Stage]:
        yield from self.norm.stages(source)
        for part in (self.q, self.k, self.v):
            yield from part.stages(self.norm.name)
        read = [self.q.stage, self.k.stage, self.v.stage]
        for number, norm in enumerate((self.q_norm, self.k_norm)):
            if norm is not None:
                yield from norm.stages(read[number])
                read[number] = norm.name
        if self.rope is not None:
            for number, turned in enumerate((f"{self.at}q_rope", f"{self.at}k_rope")):
                yield Stage(turned, (read[number],), (), self.rope)
                read[number] = turned
        yield Stage(f"{self.at}attn", tuple(read), () if self.sinks is None else (self.sinks,), self)
        yield from self.out.stages(f"{self.at}attn")
        if self.post is not None:
            yield from self.post.stages(self.out.stage)

    def __call__(self, p: Pass, x: Array) -> Array:
        q, k, v = self.project(p, self.norm(p, x))
        if self.q_norm is not None:
            q = self.q_norm(p, q)
        if self.k_norm is not None:
            k = self.k_norm(p, k)
        if self.rope is not None:
            q, k = self.rope(p, q, f"{self.at}q_rope"), self.rope(p, k, f"{self.at}k_rope")
        out = self.out(p, p.tap(f"{self.at}attn", self.attend(p, q, k, v)))
        return out if self.post is None else self.post(p, out)

    def project(self, p: Pass, h: Array) -> Iterator[Array]:
        """Queries, keys and values (row, head, size); with a tensor that they share one product is made."""
        products: dict[str, Array] = {}
        for part in (self.q, self.k, self.v):
            yield part.shared(p, h, products)

    def attend(self, p: Pass, q: Array, k: Array, v: Array) -> Array:
        """Append k, v (row, kv_head, size) to each sequence's cache and attend with q (row, head, size)."""
        how: dict[str, Any] = {"scale": self.scale, "window": self.window}
        if self.softcap is not None:
            how["softcap"] = self.softcap
        if self.sinks is not None:
            how["sinks"] = p.weights[self.sinks]
        if self.temper is not None:
            beta, original = self.temper
            q = p.ops.temper(q, p.step.positions, beta=beta, original=original)
        mixed = []
        for cache, rows in p.step.sequences:
            cache.append(self.layer, k[rows], v[rows])
            keys, values = cache.view(self.layer)
            mixed.append(p.ops.attention(q[rows], keys, values, start=cache.length, **how))
        return mixed[0] if len(mixed) == 1 else p.ops.concatenate(mixed)
