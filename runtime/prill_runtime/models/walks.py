"""The tables that follow from a model's nodes, each computed by one walk over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from prill_runtime.models.base import Stage, Tensor, Value
from prill_runtime.models.nodes.network import Network
from prill_runtime.models.nodes.rope import Rope
from prill_runtime.ops.protocol import Array

FEATURES: Final = frozenset((
    "rms_norm", "layer_norm", "bias", "tied", "head_bias", "logit_softcap", "embedding_scale", "parallel",
    "learned_positions", "rope", "yarn", "longrope", "two_bases", "temperature",
    "gqa", "window", "fused_qkv", "qk_norm", "softcap", "sinks", "post_norm",
    "silu", "gelu_tanh", "gelu_erf", "clamped", "gate", "fused_gate_up", "experts", "expert_bias",
))  # fmt: skip
"""All that the nodes of this package give a model: what else a checklist names is a mistake."""


def tensors(network: Network) -> dict[str, Tensor]:
    """Every tensor that the model reads by name, in the order in which it needs them."""
    return {tensor.name: tensor for node in network.walk() for tensor in node.tensors()}


def stages(network: Network) -> dict[str, Stage]:
    """Every stage by name, in execution order."""

    def each() -> Iterator[Stage]:
        yield from network.embed.stages()
        source = "embed"
        for layer in network.layers:
            yield from layer.stages(source)
            source = f"{layer.at}out"
        yield from network.norm.stages(source)
        yield from network.head.stages(network.norm.name)

    return {stage.name: stage for stage in each()}


def effective(network: Network) -> dict[str, Value]:
    """The configuration as an engine reports it, without what is absent or not the same in all layers."""
    found: dict[str, set[Value]] = {}
    for node in network.walk():
        for name, value in node.effective().items():
            found.setdefault(name, set()).add(value)
    whole: dict[str, Value] = {
        "architecture": network.architecture,
        "vocab_size": network.vocab,
        "n_layers": len(network.layers),
        "width": network.width,
        "context_length": network.context,
    }
    return whole | {name: next(iter(values)) for name, values in found.items() if len(values) == 1}


def features(network: Network) -> frozenset[str]:
    """What the model has that not every model has."""
    return frozenset(feature for node in network.walk() for feature in node.features())


def rotations(network: Network, weights: Mapping[str, Array]) -> Iterator[dict[str, Any]]:
    """What a backend makes its rotary frequencies of, once for all layers that share them."""
    for rope in dict.fromkeys(node for node in network.walk() if isinstance(node, Rope)):
        yield rope.settings(weights)
