"""gpt-oss: experts with a clamped SwiGLU, sinks, a window in every other layer, YaRN without rounded bounds.

The norm before the experts is called `post_attention_norm` here.
"""

from __future__ import annotations

from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Layer, Network
from prill_runtime.models.parts import Block, Sizes, rotation


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    sizes = Sizes.of(keys, experts=True, bias=True)
    rope = rotation(keys, "neox", sizes.size, truncate=False)
    window = keys.integer("attention.sliding_window")

    def layer(number: int) -> Layer:
        block, seen = Block(sizes, number), None if number % 2 else window
        attention = block.attention(rope=rope, window=seen, sinks=f"{block.at}attn_sinks.weight")
        experts = block.experts("post_attention_norm", clamp=(7.0, 1.702))
        return Layer(block.at, attention, experts)

    return sizes.network("gpt-oss", layer)
