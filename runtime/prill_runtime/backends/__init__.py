"""Implementations of the ops protocol."""

from __future__ import annotations

from prill_runtime.backends.numpy import NumpyBackend
from prill_runtime.backends.rounded import RoundedBackend

__all__ = ["NumpyBackend", "RoundedBackend"]
