"""Qwen 3 with experts in every layer: a softmax over all, of which the chosen are brought to a sum of 1."""

from __future__ import annotations

from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Layer, Network
from prill_runtime.models.parts import Block, Sizes, rotation


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    sizes = Sizes.of(keys, experts=True)
    rope = rotation(keys, "neox", sizes.size)

    def layer(number: int) -> Layer:
        block = Block(sizes, number)
        return Layer(block.at, block.attention(rope=rope, **block.qk_norms()), block.experts("ffn_norm"))

    return sizes.network("qwen3moe", layer)
