"""How a device's memory is divided for a model: rehearsed on a device that only counts, not estimated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np

from prill_runtime.device.machine.dry import DRY_BYTES, DryDevice
from prill_runtime.device.memory.arena import ALIGNMENT, PURPOSES, Arena, Region, padded
from prill_runtime.device.memory.matrix import staging_bytes
from prill_runtime.device.ops.backend import CudaBackend, most_partial
from prill_runtime.device.ops.tensor_cores import LEAST_TILE_ROWS, most_sums
from prill_runtime.device.steps.cache import MOST_SESSIONS, STATE_BYTES, DeviceCache, nbytes_of
from prill_runtime.device.steps.decode import Decoder
from prill_runtime.device.steps.prefill import MAX_ROWS, Prefill
from prill_runtime.device.steps.step import rows_of_logits, run
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.models import walks
from prill_runtime.models.base import Step, Tap, untouched
from prill_runtime.models.load import Wired
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.experts import Experts
from prill_runtime.models.nodes.network import Network
from prill_runtime.ops.protocol import Array

POOL_CONTEXTS: Final = 64
"""Full contexts that the caches have room for, unless that takes more than both of the next two."""
POOL_POSITIONS: Final = 16384
POOL_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class DevicePlan:
    """How a device's memory is divided for a model.

    Attributes:
        sizes: bytes of the arena by purpose. rows: the most of one step.
    """

    sizes: Mapping[str, int]
    rows: int


def plan(
    network: Network, tensors: Mapping[str, TensorInfo], mode: str, positions: int | None, where: str
) -> DevicePlan:
    """Plan the memory for one model.

    Args:
        tensors: those to load, in order. mode: arithmetic. positions: of all caches together, None: by the
            model. where: names the model in errors.

    Raises:
        UnsupportedModel: tensors without kernels.
    """
    positions = positions or positions_of(network)
    rows = min(positions, MAX_ROWS)
    device = DryDevice()
    ops = CudaBackend(device, Arena(device, dict.fromkeys(PURPOSES, DRY_BYTES), None, where), mode)
    weights: Any = {name: ops.place(info) for name, info in tensors.items()}
    model = Wired(network, weights)
    ops.prepare(walks.rotations(network, weights))
    decoder = Decoder(model, ops)
    regions = ops.arena.regions
    scratch = regions["scratch"]
    # Allocations that stay fill holes left by closed sessions, each of which may waste up to a session's
    # state.
    kept = scratch.peak + scratch.live * ALIGNMENT + MOST_SESSIONS * padded(STATE_BYTES)
    # With a cap, the logits before it lie beside those within it.
    arrays = 1 if network.head.softcap is None else 2
    logits = regions["logits"].peak
    logits += arrays * padded(4 * network.vocab * min(rows, rows_of_logits(network.vocab)))
    matrices = [info for info in tensors.values() if len(info.shape) > 1]
    passing = [staging_bytes(info) for info in matrices]
    attentions = [node for node in network.walk() if isinstance(node, Attention)]
    passing += [most_partial(rows, node.heads, node.size, network.context) for node in attentions]
    if mode == "fast":
        passing += [most_sums(rows, info.shape[0]) for info in matrices]
    # A trace may replace any stage, and a replacement lies beside the stage it replaces: room for one more.
    widest = max(info.shape[0] for info in matrices if info.name.startswith("blk."))
    mixtures = [node for node in network.walk() if isinstance(node, Experts)]
    widest = max([widest, *(node.used * max(node.up.rows, node.down.rows) for node in mixtures)])
    return DevicePlan(
        {
            "weights": regions["weights"].peak,
            "cache": nbytes_of(network, positions) + min(positions, MOST_SESSIONS) * (padded(1) - 1),
            "activations": rows * (max(per_row(ops, model, decoder.prompt)) + padded(4 * widest)),
            "scratch": kept + padded(max(passing)),
            "logits": logits,
        },
        rows,
    )


def positions_of(network: Network) -> int:
    """Positions that all caches have together unless the user says how many."""
    most = max(POOL_POSITIONS, POOL_BYTES // nbytes_of(network, 1))
    return min(POOL_CONTEXTS * network.context, most)


def per_row(ops: CudaBackend, model: Wired, prompt: Prefill) -> Iterator[int]:
    """Bytes of activations per row, for every kind of step, from rehearsals with as few rows as possible.

    All blocks are padded row by row, so their addresses for n rows are n times those for one. Steps that ask
    for different blocks: of one row, of several, and in `fast` of enough for tiles (whose attention may
    still have fewer); of a batch, and of a prompt's piece; with stages that the host reads or replaces.
    """
    fast = ops.mode == "fast"
    for lengths in [(1,), (2,), (1, 1)] + [(LEAST_TILE_ROWS,), (LEAST_TILE_ROWS - 1, 1)] * fast:
        yield rehearsed(ops, model, lengths, untouched)
        if lengths[0] in (2, LEAST_TILE_ROWS):
            yield rehearsed(ops, model, lengths, copied)
            yield rehearsed(ops, model, lengths, replaced)
        if len(lengths) == 1:
            region = fresh(ops)
            prompt.record(lengths[0], lengths[0])
            yield -(-region.peak // lengths[0])


def rehearsed(ops: CudaBackend, model: Wired, lengths: tuple[int, ...], tap: Tap) -> int:
    """Bytes of activations per row of one step over new sequences of these lengths."""
    region, rows, ends = fresh(ops), sum(lengths), accumulate(lengths)
    parts = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    caches = [DeviceCache(ops, model.network, length) for length in lengths]
    zeros = np.zeros(rows, np.int64)
    step = Step(zeros, zeros, tuple(zip(caches, parts, strict=True)))
    run(model, ops, step, np.arange(rows)[::-1], tap)
    return -(-region.peak // rows)


def fresh(ops: CudaBackend) -> Region:
    """An unused region for activations, in place of the old one."""
    region = ops.arena.regions["activations"] = Region("activations", 0, DRY_BYTES)
    return region


def copied(stage: str, x: Array) -> Array:
    """A tap that reads every stage."""
    x.copy()
    return x


def replaced(stage: str, x: Array) -> Array:
    """A tap that replaces every stage by an array of the host."""
    return np.zeros(x.shape, np.float32)
