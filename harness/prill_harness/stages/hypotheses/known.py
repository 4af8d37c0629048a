"""All hypotheses, and the search among them for the one that explains a wrong stage."""

from __future__ import annotations

from collections.abc import Iterator

from prill_harness.stages.hypotheses import (
    attention,
    embedding,
    experts,
    feedforward,
    generic,
    linear,
    lookup,
    norm,
    rope,
)
from prill_harness.stages.hypotheses.case import REGISTRY, Case, Explanation, Raw, Weight, explain

__all__ = ["REGISTRY", "Case", "Explanation", "Raw", "Weight", "explain", "names"]
_MODULES = (attention, embedding, experts, feedforward, generic, linear, lookup, norm, rope)


def names() -> Iterator[str]:
    """Every registered hypothesis, `kind of node: function`."""
    return (f"{kind.__name__}: {function.__name__}" for kind, of in REGISTRY.items() for function, _ in of)
