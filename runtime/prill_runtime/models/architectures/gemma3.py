"""Gemma 3: norms before and behind each branch and of each head; five layers with a window, one without.

Layers with a window turn by a base of their own and without scaling. Scores are capped where the file says,
as Google's own code does; transformers has the number and leaves it out, and no published model sets it. The
file's norm weights have the published ones plus 1. Scores are scaled by the size of a head, except in the 27B
model, which no key says.
"""

from __future__ import annotations

from dataclasses import replace

from prill_runtime.models.keys import Keys
from prill_runtime.models.nodes.network import Layer, Network
from prill_runtime.models.parts import Block, Sizes, rotation


def model(keys: Keys) -> Network:
    """What a file's keys and tensors make of it."""
    sizes = Sizes.of(keys)
    rope = rotation(keys, "neox", sizes.size)
    base = keys.positive("rope.freq_base_swa", default=10000.0)
    local = replace(rope, base=base, factor=1.0, scaling="none", local=True)
    window = keys.integer("attention.sliding_window")
    cap = keys.number("attn_logit_softcapping", default=0.0) or None
    large = (sizes.heads, sizes.size) == (32, 128)  # the 27B
    scale = (sizes.width / sizes.heads if large else sizes.size) ** -0.5

    def layer(number: int) -> Layer:
        block, whole = Block(sizes, number), number % 6 == 5
        behind, after = block.post_norms()
        attention = block.attention(
            rope=rope if whole else local, window=None if whole else window, softcap=cap,
            scale=scale, **block.qk_norms(), **behind,
        )  # fmt: skip
        return Layer(block.at, attention, block.dense("gelu_tanh", **after))

    return sizes.network(
        "gemma3", layer, embed={"scale": sizes.width**0.5},
        softcap=keys.number("final_logit_softcapping", default=0.0) or None,
    )  # fmt: skip
