"""One step of any batch on a device; its logits are computed and copied a few rows at a time."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.device.steps.cache import DeviceCache
from prill_runtime.models.base import Step, Tap
from prill_runtime.models.load import Wired
from prill_runtime.ops.protocol import Array, Ids

LOGIT_BYTES: Final = 16 << 20
"""Bytes of logits copied to the host at a time; at least one row's."""


def rows_of_logits(vocab: int) -> int:
    """How many rows' logits are computed at a time."""
    return max(1, LOGIT_BYTES // (4 * vocab))


def run(model: Wired, ops: CudaBackend, step: Step, wanted: Ids | None, tap: Tap) -> Array:
    """Logits (row, vocab) of the wanted rows of a step, or of all rows, on the host."""
    for cache, _ in step.sequences:
        assert isinstance(cache, DeviceCache)
        cache.arm()
    backend: Any = ops
    on_device = Step(backend.ids(step.ids), backend.ids(step.positions), step.sequences)
    hidden: Any = ops.on(model.network(model.passing(backend, on_device, tap)))
    hidden = hidden if wanted is None else hidden[wanted]
    most, pieces = rows_of_logits(model.network.vocab), []
    for low in range(0, len(hidden), most):
        some: Any = hidden[low : low + most]
        with ops.results("logits"):
            pieces.append(np.asarray(model.network.head(model.passing(backend, on_device), some)))
    return np.asarray(tap("logits", np.concatenate(pieces)))
