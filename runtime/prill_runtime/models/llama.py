"""The Llama family: RMSNorm, rotary positions on adjacent pairs, grouped queries, SwiGLU."""

from __future__ import annotations

from typing import Any

from prill_runtime.errors import ModelFileError, UnsupportedModel
from prill_runtime.models.base import EMBEDDING, HEAD, Adapter, Step, Tap, TensorSpec, dense
from prill_runtime.models.config import Config, Keys, heads
from prill_runtime.ops.protocol import Array, Backend

ROPE_FREQS = "rope_freqs.weight"


class Llama(Adapter, arch="llama"):
    """Tensor names and rotary layout as llama.cpp's converter writes them: rows of q and k are permuted so
    that the pairs of a rotation lie side by side."""

    @classmethod
    def configure(cls, keys: Keys, vocab_size: int, tied_head: bool) -> Config:
        dense(keys)
        width = keys.integer("embedding_length")
        n_heads, n_kv_heads, head_dim = heads(keys, width)
        scaling, factor = rope_scaling(keys)
        rope_dim = keys.integer("rope.dimension_count", default=head_dim)
        if rope_dim % 2 or rope_dim > head_dim:
            raise ModelFileError(
                "bad rotary dimension",
                where=f"{keys.prefix}rope.dimension_count",
                expected=f"an even number up to the head dimension {head_dim}",
                got=rope_dim,
            )
        return Config(
            architecture="llama",
            vocab_size=vocab_size,
            n_layers=keys.integer("block_count"),
            width=width,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            ffn=keys.integer("feed_forward_length"),
            context_length=keys.integer("context_length"),
            norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
            tied_head=tied_head,
            rope_base=keys.positive("rope.freq_base", default=10000.0),
            rope_dim=rope_dim,
            rope_scaling=scaling,
            rope_factor=factor,
            window=keys.integer("attention.sliding_window", default=0, least=0) or None,
        )

    @staticmethod
    def layout(config: Config) -> list[TensorSpec]:
        c, width = config, config.width
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        matrices = {
            "attn_q": (q, width),
            "attn_k": (kv, width),
            "attn_v": (kv, width),
            "attn_output": (width, q),
            "ffn_gate": (c.ffn, width),
            "ffn_up": (c.ffn, width),
            "ffn_down": (width, c.ffn),
        }
        specs = [TensorSpec(EMBEDDING, (c.vocab_size, width))]
        specs.append(TensorSpec(ROPE_FREQS, ((c.rope_dim or 0) // 2,), optional=True))
        for at in (f"blk.{layer}." for layer in range(c.n_layers)):
            specs += [TensorSpec(f"{at}{norm}.weight", (width,)) for norm in ("attn_norm", "ffn_norm")]
            specs += [TensorSpec(f"{at}{name}.weight", shape) for name, shape in matrices.items()]
            specs += [TensorSpec(f"{at}{name}.bias", shape[:1], True) for name, shape in matrices.items()]
        specs.append(TensorSpec("output_norm.weight", (width,)))
        specs.append(TensorSpec(HEAD, (c.vocab_size, width), optional=True))
        return specs

    def forward(self, ops: Backend, step: Step, tap: Tap) -> Array:
        c = self.config
        x = tap("embed", ops.embed(self.weights[EMBEDDING], step.ids))
        for layer, w in enumerate(self.blocks):
            at = f"blk.{layer}."

            def linear(name: str, x: Array, w: dict[str, Array] = w) -> Array:
                return ops.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

            h = tap(at + "attn_norm", ops.rms_norm(x, w["attn_norm.weight"], c.norm_eps))
            q = tap(at + "q", linear("attn_q", h).reshape(-1, c.n_heads, c.head_dim))
            k = tap(at + "k", linear("attn_k", h).reshape(-1, c.n_kv_heads, c.head_dim))
            v = tap(at + "v", linear("attn_v", h).reshape(-1, c.n_kv_heads, c.head_dim))
            q = tap(at + "q_rope", self.rotate(ops, q, step))
            k = tap(at + "k_rope", self.rotate(ops, k, step))
            mixed = tap(at + "attn", self.attend(ops, step, layer, q, k, v))
            x = tap(at + "ffn_in", ops.add(x, tap(at + "attn_out", linear("attn_output", mixed))))
            h = tap(at + "ffn_norm", ops.rms_norm(x, w["ffn_norm.weight"], c.norm_eps))
            gate = tap(at + "gate", linear("ffn_gate", h))
            up = tap(at + "up", linear("ffn_up", h))
            act = tap(at + "act", ops.swiglu(gate, up))
            x = tap(at + "out", ops.add(x, tap(at + "down", linear("ffn_down", act))))
        return tap("output_norm", ops.rms_norm(x, self.weights["output_norm.weight"], c.norm_eps))

    def rotate(self, ops: Backend, x: Array, step: Step) -> Array:
        """x (row, head, head_dim) turned to its positions."""
        return ops.rope(x, step.positions, layout="norm", **self.rotation)

    @property
    def rotation(self) -> dict[str, Any]:
        c = self.config
        return {
            "base": c.rope_base or 10000.0,
            "dim": c.rope_dim or c.head_dim,
            "factor": c.rope_factor or 1.0,
            "freq_factors": self.weights.get(ROPE_FREQS),
        }


def rope_scaling(keys: Keys) -> tuple[str, float]:
    """The kind of rotary scaling and its factor; a factor without a kind, and the older `scale_linear`, are
    linear.

    Raises:
        UnsupportedModel: a kind other than none and linear.
    """
    factor = keys.positive("rope.scaling.factor", default=keys.positive("rope.scale_linear", default=1.0))
    kind = keys.text("rope.scaling.type", default="none" if factor == 1.0 else "linear")
    if kind not in ("none", "linear"):
        raise UnsupportedModel(
            "this rotary scaling is not implemented",
            where=f"{keys.prefix}rope.scaling.type",
            expected="none or linear",
            got=repr(kind),
        )
    return kind, factor if kind == "linear" else 1.0
