"""The name of a fault goes in; the fault, from whichever module declares it, comes out."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from prill_harness.faults import planted
from prill_harness.planting.faults import COMMON, REGISTRY, Fault
from prill_harness.records.names import look_up


def modules() -> list[str]:
    """Those that declare faults, all below `planted`, so that a new file of them is found.

    `common` last, which plants others' once more, and devices' after all.
    """
    found = pkgutil.walk_packages(planted.__path__, f"{planted.__name__}.")
    names = [each.name for each in found if not each.ispkg]

    def order(name: str) -> tuple[bool, bool, str]:
        own = name.rpartition(".")[2]
        return own.startswith("device"), own == COMMON, own

    return sorted(names, key=order)


def catalogue(engine: str = "numpy") -> dict[str, Fault]:
    """Every fault of an engine by name, in the order of their files."""
    for module in modules():
        importlib.import_module(module)
    return {name: fault for name, fault in REGISTRY.items() if fault.engine == engine}


def known() -> frozenset[str]:
    """The names of all faults of all engines."""
    return frozenset(catalogue() | catalogue("emu"))


def named(names: Iterable[str]) -> tuple[Fault, ...]:
    """The faults of these names.

    Raises:
        UsageError: a name nobody declared.
    """
    if not (names := tuple(names)):
        return ()
    declared = catalogue() | catalogue("emu")
    for name in names:
        look_up(name, declared, "unknown planted fault", hint="`prill faults list` shows them")
    return tuple(declared[name] for name in names)
