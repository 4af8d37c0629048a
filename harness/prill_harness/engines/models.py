"""Model specs: the file that each stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from prill_harness.records.names import look_up
from prill_runtime.errors import ModelFileError, UsageError


def check_model(spec: str, *, opened: bool = True, loaded: bool = True) -> None:
    """Refuse a model spec that names nothing: packaged models by name, files by opening them.

    Args:
        opened: False if only records of the model are read, so that its file need not exist.
        loaded: False if the file is only read, so that it need not be a model that can be judged.

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
    """(name, type) if the model spec names a packaged fixture, else None.

    Raises:
        UsageError: unknown fixture or block type.
    """
    text = str(spec)
    if not text.startswith("fixture:"):
        return None
    import prill_fixtures

    name, _, kind = text.removeprefix("fixture:").partition(":")
    _known(text, {"fixture": (name, prill_fixtures.NAMES)})
    kind = kind or prill_fixtures.types(name)[0]
    _known(text, {"block type": (kind, prill_fixtures.types(name))})
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
