"""A model's nodes come in; the tables that follow from them, each by one walk, go out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prill_runtime.errors import UnsupportedModel
from prill_runtime.models.base import CacheLayout, Stage, Tensor, Value
from prill_runtime.models.nodes import Attention, Network, Rope
from prill_runtime.ops.protocol import Array


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


def caches(network: Network) -> tuple[CacheLayout, ...]:
    """What each layer keeps of every position."""
    return tuple(node.cache for node in network.walk() if isinstance(node, Attention))


def cache_shape(network: Network) -> tuple[int, int, int]:
    """Layers, heads of keys and components of a head, of a cache that has one shape for all layers.

    Raises:
        UnsupportedModel: layers that keep more or less than others.
    """
    kept = caches(network)
    shapes = {(layout.kv_heads, layout.key_size, layout.value_size) for layout in kept}
    if len(shapes) != 1 or kept[0].key_size != kept[0].value_size:
        raise UnsupportedModel("caches of different shapes are not implemented", got=repr(sorted(shapes)))
    return len(kept), kept[0].kv_heads, kept[0].key_size


def rotations(network: Network, weights: Mapping[str, Array]) -> Iterator[dict[str, Any]]:
    """What a backend makes its rotary frequencies of, once for all layers that share them."""
    for rope in dict.fromkeys(node for node in network.walk() if isinstance(node, Rope)):
        yield rope.settings(weights)
