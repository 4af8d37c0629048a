"""Phi 3, 3.5 and 4: q, k and v in one tensor, gate and up in another, LongRoPE's two tables of divisors.

Which table counts, the current length says, as in the published code; the window is the file's.
"""

from __future__ import annotations

from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Layer, Network
from prill_runtime.models.parts import Block, Sizes, rotation


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    sizes = Sizes.of(keys)
    rope = rotation(keys, "neox", sizes.size)
    window = keys.integer("attention.sliding_window", default=0, least=0) or None

    def layer(number: int) -> Layer:
        block = Block(sizes, number)
        return Layer(block.at, block.attention(rope=rope, window=window), block.dense(fused=True))

    return sizes.network("phi3", layer)
