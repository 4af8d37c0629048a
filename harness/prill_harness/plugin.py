"""pytest's glue: options and fixtures in, a recorder registered only when a run asks for evidence out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from prill_harness.checks import Observer
    from prill_harness.engines.base import Engine
    from prill_harness.golden import Golden
    from prill_harness.leaks import PathReport
    from prill_runtime.gguf import GGUFFile

# Nothing of prill is imported above: in a run that does not use prill this module costs nothing.
ASKS = ("prill_model", "prill_ledger", "prill_suite", "prill_check")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("prill", "prill: evidence about an inference engine")
    group.addoption("--prill-engine", metavar="SPEC", default="numpy", help="engine under test")
    group.addoption("--prill-model", metavar="SPEC", help="model: a path, or fixture:NAME[:TYPE]")
    group.addoption(
        "--prill-model-name", metavar="NAME", help="what the cell calls the model (default: SPEC)"
    )
    group.addoption("--prill-ledger", metavar="PATH", help="append evidence to this JSONL file")
    group.addoption("--prill-suite", metavar="NAME", help="suite name of the cell (default: file name)")
    group.addoption("--prill-device", metavar="NAME", default="cpu", help="device of the cell")
    group.addoption("--prill-check", metavar="ID", action="append", help="run this check only (repeatable)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "prill_check(name, kills, needs, oracle): a check that leaves evidence"
    )
    if any(config.getoption(option) for option in ASKS):
        from prill_harness.recorder import Recorder

        config.pluginmanager.register(Recorder(config), "prill-recorder")
        _look_at_engine(config.getoption("prill_engine"))


def _look_at_engine(spec: str) -> None:
    """Refuse the oracle as the engine under test, and make planted faults ambient."""
    from prill_harness import engines, faults
    from prill_runtime.errors import UsageError

    try:
        engines.check_judged(spec)
        planted = engines.EngineSpec.parse(spec).faults
        if planted:
            faults.ambient(faults.named(planted))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.has_plugin("prill-recorder"):
        checks = [item for item in items if item.get_closest_marker("prill_check")]
        if checks:
            raise pytest.UsageError(f"{checks[0].nodeid} is a prill check; name a model with --prill-model")


@pytest.fixture
def observe(request: pytest.FixtureRequest) -> Observer:
    """The observer through which the check sees and judges."""
    from prill_harness.checks import Observer
    from prill_harness.recorder import OBSERVER

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
    from prill_harness.engines import resolve_model

    return resolve_model(model_spec)


@pytest.fixture(scope="session")
def open_model() -> Iterator[Callable[[str, str], Engine]]:
    """`open_model(engine_spec, model_spec)`: further engines, closed at the end of the run."""
    from prill_harness.engines import open_engine

    with ExitStack() as stack:
        yield lambda spec, model: stack.enter_context(open_engine(spec, model))


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config, model_spec: str) -> Iterator[Engine]:
    """The engine under test."""
    from prill_harness.engines import open_engine

    with open_engine(pytestconfig.getoption("prill_engine"), model_spec) as opened:
        yield opened


@pytest.fixture(scope="session")
def leak_probe(pytestconfig: pytest.Config, model_spec: str) -> Callable[..., PathReport]:
    """`leak_probe(path, engine=…, model=…, …)`: what one path of the engine leaves, in a fresh process.

    A run that noise kept from telling is repeated, twice at most.
    """
    from prill_harness.leaks import Probe, probe
    from prill_harness.leaks.repeat import settled

    def look(path: str, *, engine: str = "", model: str = "", **rest: Any) -> PathReport:
        planned = engine or pytestconfig.getoption("prill_engine"), model or model_spec
        wanted = Probe(*planned, path, **rest)
        return settled(probe.run, wanted)

    return look


@pytest.fixture(scope="session")
def oracle(pytestconfig: pytest.Config, model_spec: str) -> Iterator[Engine]:
    """The float64 oracle on the same model."""
    from prill_harness.engines import open_engine
    from prill_runtime.errors import Inconclusive, UnsupportedModel

    try:
        opened = open_engine("numpy64", model_spec)
    except UnsupportedModel as error:
        raise Inconclusive("the oracle cannot judge this model", got=str(error)) from error
    with opened:
        recorder = pytestconfig.pluginmanager.get_plugin("prill-recorder")
        if recorder is not None:
            recorder.oracle = opened
        yield opened


@pytest.fixture(scope="session")
def golden(model_spec: str) -> Golden:
    """The golden of the model under test; recorded on first use for a user's own file."""
    from prill_harness import faults
    from prill_harness.golden import golden_for

    with faults.only(()):
        return golden_for(model_spec)


@pytest.fixture(scope="session")
def gguf_file(model_path: Path) -> Iterator[GGUFFile]:
    """The model file, open."""
    from prill_runtime.gguf import open_gguf

    with open_gguf(model_path) as file:
        yield file
