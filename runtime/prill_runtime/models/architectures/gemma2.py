"""Gemma 2: norms before and behind each branch, capped scores and logits, a window in every other layer.

The file's norm weights have the published ones plus 1. Scores are scaled by the size of a head, except in the
27B model, which no key says.
"""

from __future__ import annotations

from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Layer, Network
from prill_runtime.models.parts import Block, Sizes, rotation


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    sizes = Sizes.of(keys)
    rope = rotation(keys, "neox", sizes.size)
    window = keys.integer("attention.sliding_window", default=4096)
    cap = keys.number("attn_logit_softcapping", default=50.0) or None
    large = (sizes.heads, sizes.size) == (32, 128)  # the 27B
    scale = (sizes.width / sizes.heads if large else sizes.size) ** -0.5

    def layer(number: int) -> Layer:
        block, seen = Block(sizes, number), None if number % 2 else window
        behind, after = block.post_norms()
        attention = block.attention(rope=rope, window=seen, softcap=cap, scale=scale, **behind)
        return Layer(block.at, attention, block.dense("gelu_tanh", **after))

    return sizes.network(
        "gemma2", layer, embed={"scale": sizes.width**0.5},
        softcap=keys.number("final_logit_softcapping", default=30.0) or None,
    )  # fmt: skip
