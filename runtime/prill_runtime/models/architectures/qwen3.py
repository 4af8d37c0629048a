"""Qwen 3: RMSNorm of each head of queries and keys before they are turned; heads as wide as the file says."""

from __future__ import annotations

from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Layer, Network
from prill_runtime.models.parts import Block, Sizes, rotation


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    sizes = Sizes.of(keys)
    rope = rotation(keys, "neox", sizes.size)

    def layer(number: int) -> Layer:
        block = Block(sizes, number)
        return Layer(block.at, block.attention(rope=rope, **block.qk_norms()), block.dense())

    return sizes.network("qwen3", layer)
