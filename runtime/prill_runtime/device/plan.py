"""A file's shapes come in; how a device is divided for the model, rehearsed and not guessed, goes out."""

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
from prill_runtime.device.steps.cache import SESSIONS, STATE_BYTES, DeviceCache, nbytes_of
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

CONTEXTS: Final = 64
"""Sequences of the whole context that the caches have room for, unless that takes more than both of these."""
POOL_POSITIONS: Final = 16384
POOL_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Plan:
    """How a model lies on a device.

    Attributes:
        sizes: bytes of the arena by purpose. rows: most of one step.
    """

    sizes: Mapping[str, int]
    rows: int


def plan(
    network: Network, tensors: Mapping[str, TensorInfo], mode: str, positions: int | None, where: str
) -> Plan:
    """The division for one model.

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
    # What stays fills holes that closed sessions left; up to a state of one then lies idle beside each of it.
    kept = scratch.peak + scratch.live * ALIGNMENT + SESSIONS * padded(STATE_BYTES)
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
    # A trace may put any stages in place, each of them somewhere else than what it stands for: one more.
    widest = max(info.shape[0] for info in matrices if info.name.startswith("blk."))
    mixtures = [node for node in network.walk() if isinstance(node, Experts)]
    widest = max([widest, *(node.used * max(node.up.rows, node.down.rows) for node in mixtures)])
    return Plan(
        {
            "weights": regions["weights"].peak,
            "cache": nbytes_of(network, positions) + min(positions, SESSIONS) * (padded(1) - 1),
            "activations": rows * (max(per_row(ops, model, decoder.prompt)) + padded(4 * widest)),
            "scratch": kept + padded(max(passing)),
            "logits": logits,
        },
        rows,
    )


def positions_of(network: Network) -> int:
    """Positions that all caches have together where nobody says how many."""
    most = max(POOL_POSITIONS, POOL_BYTES // nbytes_of(network, 1))
    return min(CONTEXTS * network.context, most)


def per_row(ops: CudaBackend, model: Wired, prompt: Prefill) -> Iterator[int]:
    """Bytes of activations for each row of a step, of every kind of step, by passes over as few rows as do.

    All of its blocks are padded by their rows, so that their places for n rows are n times those for one. A
    step of one row, of several, and in `fast` of enough for tiles, whose attention may still be of fewer, ask
    for different ones; so do a batch, a prompt's piece, and stages that the host looks at or puts in place.
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
    """Bytes of activations for each row of one step of new sequences of these lengths."""
    region, rows, ends = fresh(ops), sum(lengths), accumulate(lengths)
    parts = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    caches = [DeviceCache(ops, model.network, length) for length in lengths]
    zeros = np.zeros(rows, np.int64)
    step = Step(zeros, zeros, tuple(zip(caches, parts, strict=True)))
    run(model, ops, step, np.arange(rows)[::-1], tap)
    return -(-region.peak // rows)


def fresh(ops: CudaBackend) -> Region:
    """A part for activations that nothing was taken from yet."""
    region = ops.arena.regions["activations"] = Region("activations", 0, DRY_BYTES)
    return region


def copied(stage: str, x: Array) -> Array:
    """A tap that looks at everything."""
    x.copy()
    return x


def replaced(stage: str, x: Array) -> Array:
    """A tap in whose place something of the host's is computed with."""
    return np.zeros(x.shape, np.float32)
