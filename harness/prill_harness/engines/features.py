"""The spec of a model comes in; its architecture and the features that its description gives it go out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from prill_harness.engines.models import resolve_model
from prill_runtime.errors import PrillError
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import walks
from prill_runtime.models.load import Described, describe

PACKAGED = tuple(f"fixture:{name}" for name in ("llama-tiny", "gpt2-tiny", "llama-window", "llama-long"))
"""In the order in which one of them is taken to stand for a feature."""


@dataclass(frozen=True)
class Traits:
    """What checklist items and faults are chosen by.

    Attributes:
        architecture: as the file names it; empty where nobody could read it.
        features: None where nobody knows, which is not the same as none.
    """

    architecture: str = ""
    features: frozenset[str] | None = None

    def suits(self, needs: Collection[str], lacks: Collection[str] = ()) -> bool | None:
        """Whether it has all of `needs` and nothing of `lacks`; None: nobody knows."""
        if self.features is None:
            return None if needs or lacks else True
        return self.features.issuperset(needs) and self.features.isdisjoint(lacks)

    @property
    def recorded(self) -> dict[str, str]:
        """As a ledger holds it."""
        known = {} if self.features is None else {"features": ",".join(sorted(self.features))}
        return {"architecture": self.architecture, **known}

    @classmethod
    def of_record(cls, versions: Mapping[str, str]) -> Traits:
        """What `recorded` wrote."""
        features = versions.get("features")
        known = None if features is None else frozenset(filter(None, features.split(",")))
        return cls(versions.get("architecture", ""), known)


def traits(spec: str) -> Traits:
    """Those of a model's file; no byte of its weights is read."""
    with suppress(PrillError, OSError), open_gguf(resolve_model(spec)) as file:
        return Traits(file.architecture, features_of(file))
    return Traits()


def features_of(file: Described) -> frozenset[str] | None:
    """What its description gives an open file; None where nobody described it, or it cannot be."""
    with suppress(PrillError):
        return walks.features(describe(file))
    return None


@cache
def packaged() -> Mapping[str, Traits]:
    """Those of the packaged models, in their order."""
    return {spec: traits(spec) for spec in PACKAGED}


def having(needs: Collection[str], lacks: Collection[str] = ()) -> str | None:
    """The first packaged model with all of `needs` and nothing of `lacks`; None: there is none."""
    return next((spec for spec, found in packaged().items() if found.suits(needs, lacks)), None)
