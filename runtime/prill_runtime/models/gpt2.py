"""GPT-2: LayerNorm with bias, fused query, key and value, learned positions, tanh GELU."""

from __future__ import annotations

from prill_runtime.errors import UnsupportedModel
from prill_runtime.models.base import EMBEDDING, HEAD, Adapter, Step, Tap, TensorSpec, dense
from prill_runtime.models.config import Config, Keys, heads
from prill_runtime.ops.protocol import Array, Backend

POSITIONS = "position_embd.weight"


class GPT2(Adapter, arch="gpt2"):
    """Matrices are (out, in), the transpose of the original Conv1D; without a head of its own it is tied."""

    @classmethod
    def configure(cls, keys: Keys, vocab_size: int, tied_head: bool) -> Config:
        dense(keys)
        width = keys.integer("embedding_length")
        n_heads, n_kv_heads, head_dim = heads(keys, width)
        if n_kv_heads != n_heads:
            raise UnsupportedModel(
                "grouped queries are not implemented for this architecture",
                where=f"{keys.prefix}attention.head_count_kv",
                expected=n_heads,
                got=n_kv_heads,
            )
        return Config(
            architecture="gpt2",
            vocab_size=vocab_size,
            n_layers=keys.integer("block_count"),
            width=width,
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=head_dim,
            ffn=keys.integer("feed_forward_length"),
            context_length=keys.integer("context_length"),
            norm_eps=keys.positive("attention.layer_norm_epsilon"),
            tied_head=tied_head,
        )

    @staticmethod
    def layout(config: Config) -> list[TensorSpec]:
        c, width = config, config.width
        inner = c.n_heads * c.head_dim
        weights = {
            "attn_norm": (width,),
            "attn_qkv": (3 * inner, width),
            "attn_output": (width, inner),
            "ffn_norm": (width,),
            "ffn_up": (c.ffn, width),
            "ffn_down": (width, c.ffn),
        }
        specs = [TensorSpec(EMBEDDING, (c.vocab_size, width))]
        specs.append(TensorSpec(POSITIONS, (c.context_length, width)))
        for at in (f"blk.{layer}." for layer in range(c.n_layers)):
            for name, shape in weights.items():
                specs.append(TensorSpec(f"{at}{name}.weight", shape))
                specs.append(TensorSpec(f"{at}{name}.bias", shape[:1]))
        specs += [TensorSpec(f"output_norm.{part}", (width,)) for part in ("weight", "bias")]
        specs.append(TensorSpec(HEAD, (c.vocab_size, width), optional=True))
        return specs

    def forward(self, ops: Backend, step: Step, tap: Tap) -> Array:
        c = self.config
        tokens = ops.embed(self.weights[EMBEDDING], step.ids)
        x = tap("embed", ops.add(tokens, ops.embed(self.weights[POSITIONS], step.positions)))
        for layer, w in enumerate(self.blocks):
            at = f"blk.{layer}."

            def linear(name: str, x: Array, w: dict[str, Array] = w) -> Array:
                return ops.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

            def norm(name: str, x: Array, w: dict[str, Array] = w) -> Array:
                return ops.layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], c.norm_eps)

            h = tap(at + "attn_norm", norm("attn_norm", x))
            fused = linear("attn_qkv", h).reshape(-1, 3, c.n_heads, c.head_dim)
            q, k, v = (tap(at + name, fused[:, part]) for part, name in enumerate("qkv"))
            mixed = tap(at + "attn", self.attend(ops, step, layer, q, k, v))
            x = tap(at + "ffn_in", ops.add(x, tap(at + "attn_out", linear("attn_output", mixed))))
            h = tap(at + "ffn_norm", norm("ffn_norm", x))
            act = tap(at + "act", ops.gelu_tanh(tap(at + "up", linear("ffn_up", h))))
            x = tap(at + "out", ops.add(x, tap(at + "down", linear("ffn_down", act))))
        weight, bias = self.weights["output_norm.weight"], self.weights["output_norm.bias"]
        x = ops.layer_norm(x, weight, bias, c.norm_eps)
        return tap("output_norm", x)
