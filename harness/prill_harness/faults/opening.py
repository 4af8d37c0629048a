"""Open an engine with the faults that its spec names."""

from __future__ import annotations

from pathlib import Path

from prill_harness.engines.base import Engine
from prill_harness.engines.connect import connect, known
from prill_harness.engines.remote import Remote
from prill_harness.engines.spec import FAULT, EngineSpec
from prill_harness.faults.catalogue import named
from prill_harness.planting import faults
from prill_runtime.errors import UsageError


def open_engine(spec: str, model: str | Path) -> Engine:
    """Open a model on the engine that `spec` names; a context manager.

    Args:
        model: a path, `fixture:NAME[:TYPE]` or `synth:SHAPE:TYPE`.

    Raises:
        UsageError: unknown engine, fault or fixture.
        ModelFileError, UnsupportedModel: the model file is missing or cannot be loaded.
    """
    parsed = check_engine(spec)
    return faults.scoped(lambda: connect(parsed, model), named(parsed.faults))


def check_engine(spec: str) -> EngineSpec:
    """Refuse a spec that `open_engine` would refuse, without opening anything.

    Raises:
        UsageError: unknown engine, argument or fault.
    """
    parsed = EngineSpec.parse(str(spec))
    cls, _ = known(parsed)
    if named(parsed.faults) and issubclass(cls, Remote):
        raise UsageError(
            "a planted fault is one of prill's own code, of which this engine has none", where=repr(spec),
            expected=f"an engine without {FAULT}", got=f"{FAULT}{parsed.faults[0]}",
        )  # fmt: skip
    return parsed
