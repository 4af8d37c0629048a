"""An engine spec and a model spec come in; an open engine goes out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Self

from prill_harness.engines.base import Engine, engine_class
from prill_harness.records.names import look_up
from prill_runtime.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    from prill_harness.planting.core import Fault

CONNECTORS = ("embedded", "device")
"""Modules of this package that declare engines; imported when the first engine is opened."""

FAULT = "+fault:"
ORACLE = "numpy64"
"""The engine by which the others are judged."""


@dataclass(frozen=True)
class EngineSpec:
    """`NAME[:ARGUMENT][+fault:FAULT]...`, taken apart here and nowhere else."""

    name: str
    argument: str
    faults: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UsageError when the name or a fault is empty."""
        base, *faults = text.split(FAULT)
        name, _, argument = base.partition(":")
        if not name or not all(faults):
            raise UsageError(
                "engine spec is incomplete",
                where=repr(text),
                expected="NAME[:ARGUMENT][+fault:FAULT]",
                got=repr(text),
            )
        return cls(name, argument, tuple(faults))


IN_ARENA = ("cuda", "emu")  # engines whose memory is an arena of a device


def with_budget(specs: Sequence[str], size: str) -> list[str]:
    """The specs, those of engines on a device limited to `size` of its memory, such as "2GiB".

    Raises:
        UsageError: none of them is on a device.
    """
    parsed = [EngineSpec.parse(spec) for spec in specs]
    if not any(spec.name in IN_ARENA for spec in parsed):
        raise UsageError(
            "no engine has device memory",
            where="--vram-budget",
            expected=f"an --engine of {' or '.join(IN_ARENA)}",
            got=", ".join(specs) or "none",
        )
    limited = []
    for text, spec in zip(specs, parsed, strict=True):
        argument = ",".join(filter(None, (spec.argument, f"budget={size}")))
        whole = FAULT.join((f"{spec.name}:{argument}", *spec.faults))
        limited.append(whole if spec.name in IN_ARENA else text)
    return limited


def open_engine(spec: str, model: str | Path) -> Engine:
    """Open a model on the engine that `spec` names; a context manager.

    Args:
        model: a path, `fixture:NAME[:TYPE]` or `synth:SHAPE:TYPE`.

    Raises:
        UsageError: unknown engine, fault or fixture.
        ModelFileError, UnsupportedModel: the model file is missing or cannot be loaded.
    """
    cls, argument, planted = _known_engine(str(spec))
    from prill_harness.planting import core as faults

    if not planted and not faults.active():
        return cls.open(argument, str(model))
    return faults.scoped(lambda: cls.open(argument, str(model)), planted)


def _known_engine(spec: str) -> tuple[type[Engine], str, tuple[Fault, ...]]:
    """The class a spec names, the argument for it, and the faults to plant."""
    parsed = EngineSpec.parse(spec)
    for connector in CONNECTORS:
        import_module(f"{__package__}.{connector}")
    cls, argument = engine_class(f"{parsed.name}:{parsed.argument}")
    cls.accepts(argument)
    from prill_harness.planting import core as faults

    return cls, argument, faults.named(parsed.faults) if parsed.faults else ()


def check_engine(spec: str) -> None:
    """Refuse a spec that `open_engine` would refuse, and open nothing.

    Raises:
        UsageError: unknown engine, argument or fault.
    """
    _known_engine(spec)


def check_device(name: str) -> None:
    """Refuse a device that no cell can be of.

    Raises:
        UsageError: neither cpu nor cuda, with or without a number.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError("unknown device", expected="cpu, cuda or cuda:N", got=repr(name))


def check_judged(spec: str, oracle: str = ORACLE) -> None:
    """Refuse to judge an engine by itself; a planted fault or an argument makes no other engine of it, since
    what they leave alone would be compared with itself.

    Raises:
        UsageError: engine and oracle are one.
    """
    if EngineSpec.parse(spec).name == EngineSpec.parse(oracle).name:
        raise UsageError(
            "an engine is never its own oracle",
            where=repr(spec),
            expected=f"another engine than {oracle}",
            got=repr(spec),
            hint=f"judge it by another with prill bisect --engine {spec} --against ENGINE",
        )


def check_model(spec: str, *, opened: bool = True, loaded: bool = True) -> None:
    """Refuse a model spec that names nothing: packaged models by name, files by opening them.

    Args:
        opened: False where only records of the model are looked at, so that its file need not be there.
        loaded: False where the file is only read, so that it need not be a model that can be judged.

    Raises:
        UsageError: unknown fixture, shape or block type.
        ModelFileError, UnsupportedModel: no such file, or one that is malformed, no model, or of a kind that
            nothing here can judge.
    """
    if fixture_name(spec) is not None:
        return
    if spec.startswith("synth:"):
        _synth_name(spec)
    elif opened:
        from prill_runtime.gguf.file import open_gguf
        from prill_runtime.run.model import require_loadable

        path = resolve_model(spec)
        require_loadable(path) if loaded else open_gguf(path).close()


def resolve_model(spec: str | Path) -> Path:
    """The file a model spec stands for.

    Raises:
        UsageError: unknown fixture, shape or block type.
        ModelFileError: no such file, a fixture that is not the recorded one, a synthetic file that cannot be
            written.
    """
    text = str(spec)
    if text.startswith("fixture:"):
        path = _fixture(text)
    else:
        path = _synth(text) if text.startswith("synth:") else Path(text).expanduser()
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise ModelFileError("cannot open the model", where=text, expected="a GGUF file", got=got)
    return path


def fixture_name(spec: str | Path) -> tuple[str, str] | None:
    """(name, type) when the model spec names a packaged fixture, else None.

    Raises:
        UsageError: unknown fixture or block type.
    """
    text = str(spec)
    if not text.startswith("fixture:"):
        return None
    import prill_fixtures

    name, _, kind = text.removeprefix("fixture:").partition(":")
    kind = kind or "f16"
    _known(text, {"fixture": (name, prill_fixtures.NAMES), "block type": (kind, prill_fixtures.TYPES)})
    return name, kind


def fixture_sha256(spec: str) -> str:
    """The recorded digest of the packaged fixture that a spec names; empty for anything else."""
    import prill_fixtures

    with contextlib.suppress(UsageError, prill_fixtures.FixtureError):
        named = fixture_name(spec)
        return prill_fixtures.sha256(*named) if named else ""
    return ""


def _known(text: str, parts: Mapping[str, tuple[str, Iterable[str]]]) -> None:
    for what, (value, names) in parts.items():
        look_up(value, names, f"unknown {what}", where=repr(text))


def _synth_name(text: str) -> tuple[str, str]:
    """(shape, type) of a synthetic model's spec."""
    from prill_fixtures import synth

    shape, _, quant = text.removeprefix("synth:").lower().partition(":")
    _known(text, {"shape": (shape, synth.SHAPES), "block type": (quant, synth.QUANTS)})
    return shape, quant


def _synth(text: str) -> Path:
    from prill_fixtures import FixtureError, synth

    shape, quant = _synth_name(text)
    try:
        return synth.path(shape, quant)
    except FixtureError as error:
        raise ModelFileError(str(error), where=text) from error


def _fixture(text: str) -> Path:
    import prill_fixtures

    named = fixture_name(text)
    assert named is not None
    try:
        return prill_fixtures.path(*named)
    except prill_fixtures.FixtureError as error:
        raise ModelFileError(str(error), where=text) from error
