"""GPT-2: LayerNorm with bias, fused query, key and value, learned positions, tanh GELU.

Matrices are (out, in), the transpose of the original Conv1D; without a head of its own it is tied.
"""

from __future__ import annotations

from prill_runtime.errors import UnsupportedModel
from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Layer, Network
from prill_runtime.models.nodes.norms import LayerNorm
from prill_runtime.models.parts import Block, Sizes


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    sizes = Sizes.of(keys, LayerNorm, bias=True)
    if sizes.kv_heads != sizes.heads:
        raise UnsupportedModel(
            "grouped queries are not implemented for this architecture",
            where=f"{keys.prefix}attention.head_count_kv", expected=sizes.heads, got=sizes.kv_heads,
        )  # fmt: skip

    def layer(number: int) -> Layer:
        block = Block(sizes, number)
        return Layer(block.at, block.attention(fused=True), block.dense("gelu_tanh", gated=False))

    learned = {"positions": "position_embd", "context": keys.integer("context_length")}
    return sizes.network("gpt2", layer, embed=learned)
