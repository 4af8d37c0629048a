"""Keys of a file come in; the parts that most architectures have in common go out, as nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from prill_runtime.errors import UnsupportedModel
from prill_runtime.models.keys import Keys, heads, rope_dim
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.experts import ExpertLinear, Experts
from prill_runtime.models.nodes.feedforward import Dense
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.network import Embed, Head, Layer, Network
from prill_runtime.models.nodes.norms import LayerNorm, Norm, RmsNorm
from prill_runtime.models.nodes.rope import Rope
from prill_runtime.ops.protocol import RopeLayout, Yarn

EMBEDDING, HEAD, FREQUENCIES = "token_embd", "output", "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
EPSILON: Final[Mapping[type[Norm], str]] = {RmsNorm: "rms_epsilon", LayerNorm: "epsilon"}


@dataclass(frozen=True)
class Sizes:
    """What the parts of a model agree about, by the common keys of its file.

    Attributes:
        width: of the stream. size: of a head. kind: of its norms. eps: of these. bias: whether every matrix
            of a block has one, None: those for which the file has it.
    """

    keys: Keys
    vocab: int
    width: int
    heads: int
    kv_heads: int
    size: int
    kind: type[Norm]
    eps: float
    bias: bool | None = None

    @classmethod
    def of(
        cls, keys: Keys, kind: type[Norm] = RmsNorm, experts: bool = False, bias: bool | None = None
    ) -> Sizes:
        """Raises ModelFileError and UnsupportedModel as `keys` does; a dense model has no experts."""
        if not experts:
            keys.refuse("expert_count", "mixtures of experts are")
        width, vocab = keys.integer("embedding_length"), keys.vocabulary
        eps = keys.positive(f"attention.layer_norm_{EPSILON[kind]}")
        return cls(keys, vocab, width, *heads(keys, width), kind, eps, bias)

    def network(
        self,
        architecture: str,
        layer: Callable[[int], Layer],
        *,
        embed: Mapping[str, Any] | None = None,
        softcap: float | None = None,
    ) -> Network:
        """The whole model. `embed`: more of the embedding. `softcap`: of the logits."""
        keys, tied = self.keys, not self.keys.has_tensor(f"{HEAD}.weight")
        bias = keys.has_tensor(f"{HEAD}.bias")
        return Network(
            architecture, keys.integer("context_length"),
            Embed(EMBEDDING, self.vocab, self.width, **embed or {}),
            tuple(layer(number) for number in range(keys.blocks())), self.norm("output_norm"),
            Head(EMBEDDING if tied else HEAD, self.vocab, self.width, tied, bias, softcap),
        )  # fmt: skip

    def norm(self, name: str, tensor: str = "") -> Norm:
        """One over the stream."""
        return self.kind(name, self.width, self.eps, tensor)

    def head_norm(self, name: str, tensor: str) -> Norm:
        """One over each head."""
        return self.kind(name, self.size, self.eps, tensor)


@dataclass(frozen=True)
class Block:
    """One block's parts, by the names of tensors that converters give them."""

    sizes: Sizes
    number: int

    @property
    def at(self) -> str:
        return f"blk.{self.number}."

    def linear(
        self, stage: str, name: str, rows: int, cols: int, heads: int | None = None, bias: bool | None = None
    ) -> Linear:
        """A matrix of its own; without a word about its bias it has the file's, if there is one."""
        bias = self.sizes.bias if bias is None else bias
        bias = self.sizes.keys.has_tensor(f"{self.at}{name}.bias") if bias is None else bias
        return Linear(self.at + stage, self.at + name, rows, cols, bias, heads)

    def part(self, stage: str, name: str, rows: list[int], place: int, heads: int | None = None) -> Linear:
        """Some rows of a matrix that several share; rows: of each."""
        whole = self.linear(stage, name, rows[place], self.sizes.width, heads)
        return replace(whole, first=sum(rows[:place]), of=sum(rows))

    def attention(
        self,
        *,
        bias: bool | None = None,
        scale: float | None = None,
        fused: bool | None = None,
        **options: Any,
    ) -> Attention:
        """From the norm before it to its projection.

        Args:
            bias: of q, k and v, None: as the file has them. scale: of the scores, None: size^-1/2.
            fused: q, k and v lie in one tensor, None: where the file has it. options: others of Attention.
        """
        s = self.sizes
        counts = [s.heads, s.kv_heads, s.kv_heads]
        rows = [heads * s.size for heads in counts]
        fused = s.keys.has_tensor(f"{self.at}attn_qkv.weight") if fused is None else fused

        def one(n: int) -> Linear:
            name = "qkv"[n]
            if fused:
                return self.part(name, "attn_qkv", rows, n, counts[n])
            return self.linear(name, f"attn_{name}", rows[n], s.width, counts[n], bias)

        q, k, v = map(one, range(3))
        return Attention(
            self.at, self.number, s.norm(f"{self.at}attn_norm"), q, k, v,
            self.linear("attn_out", "attn_output", s.width, rows[0]), s.heads, s.kv_heads, s.size,
            s.size**-0.5 if scale is None else scale, **options,
        )  # fmt: skip

    def qk_norms(self) -> dict[str, Any]:
        """Norms of each head of queries and keys, as options of attention."""
        return {f"{part}_norm": self.sizes.head_norm(f"{self.at}{part}_norm", f"{self.at}attn_{part}_norm")
                for part in "qk"}  # fmt: skip

    def post_norms(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Norms of what attention and the feed-forward layer add, as options of each."""
        attention, dense = (
            self.sizes.norm(self.at + stage, self.at + name)
            for stage, name in (("post_attn_norm", "post_attention_norm"), ("post_ffn_norm", "post_ffw_norm"))
        )
        return {"post": attention}, {"post": dense}

    def dense(
        self, activation: str = "silu", *, gated: bool = True, fused: bool = False, **options: Any
    ) -> Dense:
        """The feed-forward layer; `fused`: gate and up in one tensor, the gate first."""
        s = self.sizes
        ffn = s.keys.integer("feed_forward_length")
        if fused:
            gate, up = (self.part(stage, "ffn_up", [ffn, ffn], n) for n, stage in enumerate(("gate", "up")))
        else:
            up = self.linear("up", "ffn_up", ffn, s.width)
            gate = self.linear("gate", "ffn_gate", ffn, s.width) if gated else None  # type: ignore[assignment]
        down = self.linear("down", "ffn_down", s.width, ffn)
        return Dense(self.at, s.norm(f"{self.at}ffn_norm"), up, down, gate, activation, **options)

    def experts(self, norm: str, **options: Any) -> Experts:
        """A mixture. norm: name of the tensor of the norm before it."""
        s, keys = self.sizes, self.sizes.keys
        count = keys.integer("expert_count")
        used, bias = keys.integer("expert_used_count"), bool(s.bias)
        # The other key is for layers without experts.
        stated = keys.integer("feed_forward_length", default=0, least=0)
        ffn = keys.integer("expert_feed_forward_length", default=stated or None)
        if used > count:
            raise UnsupportedModel(
                "more experts are used than there are", where=f"{keys.prefix}expert_used_count",
                expected=f"at most {count}", got=used,
            )  # fmt: skip

        def one(part: str, rows: int, cols: int) -> ExpertLinear:
            name = f"{self.at}ffn_{part}_exps"
            return ExpertLinear(f"{self.at}expert_{part}", name, count, rows, cols, used, bias)

        return Experts(
            self.at, s.norm(f"{self.at}ffn_norm", self.at + norm),
            self.linear("router", "ffn_gate_inp", count, s.width, bias=bias),
            one("gate", ffn, s.width), one("up", ffn, s.width), one("down", s.width, ffn), used, **options,
        )  # fmt: skip


def rotation(keys: Keys, layout: RopeLayout, size: int, *, truncate: bool = True) -> Rope:
    """The rotation that the common keys describe.

    A factor without a kind, and the older `scale_linear`, are linear. `truncate`: `Yarn.truncate`.

    Raises:
        UnsupportedModel: a kind other than none, linear and yarn, or longrope without its divisors.
    """
    dim, base = rope_dim(keys, size), keys.positive("rope.freq_base", default=10000.0)
    factor = keys.positive("rope.scaling.factor", default=keys.positive("rope.scale_linear", default=1.0))
    long = keys.has_tensor(LONG)
    kind = keys.text(
        "rope.scaling.type", default="longrope" if long else "none" if factor == 1.0 else "linear"
    )
    divisors = FREQUENCIES if keys.has_tensor(FREQUENCIES) else None
    if kind == "longrope" and long:
        scale = keys.positive("rope.scaling.attn_factor", default=1.0)
        return Rope(
            layout, dim, base, 1.0, kind, SHORT, scale=scale, long=LONG, original=original_length(keys)
        )
    if kind == "yarn":
        yarn = Yarn(
            original_length(keys), keys.positive("rope.scaling.yarn_beta_fast", default=32.0),
            keys.positive("rope.scaling.yarn_beta_slow", default=1.0), truncate,
        )  # fmt: skip
        scale = keys.positive("rope.scaling.attn_factor", default=1.0) * _magnitude(keys, factor)
        return Rope(layout, dim, base, factor, kind, divisors, yarn, scale)
    if kind not in ("none", "linear"):
        raise UnsupportedModel(
            "this rotary scaling is not implemented",
            where=f"{keys.prefix}rope.scaling.type",
            expected="none, linear or yarn",
            got=repr(kind),
        )
    return Rope(layout, dim, base, factor if kind == "linear" else 1.0, kind, divisors)


def original_length(keys: Keys) -> int:
    """Positions that the model was trained on, before its scaling."""
    return keys.integer("rope.scaling.original_context_length", default=keys.integer("context_length"))


def _magnitude(keys: Keys, factor: float) -> float:
    """YaRN's factor of cosines and sines, 0.1 ln(factor) + 1, over what the scores have of it already."""
    taken = keys.number("rope.scaling.yarn_log_multiplier", default=0.0)
    grown = 0.1 * math.log(max(factor, 1.0))
    return (grown + 1) / (grown * taken + 1)
