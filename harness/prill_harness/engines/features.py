"""A model's architecture and features, from its file's description."""

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

PACKAGED = tuple(f"fixture:{name}" for name in (
    "llama-tiny", "gpt2-tiny", "llama-window", "llama-long", "gpt-oss-tiny", "gemma3-tiny",
))  # fmt: skip
"""Packaged models, in the order in which one is chosen to represent a feature."""


@dataclass(frozen=True)
class Traits:
    """The traits by which checklist items and faults are chosen.

    Attributes:
        architecture: as the file names it; empty if it could not be read.
        features: None if unknown, which is not the same as having none.
    """

    architecture: str = ""
    features: frozenset[str] | None = None

    def suits(self, needs: Collection[str], lacks: Collection[str] = ()) -> bool | None:
        """Whether it has all of `needs` and none of `lacks`; None if unknown."""
        if self.features is None:
            return None if needs or lacks else True
        return self.features.issuperset(needs) and self.features.isdisjoint(lacks)

    @property
    def recorded(self) -> dict[str, str]:
        """The traits as stored in a ledger."""
        known = {} if self.features is None else {"features": ",".join(sorted(self.features))}
        return {"architecture": self.architecture, **known}

    @classmethod
    def of_record(cls, versions: Mapping[str, str]) -> Traits:
        """Read back what `recorded` wrote."""
        features = versions.get("features")
        known = None if features is None else frozenset(filter(None, features.split(",")))
        return cls(versions.get("architecture", ""), known)


def in_words(needs: Collection[str], lacks: Collection[str]) -> str:
    """What a model has to have: "with rope and without window"; empty where that is nothing."""
    return " and ".join([*(f"with {name}" for name in needs), *(f"without {name}" for name in lacks)])


def traits(spec: str) -> Traits:
    """The traits of a model's file, without reading its weights."""
    with suppress(PrillError, OSError), open_gguf(resolve_model(spec)) as file:
        return Traits(file.architecture, features_of(file))
    return Traits()


def features_of(file: Described) -> frozenset[str] | None:
    """The features of an open file; None if its architecture is not described, or the description fails."""
    with suppress(PrillError):
        return walks.features(describe(file))
    return None


@cache
def packaged() -> Mapping[str, Traits]:
    """The traits of the packaged models, in order."""
    return {spec: traits(spec) for spec in PACKAGED}


def having(needs: Collection[str], lacks: Collection[str] = ()) -> str | None:
    """The first packaged model with all of `needs` and none of `lacks`; None if there is none."""
    return next((spec for spec, found in packaged().items() if found.suits(needs, lacks)), None)
