"""The Llama family: RMSNorm, rotary positions on adjacent pairs, grouped queries, SwiGLU.

Tensor names and rotary layout as llama.cpp's converter writes them: rows of q and k are permuted so that the
pairs of a rotation lie side by side.
"""

from __future__ import annotations

from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Layer, Network
from prill_runtime.models.parts import Block, Sizes, rotation


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    sizes = Sizes.of(keys)
    rope = rotation(keys, "norm", sizes.size)
    window = keys.integer("attention.sliding_window", default=0, least=0) or None

    def layer(number: int) -> Layer:
        block = Block(sizes, number)
        return Layer(block.at, block.attention(rope=rope, window=window), block.dense())

    return sizes.network("llama", layer)
