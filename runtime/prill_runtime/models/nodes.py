"""What models are made of: data that tells its tensors, its stages, its cache and its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from prill_runtime.errors import UnsupportedModel
from prill_runtime.models.base import CacheLayout, Node, Stage, Step, Tap, Tensor, Value, untouched
from prill_runtime.ops.protocol import Array, Backend, RopeLayout


@dataclass(frozen=True)
class Norm(Node):
    """A norm over the last axis; its stage and its tensors have one name."""

    name: str
    width: int
    eps: float

    def tensors(self) -> Iterator[Tensor]:
        yield Tensor(f"{self.name}.weight", (self.width,))

    def effective(self) -> dict[str, Value]:
        return {"norm_eps": self.eps}

    def stages(self, source: str) -> Iterator[Stage]:
        yield Stage(self.name, (source,), (self.name,), self)

    def __call__(self, p: Pass, x: Array) -> Array:
        raise NotImplementedError


@dataclass(frozen=True)
class RmsNorm(Norm):
    """x / sqrt(mean(x²) + eps) · weight."""

    def features(self) -> set[str]:
        return {"rms_norm"}

    def __call__(self, p: Pass, x: Array) -> Array:
        return p.tap(self.name, p.ops.rms_norm(x, p.weights[f"{self.name}.weight"], self.eps))


@dataclass(frozen=True)
class LayerNorm(Norm):
    """(x − mean) / sqrt(var + eps) · weight + bias."""

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        yield Tensor(f"{self.name}.bias", (self.width,))

    def features(self) -> set[str]:
        return {"layer_norm"}

    def __call__(self, p: Pass, x: Array) -> Array:
        weight, bias = (p.weights[f"{self.name}.{part}"] for part in ("weight", "bias"))
        return p.tap(self.name, p.ops.layer_norm(x, weight, bias, self.eps))


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

    def __call__(self, p: Pass, x: Array, product: Array | None = None) -> Array:
        """`product`: that of the whole tensor, where somebody has it."""
        y = self.product(p, x) if product is None else product
        if self.of is not None:
            y = y[:, self.first : self.first + self.rows]
        return p.tap(
            self.stage, y if self.heads is None else y.reshape(-1, self.heads, self.rows // self.heads)
        )


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


@dataclass(frozen=True)
class Layer(Node):
    """Attention and a feed-forward layer, each added to the stream."""

    at: str
    attention: Attention
    dense: Dense

    def stages(self, source: str) -> Iterator[Stage]:
        yield from self.attention.stages(source)
        yield Stage(f"{self.at}ffn_in", (source, self.attention.out.stage), (), self)
        yield from self.dense.stages(f"{self.at}ffn_in")
        yield Stage(f"{self.at}out", (f"{self.at}ffn_in", self.dense.down.stage), (), self)

    def __call__(self, p: Pass, x: Array) -> Array:
        x = p.tap(f"{self.at}ffn_in", p.ops.add(x, self.attention(p, x)))
        return p.tap(f"{self.at}out", p.ops.add(x, self.dense(p, x)))


@dataclass(frozen=True)
class Embed(Node):
    """Rows of the embedding table, and of one of `context` learned positions where it is named."""

    name: str
    vocab: int
    width: int
    positions: str | None = None
    context: int = 0

    def tensors(self) -> Iterator[Tensor]:
        yield Tensor(f"{self.name}.weight", (self.vocab, self.width))
        if self.positions is not None:
            yield Tensor(f"{self.positions}.weight", (self.context, self.width))

    def features(self) -> set[str]:
        return set() if self.positions is None else {"learned_positions"}

    def stages(self) -> Iterator[Stage]:
        yield Stage("embed", (), tuple(filter(None, (self.name, self.positions))), self)

    def __call__(self, p: Pass) -> Array:
        x = p.ops.embed(p.weights[f"{self.name}.weight"], p.step.ids)
        if self.positions is not None:
            x = p.ops.add(x, p.ops.embed(p.weights[f"{self.positions}.weight"], p.step.positions))
        return p.tap("embed", x)


@dataclass(frozen=True)
class Head(Node):
    """Logits (row, vocab) from hidden states after the last norm; `tied`: by the embedding table."""

    name: str
    vocab: int
    width: int
    tied: bool

    def tensors(self) -> Iterator[Tensor]:
        yield Tensor(f"{self.name}.weight", (self.vocab, self.width))

    def effective(self) -> dict[str, Value]:
        return {"tied_head": self.tied}

    def features(self) -> set[str]:
        return {"tied"} if self.tied else set()

    def stages(self, source: str) -> Iterator[Stage]:
        yield Stage("logits", (source,), (self.name,), self)

    def __call__(self, p: Pass, hidden: Array) -> Array:
        return p.tap("logits", p.ops.linear(hidden, p.weights[f"{self.name}.weight"]))


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


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: what every node computes with, and who looks on."""

    network: Network
    weights: Mapping[str, Array]
    ops: Backend
    step: Step
    tap: Tap = untouched
