"""Layers, embedding, head, and the whole network made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from prill_runtime.errors import UnsupportedModel
from prill_runtime.models.base import CacheLayout, Node, Pass, Stage, Tensor, Value
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.experts import Experts
from prill_runtime.models.nodes.feedforward import Dense
from prill_runtime.models.nodes.norms import Norm
from prill_runtime.ops.protocol import Array


@dataclass(frozen=True)
class Layer(Node):
    """Attention and a feed-forward layer, each added to the stream; `parallel`: both see what comes in."""

    at: str
    attention: Attention
    dense: Dense | Experts
    parallel: bool = False

    def features(self) -> set[str]:
        return {"parallel"} if self.parallel else set()

    def stages(self, source: str) -> Iterator[Stage]:
        yield from self.attention.stages(source)
        if self.parallel:
            yield from self.dense.stages(source)
            yield Stage(f"{self.at}out", (source, self.attention.last, self.dense.last), (), self)
            return
        yield Stage(f"{self.at}ffn_in", (source, self.attention.last), (), self)
        yield from self.dense.stages(f"{self.at}ffn_in")
        yield Stage(f"{self.at}out", (f"{self.at}ffn_in", self.dense.last), (), self)

    def __call__(self, p: Pass, x: Array) -> Array:
        if self.parallel:
            attended, made = self.attention(p, x), self.dense(p, x)
            return p.tap(f"{self.at}out", p.ops.add(x, p.ops.add(attended, made)))
        x = p.tap(f"{self.at}ffn_in", p.ops.add(x, self.attention(p, x)))
        return p.tap(f"{self.at}out", p.ops.add(x, self.dense(p, x)))


@dataclass(frozen=True)
class Embed(Node):
    """Rows of the embedding table, times `scale`, and of one of `context` learned positions where it is
    named."""

    name: str
    vocab: int
    width: int
    positions: str | None = None
    context: int = 0
    scale: float | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield Tensor(f"{self.name}.weight", (self.vocab, self.width))
        if self.positions is not None:
            yield Tensor(f"{self.positions}.weight", (self.context, self.width))

    def features(self) -> set[str]:
        has = {"learned_positions": self.positions is not None, "embedding_scale": self.scale is not None}
        return {name for name, true in has.items() if true}

    def stages(self) -> Iterator[Stage]:
        yield Stage("embed", (), tuple(filter(None, (self.name, self.positions))), self)

    def __call__(self, p: Pass) -> Array:
        x = p.ops.embed(p.weights[f"{self.name}.weight"], p.step.ids)
        if self.scale is not None:
            x = p.ops.scale(x, self.scale)
        if self.positions is not None:
            x = p.ops.add(x, p.ops.embed(p.weights[f"{self.positions}.weight"], p.step.positions))
        return p.tap("embed", x)


@dataclass(frozen=True)
class Head(Node):
    """Logits (row, vocab) from hidden states after the last norm; `tied`: by the embedding table.

    `softcap`: they stay within it.
    """

    name: str
    vocab: int
    width: int
    tied: bool
    bias: bool = False
    softcap: float | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield Tensor(f"{self.name}.weight", (self.vocab, self.width))
        if self.bias:
            yield Tensor(f"{self.name}.bias", (self.vocab,))

    def effective(self) -> dict[str, Value]:
        return {"tied_head": self.tied}

    def features(self) -> set[str]:
        has = {"tied": self.tied, "head_bias": self.bias, "logit_softcap": self.softcap is not None}
        return {name for name, true in has.items() if true}

    def stages(self, source: str) -> Iterator[Stage]:
        yield Stage("logits", (source,), (self.name,), self)

    def __call__(self, p: Pass, hidden: Array) -> Array:
        weight, bias = p.weights[f"{self.name}.weight"], p.weights.get(f"{self.name}.bias")
        logits = p.ops.linear(hidden, weight, bias) if self.bias else p.ops.linear(hidden, weight)
        return p.tap("logits", logits if self.softcap is None else p.ops.softcap(logits, self.softcap))


@dataclass(frozen=True)
class Network(Node):
    """A whole model: what an architecture's description makes of one file."""

    architecture: str
    context: int
    embed: Embed
    layers: tuple[Layer, ...]
    norm: Norm
    head: Head

    @property
    def vocab(self) -> int:
        return self.embed.vocab

    @property
    def width(self) -> int:
        return self.embed.width

    @cached_property
    def caches(self) -> tuple[CacheLayout, ...]:
        """What each layer keeps of every position."""
        return tuple(node.cache for node in self.walk() if isinstance(node, Attention))

    @cached_property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads of keys and components of a head, of a cache that has one shape for all layers.

        Raises:
            UnsupportedModel: layers that keep more or less than others.
        """
        kept = self.caches
        shapes = {(layout.kv_heads, layout.key_size, layout.value_size) for layout in kept}
        if len(shapes) != 1 or kept[0].key_size != kept[0].value_size:
            raise UnsupportedModel("caches of different shapes are not implemented", got=repr(sorted(shapes)))
        return len(kept), kept[0].kv_heads, kept[0].key_size

    def __call__(self, p: Pass) -> Array:
        """Hidden states after the last norm (row, width); keys and values go to the caches, uncommitted."""
        x = self.embed(p)
        for layer in self.layers:
            x = layer(p, x)
        return self.norm(p, x)
