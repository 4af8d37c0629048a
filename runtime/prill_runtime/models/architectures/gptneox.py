"""GPT-NeoX and Pythia: LayerNorm, one tensor for q, k and v, partial rotation, GELU by erf.

Attention and feed-forward layer see the same stream where the file says so.
"""

from __future__ import annotations

from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Layer, Network
from prill_runtime.models.nodes.norms import LayerNorm
from prill_runtime.models.parts import Block, Sizes, rotation


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    sizes = Sizes.of(keys, LayerNorm, bias=True)
    rope = rotation(keys, "neox", sizes.size)
    parallel = keys.truth("use_parallel_residual")

    def layer(number: int) -> Layer:
        block = Block(sizes, number)
        return Layer(block.at, block.attention(rope=rope), block.dense("gelu_erf", gated=False), parallel)

    return sizes.network("gptneox", layer)
