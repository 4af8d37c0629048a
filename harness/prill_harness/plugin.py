"""The pytest plugin: options, and a recorder and fixtures that are registered only in runs for evidence."""

from __future__ import annotations

import pytest

# Nothing of prill is imported above, so that this module costs nothing in a run that does not use prill.
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
    group.addoption("--prill-attempt", metavar="N", type=int, default=1, help="which run of the cell this is")
    group.addoption("--prill-check", metavar="ID", action="append", help="run this check only (repeatable)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "prill_check(name, kills, needs, oracle): a check that leaves evidence"
    )
    if any(config.getoption(option) for option in ASKS):
        from prill_harness.recording import fixtures
        from prill_harness.recording.recorder import Recorder

        config.pluginmanager.register(Recorder(config), "prill-recorder")
        # They have common names, `engine` or `golden`: in any other run they would hide another plugin's.
        config.pluginmanager.register(fixtures, "prill-fixtures")
        _look_at_engine(config.getoption("prill_engine"))


def _look_at_engine(spec: str) -> None:
    """Refuse the oracle as the engine under test, and plant the spec's faults in the whole process."""
    from prill_harness.engines import spec as engines
    from prill_harness.faults.blackbox.planted import own
    from prill_harness.faults.catalogue import named
    from prill_harness.planting import faults
    from prill_runtime.errors import UsageError

    try:
        engines.check_judged(spec)
        planted = own(engines.EngineSpec.parse(spec).faults)
        if planted:
            faults.ambient(named(planted))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.has_plugin("prill-recorder"):
        checks = [item for item in items if item.get_closest_marker("prill_check")]
        if checks:
            raise pytest.UsageError(f"{checks[0].nodeid} is a prill check; name a model with --prill-model")
