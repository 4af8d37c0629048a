"""Find and open the engine that a spec names, without planting any fault."""

from __future__ import annotations

from pathlib import Path

from prill_harness.engines import device, embedded
from prill_harness.engines.base import Engine, engine_class
from prill_harness.engines.spec import EngineSpec

CONNECTORS = (embedded, device)
"""The modules that declare engines."""


def known(spec: EngineSpec) -> tuple[type[Engine], str]:
    """The class a spec names, and the argument for it.

    Raises:
        UsageError: unknown engine, or an argument that it does not take.
    """
    cls, argument = engine_class(f"{spec.name}:{spec.argument}")
    cls.accepts(argument)
    return cls, argument


def connect(spec: EngineSpec, model: str | Path) -> Engine:
    """Open a model on the engine that `spec` names; the faults it names are ignored.

    Raises:
        UsageError: unknown engine, argument or fixture.
        ModelFileError, UnsupportedModel: the model file is missing or cannot be loaded.
    """
    cls, argument = known(spec)
    return cls.open(argument, str(model))
