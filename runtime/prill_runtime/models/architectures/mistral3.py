"""Ministral 3 and Devstral: a Llama with YaRN whose late queries are sharper."""

from __future__ import annotations

from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Layer, Network
from prill_runtime.models.parts import Block, Sizes, original_length, rotation


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    sizes = Sizes.of(keys)
    rope = rotation(keys, "norm", sizes.size)
    beta = keys.number("attention.temperature_scale", default=0.0)
    temper = (beta, original_length(keys)) if beta else None

    def layer(number: int) -> Layer:
        block = Block(sizes, number)
        return Layer(block.at, block.attention(rope=rope, temper=temper), block.dense())

    return sizes.network("mistral3", layer)
