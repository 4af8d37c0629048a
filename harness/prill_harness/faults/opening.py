"""Open an engine with the faults that its spec names, and the oracle that judges it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prill_harness.engines.base import Engine
from prill_harness.engines.connect import connect, known
from prill_harness.engines.remote import Remote
from prill_harness.engines.spec import FAULT, ORACLE, EngineSpec
from prill_harness.faults.blackbox import planted
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
    own = named(planted.own(parsed.faults))

    def open_it(path: str | Path) -> Engine:
        return faults.scoped(lambda: connect(parsed, path), own)

    return planted.opened(parsed.faults, open_it, model, has_model=has_model(parsed))


@contextmanager
def open_oracle(spec: str, model: str | Path) -> Iterator[Engine]:
    """The oracle on the model; for an engine that has its file already, on the changed one of its spec.

    Raises:
        As `open_engine`.
    """
    parsed = check_engine(spec)
    wanted = planted.changes(parsed.faults) if has_model(parsed) else ()
    with ExitStack() as stack:
        path = planted.copied(wanted, model, stack) if wanted else model
        yield stack.enter_context(open_engine(ORACLE, path))


def has_model(spec: EngineSpec) -> bool:
    """Whether the engine has its model already, whatever file it is opened with."""
    cls, _ = known(spec)
    return issubclass(cls, Remote) and cls.has_model


def foreign(spec: str) -> bool:
    """Whether the engine is somebody else's, in which no fault of prill's own code can be planted; nothing of
    it is looked for."""
    cls = Engine.registry.get(EngineSpec.parse(spec).name)
    return cls is None or issubclass(cls, Remote)


def check_engine(spec: str) -> EngineSpec:
    """Refuse a spec that `open_engine` would refuse, without opening anything.

    Raises:
        UsageError: unknown engine, argument or fault.
    """
    parsed = EngineSpec.parse(str(spec))
    cls, _ = known(parsed)
    if (own := named(planted.own(parsed.faults))) and issubclass(cls, Remote):
        raise UsageError(
            "a planted fault is one of prill's own code, of which this engine has none", where=repr(spec),
            expected=f"an engine without {FAULT}, or a changed file or spoiled answer",
            got=f"{FAULT}{own[0].name}",
        )  # fmt: skip
    return parsed
