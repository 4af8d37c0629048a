"""Look up planted faults by name, in whichever module they are declared."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from prill_harness.faults import planted
from prill_harness.planting.faults import COMMON, REGISTRY, Fault
from prill_harness.records.names import look_up


def modules() -> list[str]:
    """The modules that declare faults: all below `planted`, so that new files are found.

    `common`, which plants other modules' faults again, comes late, and devices' faults last.
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
    """Names of the faults of all engines."""
    return frozenset(catalogue() | catalogue("emu"))


def named(names: Iterable[str]) -> tuple[Fault, ...]:
    """The faults with these names.

    Raises:
        UsageError: no fault of that name.
    """
    if not (names := tuple(names)):
        return ()
    declared = catalogue() | catalogue("emu")
    for name in names:
        look_up(name, declared, "unknown planted fault", hint="`prill faults list` shows them")
    return tuple(declared[name] for name in names)
