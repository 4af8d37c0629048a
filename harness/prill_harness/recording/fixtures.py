"""The pytest fixtures of checks: engine, oracle, golden and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from prill_harness.engines.base import Engine
    from prill_harness.leaks.reports.report import PathReport
    from prill_harness.run.checks import Observer
    from prill_harness.tokens.golden import Golden
    from prill_runtime.gguf.file import GGUFFile


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests that are not checks another plugin's fixtures, if those have the same names."""
    for item in items:
        info = getattr(item, "_fixtureinfo", None)
        if info is None or item.get_closest_marker("prill_check"):
            continue
        for name, known in info.name2fixturedefs.items():
            others = [each for each in known if each.func.__module__ != __name__]
            if others and name not in others[0].argnames:  # one that requests its own name wraps prill's
                info.name2fixturedefs[name] = others


@pytest.fixture
def observe(request: pytest.FixtureRequest) -> Observer:
    """The observer through which the check judges."""
    from prill_harness.recording.recorder import OBSERVER
    from prill_harness.run.checks import Observer

    return request.node.stash.setdefault(OBSERVER, Observer())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def model_spec(pytestconfig: pytest.Config) -> str:
    """The model spec of the cell, as it was given."""
    spec = pytestconfig.getoption("prill_model")
    if not spec:
        from prill_runtime.errors import UsageError

        raise UsageError("no model to test", hint="name one with --prill-model")
    return str(spec)


@pytest.fixture(scope="session")
def model_path(model_spec: str) -> Path:
    """The file that the model spec names."""
    from prill_harness.engines.models import resolve_model

    return resolve_model(model_spec)


@pytest.fixture(scope="session")
def open_model() -> Iterator[Callable[[str, str], Engine]]:
    """`open_model(engine_spec, model_spec)`: further engines, closed at the end of the run."""
    from prill_harness.faults.opening import open_engine

    with ExitStack() as stack:
        yield lambda spec, model: stack.enter_context(open_engine(spec, model))


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config, model_spec: str) -> Iterator[Engine]:
    """The engine under test."""
    from prill_harness.faults.opening import foreign, open_engine

    spec = pytestconfig.getoption("prill_engine")
    with open_engine(spec, model_spec) as opened:
        recorder = pytestconfig.pluginmanager.get_plugin("prill-recorder")
        if recorder is not None and foreign(spec):
            recorder.engine_version = str(opened.info.version)
        yield opened


@pytest.fixture(scope="session")
def leak_probe(pytestconfig: pytest.Config, model_spec: str) -> Callable[..., PathReport]:
    """`leak_probe(path, engine=…, model=…, …)`: what one path of the engine leaks, in a fresh process.

    A run that is inconclusive because of noise is repeated, at most twice.
    """
    from prill_harness.leaks.judge import probe
    from prill_harness.leaks.judge.repeat import settled
    from prill_harness.leaks.reports.report import Probe

    def look(path: str, *, engine: str = "", model: str = "", **rest: Any) -> PathReport:
        planned = engine or pytestconfig.getoption("prill_engine"), model or model_spec
        wanted = Probe(*planned, path, **rest)
        return settled(probe.run, wanted)

    return look


@pytest.fixture(scope="session")
def oracle(pytestconfig: pytest.Config, model_spec: str) -> Iterator[Engine]:
    """The float64 oracle on the same model."""
    from prill_harness.faults.opening import open_oracle
    from prill_runtime.errors import Inconclusive, UnsupportedModel

    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_oracle(pytestconfig.getoption("prill_engine"), model_spec))
        except UnsupportedModel as error:
            raise Inconclusive("the oracle cannot judge this model", got=str(error)) from error
        recorder = pytestconfig.pluginmanager.get_plugin("prill-recorder")
        if recorder is not None:
            recorder.oracle = opened
        yield opened


@pytest.fixture(scope="session")
def golden(model_spec: str) -> Golden:
    """The golden of the model under test; recorded on first use for a user's own file."""
    from prill_harness.planting import faults
    from prill_harness.tokens.golden import golden_for

    with faults.only(()):
        return golden_for(model_spec)


@pytest.fixture(scope="session")
def gguf_file(model_path: Path) -> Iterator[GGUFFile]:
    """The model file, open."""
    from prill_runtime.gguf.file import open_gguf

    with open_gguf(model_path) as file:
        yield file
