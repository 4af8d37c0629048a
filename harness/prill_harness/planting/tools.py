"""Make patches: what to change, and where."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from prill_harness.engines.features import PACKAGED
from prill_harness.planting.faults import Patch
from prill_runtime.models import nodes

ONE = PACKAGED[:1]
"""For a fault that shows on any model, of which one is enough."""
ANOTHER = PACKAGED[1:2]
LONG = ("fixture:llama-long",)
WINDOW = ("fixture:llama-window",)


def around(target: str, changed: Callable[..., Any]) -> Patch:
    """The function at `target` replaced by `changed(original, *arguments, **named)`."""

    def wrap(original: Any) -> Any:
        return lambda *arguments, **named: changed(original, *arguments, **named)

    return Patch(target, wrap)


def op(name: str, changed: Callable[..., Any]) -> Patch:
    """An op of the NumPy backend replaced by `changed(original, self, *arguments, **named)`."""
    return around(f"prill_runtime.ops.numpy:NumpyBackend.{name}", changed)


def option(name: str, **changed: Any) -> Patch:
    """An op of the NumPy backend whose options, where they are given, have other values: these, or what these
    make of them."""

    def call(original: Any, self: Any, *given: Any, **options: Any) -> Any:
        found = {key: value(options[key]) if callable(value) else value for key, value in changed.items()
                 if options.get(key) is not None}  # fmt: skip
        return original(self, *given, **{**options, **found})

    return op(name, call)


def decode(block: str, changed: Callable[..., Any]) -> Patch:
    """A block format's decoder replaced by `changed(original, fields)`."""
    return around(f"prill_runtime.quants.layouts:{block}.decode", changed)


def wiring(changed: Callable[..., Any]) -> Patch:
    """A model whose weights were loaded, before its first use: `changed(weights)`, by name as in the file."""

    def load(original: Any, self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        changed(self.weights)

    return around("prill_runtime.models.load:Wired.__init__", load)


def forgotten(ending: str) -> Patch:
    """A model that was loaded without the tensors whose names end so."""

    def forget(weights: Any) -> None:
        for name in [name for name in weights if name.endswith(ending)]:
            del weights[name]

    return wiring(forget)


def node(kind: str, changed: Callable[..., Any]) -> Patch:
    """What a kind of node computes, replaced by `changed(original, node, pass, *arguments)`; `kind` may name
    another method of it, as in `Attention.attend`."""
    name, _, method = kind.partition(".")
    return around(f"{_home(name)}:{name}.{method or '__call__'}", changed)


def _home(kind: str) -> str:
    """The module that has a kind of node."""
    for found in pkgutil.iter_modules(nodes.__path__, f"{nodes.__name__}."):
        if getattr(getattr(importlib.import_module(found.name), kind, None), "__module__", "") == found.name:
            return found.name
    raise LookupError(f"no kind of node is called {kind}")


def description(changed: Callable[[Any], Any]) -> Patch:
    """The network that a description makes of a file, replaced by `changed(network)`."""
    return around("prill_runtime.models.load:describe", lambda o, file: changed(o(file)))
