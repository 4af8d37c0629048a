"""The harness: engines, comparison, evidence, checklists, gate."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prill_harness.engines.base import Capability, Engine, EngineInfo, Generation, Session
    from prill_harness.engines.models import resolve_model
    from prill_harness.engines.spec import EngineSpec
    from prill_harness.faults.opening import open_engine

HOMES = {
    "Capability": "engines.base",
    "Engine": "engines.base",
    "EngineInfo": "engines.base",
    "EngineSpec": "engines.spec",
    "Generation": "engines.base",
    "Session": "engines.base",
    "open_engine": "faults.opening",
    "resolve_model": "engines.models",
}
"""Public name -> the module that has it. Nothing of the harness imports from here."""

__all__ = [
    "Capability",
    "Engine",
    "EngineInfo",
    "EngineSpec",
    "Generation",
    "Session",
    "open_engine",
    "resolve_model",
]


def __getattr__(name: str) -> Any:
    """Import on first use: pytest loads this package's plugin in every run, which must not import NumPy."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
