"""A place and a changed behaviour in; the patch that plants it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prill_harness.planting.faults import Patch

LLAMA = ("fixture:llama-tiny",)
GPT2 = ("fixture:gpt2-tiny",)
LONG = ("fixture:llama-long",)
WINDOW = ("fixture:llama-window",)
HOMES = {
    "Norm": "norms", "RmsNorm": "norms", "LayerNorm": "norms", "Linear": "linear", "Rope": "rope",
    "Attention": "attention", "Dense": "feedforward", "Experts": "experts", "Layer": "network",
    "Embed": "network", "Head": "network", "Network": "network",
}  # fmt: skip
"""Kind of node -> the module of `models.nodes` that has it."""


def around(target: str, changed: Callable[..., Any]) -> Patch:
    """The function at `target` replaced by `changed(original, *arguments, **named)`."""

    def wrap(original: Any) -> Any:
        return lambda *arguments, **named: changed(original, *arguments, **named)

    return Patch(target, wrap)


def op(name: str, changed: Callable[..., Any]) -> Patch:
    """An op of the NumPy backend replaced by `changed(original, self, *arguments, **named)`."""
    return around(f"prill_runtime.ops.numpy:NumpyBackend.{name}", changed)


def decode(block: str, changed: Callable[..., Any]) -> Patch:
    """A block format's decoder replaced by `changed(original, fields)`."""
    return around(f"prill_runtime.quants.layouts:{block}.decode", changed)


def wiring(changed: Callable[..., Any]) -> Patch:
    """A model whose weights were loaded, before its first use: `changed(weights)`, by name as in the file."""

    def load(original: Any, self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        changed(self.weights)

    return around("prill_runtime.models.load:Wired.__init__", load)


def node(kind: str, changed: Callable[..., Any]) -> Patch:
    """What a kind of node computes, replaced by `changed(original, node, pass, *arguments)`; `kind` may name
    another method of it, as in `Attention.attend`."""
    name, _, method = kind.partition(".")
    return around(f"prill_runtime.models.nodes.{HOMES[name]}:{name}.{method or '__call__'}", changed)


def description(architecture: str, changed: Callable[[Any], Any]) -> Patch:
    """The network that an architecture's description makes of a file, replaced by `changed(network)`."""
    return around(
        f"prill_runtime.models.architectures.{architecture}:model", lambda o, keys: changed(o(keys))
    )
