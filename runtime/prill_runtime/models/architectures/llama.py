"""The Llama family: RMSNorm, rotary positions on adjacent pairs, grouped queries, SwiGLU.

Tensor names and rotary layout as llama.cpp's converter writes them: rows of q and k are permuted so that the
pairs of a rotation lie side by side.
"""

from __future__ import annotations

from prill_runtime.models.keys import Keys, heads, rope_dim, rope_scaling
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.feedforward import Dense
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.network import Embed, Head, Layer, Network
from prill_runtime.models.nodes.norms import RmsNorm
from prill_runtime.models.nodes.rope import Rope

EMBEDDING, HEAD, FREQUENCIES = "token_embd", "output", "rope_freqs.weight"


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    keys.refuse("expert_count", "mixtures of experts are")
    width, ffn, vocab = keys.integer("embedding_length"), keys.integer("feed_forward_length"), keys.vocabulary
    n_heads, n_kv_heads, size = heads(keys, width)
    eps = keys.positive("attention.layer_norm_rms_epsilon")
    scaling, factor = rope_scaling(keys)
    rope = Rope(
        "norm", rope_dim(keys, size), keys.positive("rope.freq_base", default=10000.0), factor, scaling,
        FREQUENCIES if keys.has_tensor(FREQUENCIES) else None,
    )  # fmt: skip
    window = keys.integer("attention.sliding_window", default=0, least=0) or None

    def layer(number: int) -> Layer:
        at = f"blk.{number}."

        def linear(stage: str, name: str, rows: int, cols: int, heads: int | None = None) -> Linear:
            return Linear(at + stage, at + name, rows, cols, keys.has_tensor(f"{at}{name}.bias"), heads)

        attention = Attention(
            at, number, RmsNorm(f"{at}attn_norm", width, eps),
            q=linear("q", "attn_q", n_heads * size, width, n_heads),
            k=linear("k", "attn_k", n_kv_heads * size, width, n_kv_heads),
            v=linear("v", "attn_v", n_kv_heads * size, width, n_kv_heads),
            out=linear("attn_out", "attn_output", width, n_heads * size),
            heads=n_heads, kv_heads=n_kv_heads, size=size, scale=size**-0.5, rope=rope, window=window,
        )  # fmt: skip
        dense = Dense(
            at, RmsNorm(f"{at}ffn_norm", width, eps), up=linear("up", "ffn_up", ffn, width),
            down=linear("down", "ffn_down", width, ffn), gate=linear("gate", "ffn_gate", ffn, width),
        )  # fmt: skip
        return Layer(at, attention, dense)

    tied = not keys.has_tensor(f"{HEAD}.weight")
    return Network(
        "llama", keys.integer("context_length"), Embed(EMBEDDING, vocab, width),
        tuple(layer(number) for number in range(keys.blocks())), RmsNorm("output_norm", width, eps),
        Head(EMBEDDING if tied else HEAD, vocab, width, tied),
    )  # fmt: skip
