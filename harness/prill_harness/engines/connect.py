"""Find and open the engine that a spec names, without planting any fault."""

from __future__ import annotations

from pathlib import Path

from prill_harness.engines import device, embedded
from prill_harness.engines.base import Engine
from prill_harness.engines.channels import capi, http, process, python, serve
from prill_harness.engines.others import asked, hf, recorded
from prill_harness.engines.others.llamacpp import connector as llamacpp
from prill_harness.engines.spec import EngineSpec
from prill_harness.records.names import look_up

CONNECTORS = (embedded, device, python, process, capi, http, serve, llamacpp, recorded, asked, hf)
"""The modules that declare engines; installed packages offer more (`python.GROUP`)."""


def known(spec: EngineSpec) -> tuple[type[Engine], str]:
    """The class a spec names, and the argument for it.

    Raises:
        UsageError: unknown engine, or an argument that it does not take.
    """
    look_up(spec.name, {*Engine.registry, *python.installed()}, "unknown engine")
    cls = Engine.registry.get(spec.name) or python.offered(spec.name)
    cls.accepts(spec.argument)
    return cls, spec.argument


def connect(spec: EngineSpec, model: str | Path) -> Engine:
    """Open a model on the engine that `spec` names; the faults it names are ignored.

    Raises:
        UsageError: unknown engine, argument or fixture.
        ModelFileError, UnsupportedModel: the model file is missing or cannot be loaded.
    """
    cls, argument = known(spec)
    return cls.open(argument, str(model))
