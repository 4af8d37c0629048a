"""The harness: engines, comparison, evidence, checklists, gate."""

from __future__ import annotations

from cupel_harness.engines import EngineSpec, open_engine, resolve_model
from cupel_harness.engines.base import Capability, Engine, EngineInfo, Generation, Session

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
