"""The harness: engines, comparison, evidence, checklists, gate."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prill_harness.engines.base import Capability, Engine, EngineInfo, Generation, Session
    from prill_harness.engines.spec import EngineSpec, open_engine, resolve_model

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
    """Import on first use: pytest loads this package's plugin in every run, NumPy is not its business."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "engines.spec" if name in ("EngineSpec", "open_engine", "resolve_model") else "engines.base"
    return getattr(import_module(f"{__name__}.{home}"), name)
