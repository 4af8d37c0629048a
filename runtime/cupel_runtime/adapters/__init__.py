"""Forward passes, one per architecture, found by declaration."""

from __future__ import annotations

from cupel_runtime.adapters import gpt2, llama
from cupel_runtime.adapters.base import Adapter, LoadReport, Step, Tap, TensorSpec, adapter_for
from cupel_runtime.adapters.config import Config

__all__ = ["Adapter", "Config", "LoadReport", "Step", "Tap", "TensorSpec", "adapter_for", "gpt2", "llama"]
