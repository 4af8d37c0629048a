"""An embedded inference runtime: GGUF file in, logits and tokens out.

Here are the words that a description of an architecture is written in, for packages that bring one
(docs/ADAPTER_PATTERN_GUIDE.md), whatever room they lie in.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prill_runtime.errors import UnsupportedModel
    from prill_runtime.models.keys import Keys, heads, rope_dim
    from prill_runtime.models.nodes.attention import Attention
    from prill_runtime.models.nodes.experts import ExpertLinear, Experts
    from prill_runtime.models.nodes.feedforward import Dense
    from prill_runtime.models.nodes.linear import Linear
    from prill_runtime.models.nodes.network import Embed, Head, Layer, Network
    from prill_runtime.models.nodes.norms import LayerNorm, RmsNorm
    from prill_runtime.models.nodes.rope import Rope
    from prill_runtime.models.parts import Block, Sizes, rotation

HOMES = {
    "errors": ("UnsupportedModel",),
    "models.keys": ("Keys", "heads", "rope_dim"),
    "models.nodes.attention": ("Attention",),
    "models.nodes.experts": ("ExpertLinear", "Experts"),
    "models.nodes.feedforward": ("Dense",),
    "models.nodes.linear": ("Linear",),
    "models.nodes.network": ("Embed", "Head", "Layer", "Network"),
    "models.nodes.norms": ("LayerNorm", "RmsNorm"),
    "models.nodes.rope": ("Rope",),
    "models.parts": ("Block", "Sizes", "rotation"),
}
"""Module -> the public names that it has. Nothing of prill imports from here."""

__all__ = [
    "Attention", "Block", "Dense", "Embed", "ExpertLinear", "Experts", "Head", "Keys", "Layer", "LayerNorm",
    "Linear", "Network", "RmsNorm", "Rope", "Sizes", "UnsupportedModel", "heads", "rope_dim", "rotation",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: the command line starts without NumPy."""
    for module, names in HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
