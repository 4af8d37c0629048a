"""Check the options of every command before it runs.

A wrong name is thus refused before it has cost a minute of work or left a file behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

ENGINES = ("engine", "engines", "against")
"""Parameters that hold engine specs, and those that hold model specs."""
MODELS = ("model", "models")
FILES = ("first", "other")
"""Parameters that hold model specs of which only the file is read, even if it cannot be judged."""


def pass_through(options: Mapping[str, Any], *, judges: bool, own: str = "") -> None:
    """Refuse wrong names in a command's engine, model and device options.

    Args:
        judges: the command judges its engines, by `against` if it has that option, else by the oracle.
        own: a prefix of engine specs that the command opens by itself.

    Raises:
        UsageError: unknown engine, fault, fixture, shape, type or device; an engine judged by itself.
        ModelFileError, UnsupportedModel: a model file is missing or malformed.
    """
    engines = list(_given(options, ENGINES[:2]))
    under_test = [spec for spec in engines if not (own and spec.startswith(own))]
    examine(
        [*under_test, *_given(options, ENGINES[2:])],
        # An engine that the command opens by itself has no model.
        _given(options, MODELS) if under_test or not engines else (),
        devices=_given(options, ("device",)),
        # A command that only decides on ledgers needs no model file.
        opened=not options.get("ledgers"),
    )
    examine((), _given(options, FILES), loaded=False)
    together(product(() if options.get("ledgers") else under_test, _given(options, MODELS)))
    if judges:
        judged(under_test, options.get("against"))


def examine(
    engines: Iterable[str],
    models: Iterable[str],
    *,
    devices: Iterable[str] = (),
    opened: bool = True,
    loaded: bool = True,
) -> None:
    """Refuse specs that no cell could open.

    Args:
        opened: open the models' files; False: check only their specs.
        loaded: refuse files that are not models or cannot be loaded.

    Raises:
        UsageError, ModelFileError, UnsupportedModel: as `pass_through`.
    """
    from prill_harness.engines.models import check_model
    from prill_harness.engines.spec import check_device
    from prill_harness.faults.opening import check_engine

    for spec in engines:
        check_engine(spec)
    for device in devices:
        check_device(device)
    for model in models:
        check_model(model, opened=opened, loaded=loaded)


def together(pairs: Iterable[tuple[str, str]]) -> None:
    """Refuse engines that cannot be asked about the model they are to open, as (engine, model) specs.

    Raises:
        UsageError: answers that were recorded from another model.
    """
    from prill_harness.engines.connect import known
    from prill_harness.engines.spec import EngineSpec

    for engine, model in dict.fromkeys(pairs):
        cls, argument = known(EngineSpec.parse(engine))
        cls.fits(argument, model)


def judged(engines: Iterable[str], oracle: str | None = None) -> None:
    """Refuse to judge an engine by itself.

    Raises:
        UsageError: one of the engines is the oracle.
    """
    from prill_harness.engines.spec import ORACLE, check_judged

    for spec in engines:
        check_judged(spec, oracle or ORACLE)


def _given(options: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    """The values of the parameters with these names: one, several or none."""
    for name in names:
        value = options.get(name)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | tuple):
            yield from value
