"""Forward passes, one per architecture, found by declaration."""

from __future__ import annotations

from prill_runtime.models import gpt2, llama
from prill_runtime.models.base import Adapter, LoadReport, Step, Tap, TensorSpec, adapter_for, adapter_of
from prill_runtime.models.config import Config

__all__ = [
    "Adapter",
    "Config",
    "LoadReport",
    "Step",
    "Tap",
    "TensorSpec",
    "adapter_for",
    "adapter_of",
    "gpt2",
    "llama",
]
