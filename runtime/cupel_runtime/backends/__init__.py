"""Implementations of the ops protocol."""

from __future__ import annotations

from cupel_runtime.backends.numpy import NumpyBackend
from cupel_runtime.backends.rounded import RoundedBackend

__all__ = ["NumpyBackend", "RoundedBackend"]
