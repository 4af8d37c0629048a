"""GPT-2: LayerNorm with bias, fused query, key and value, learned positions, tanh GELU.

Matrices are (out, in), the transpose of the original Conv1D; without a head of its own it is tied.
"""

from __future__ import annotations

from prill_runtime.errors import UnsupportedModel
from prill_runtime.models.keys import Keys, heads
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.feedforward import Dense
from prill_runtime.models.nodes.linear import Linear
from prill_runtime.models.nodes.network import Embed, Head, Layer, Network
from prill_runtime.models.nodes.norms import LayerNorm

EMBEDDING, POSITIONS, HEAD = "token_embd", "position_embd", "output"


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    keys.refuse("expert_count", "mixtures of experts are")
    width, ffn, vocab = keys.integer("embedding_length"), keys.integer("feed_forward_length"), keys.vocabulary
    n_heads, n_kv_heads, size = heads(keys, width)
    if n_kv_heads != n_heads:
        raise UnsupportedModel(
            "grouped queries are not implemented for this architecture",
            where=f"{keys.prefix}attention.head_count_kv", expected=n_heads, got=n_kv_heads,
        )  # fmt: skip
    eps, context = keys.positive("attention.layer_norm_epsilon"), keys.integer("context_length")
    inner = n_heads * size

    def layer(number: int) -> Layer:
        at = f"blk.{number}."

        def linear(stage: str, name: str, rows: int, cols: int) -> Linear:
            return Linear(at + stage, at + name, rows, cols, bias=True)

        def part(place: int) -> Linear:
            name = f"{at}attn_qkv"
            return Linear(f"{at}{'qkv'[place]}", name, inner, width, True, n_heads, place * inner, 3 * inner)

        attention = Attention(
            at, number, LayerNorm(f"{at}attn_norm", width, eps), q=part(0), k=part(1), v=part(2),
            out=linear("attn_out", "attn_output", width, inner),
            heads=n_heads, kv_heads=n_heads, size=size, scale=size**-0.5,
        )  # fmt: skip
        dense = Dense(
            at, LayerNorm(f"{at}ffn_norm", width, eps), up=linear("up", "ffn_up", ffn, width),
            down=linear("down", "ffn_down", width, ffn), activation="gelu_tanh",
        )  # fmt: skip
        return Layer(at, attention, dense)

    tied = not keys.has_tensor(f"{HEAD}.weight")
    return Network(
        "gpt2", context, Embed(EMBEDDING, vocab, width, POSITIONS, context),
        tuple(layer(number) for number in range(keys.blocks())), LayerNorm("output_norm", width, eps),
        Head(EMBEDDING if tied else HEAD, vocab, width, tied),
    )  # fmt: skip
