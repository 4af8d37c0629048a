"""A Llama's weights and a decode slot come in; the launches of one token go out, five a layer."""

from __future__ import annotations

from typing import Any, Final

from prill_runtime.device.machine.base import Device, Pointer
from prill_runtime.device.memory.array import DeviceArray
from prill_runtime.device.memory.matrix import FORMATS, PLAIN, DeviceMatrix
from prill_runtime.device.memory.slot import TOKEN, Slot
from prill_runtime.device.ops.backend import CudaBackend, blocks
from prill_runtime.models.load import Wired
from prill_runtime.models.nodes import Attention, Layer, RmsNorm

CLUSTER: Final = 8  # blocks of attention_decode that share a head of keys
TILE: Final = 16  # keys of one of its warps at a time
GROUP: Final = 8
MOST_DIM: Final = 256
ROWS: Final = 4
MODE: Final = {"plain": 0, "gate_up": 1, "qkv": 2}
LAUNCH: dict[str, tuple[int, int]] = {"fast": (512, 1), "exact": (256, 2), "values": (512, 1), "emu": (64, 1)}
"""Threads of a block, and blocks for each multiprocessor."""
AHEAD: Final = 2 << 20
"""Bytes of each of two matrices that attention asks for: with twice as much, the matrix before them waits."""
NOTHING: Final = (0,) * 8


def fits(model: Wired) -> bool:
    """Whether the fused kernels cover the model: no biases, heads of whole 16-byte pieces."""
    network = model.network
    return (
        network.embed.positions is None
        and isinstance(network.norm, RmsNorm)
        and all(_covers(layer, model.weights) for layer in network.layers)
    )


def _covers(layer: Layer, weights: Any) -> bool:
    a, d = layer.attention, layer.dense
    if a.rope is None or a.rope.layout != "norm" or d.gate is None:
        return False
    if not all(isinstance(norm, RmsNorm) for norm in (a.norm, d.norm)) or a.size % 4 or a.size > MOST_DIM:
        return False
    linears = (a.q, a.k, a.v, a.out, d.gate, d.up, d.down)
    if a.heads // a.kv_heads > GROUP or a.norm.width % 32 or d.up.rows % 32:
        return False
    if any(linear.bias or linear.of is not None for linear in linears):
        return False
    matrices = [weights[f"{linear.name}.weight"] for linear in linears]
    return all(isinstance(m, DeviceMatrix) for m in matrices) and matrices[4].kind == matrices[5].kind


class FusedLlama:
    """Buffers of one token's way through the layers, and the launches that fill them."""

    def __init__(self, model: Wired, ops: CudaBackend) -> None:
        network = model.network
        a, d = network.layers[0].attention, network.layers[0].dense
        assert a.rope is not None
        self.model, self.ops, self.attention, self.eps = model, ops, a, network.norm.eps
        self.x = ops.empty(1, network.width, purpose="scratch")
        self.q = ops.empty(1, a.heads * a.size, purpose="scratch")
        self.mixed = ops.empty(1, a.heads * a.size, purpose="scratch")
        self.act = ops.empty(1, d.up.rows, purpose="scratch")
        self.pairs = a.rope.dim // 2
        self.frequencies = ops.frequencies(**a.rope.settings(model.weights))
        self.angles = ops.empty(1, self.pairs, 2, purpose="scratch")

    def record(self, slot: Slot, logits: DeviceArray) -> None:
        """Queue one token: the id in the slot, at its position, to logits (1, vocab)."""
        network, ops = self.model.network, self.ops
        weights: Any = self.model.weights
        table = weights[f"{network.embed.name}.weight"]
        args = {"table": table.fields, "id": slot.pointer + TOKEN, "out": self.x.pointer,
                "position": slot.at("position"), "frequencies": self.frequencies.pointer,
                "angles": self.angles.pointer, "pairs": self.pairs}  # fmt: skip
        ops.device.launch(f"begin_{table.kind}", (blocks(table.pitch, 64)[0] + 1,), 64, args)
        for layer in network.layers:
            a, d = layer.attention, layer.dense
            assert d.gate is not None
            q, k, v, out, gate, up, down = (
                weights[f"{linear.name}.weight"] for linear in (a.q, a.k, a.v, a.out, d.gate, d.up, d.down)
            )
            norm = [weights[f"{part.name}.weight"] for part in (a.norm, d.norm)]
            common: Any = {"norm": norm[0], "slot": slot, "layer": a.layer}
            if q.kind == k.kind == v.kind:
                self.stage("qkv", (q, k, v), self.x, self.q, **common)
            else:
                for part in range(3):
                    self.stage("qkv", (q, k, v), self.x, self.q, only=part, **common)
            attend(ops.device, a, slot.pointer, self.q.pointer, self.mixed.pointer, (gate, up))
            self.stage("plain", (out,), self.mixed, self.x, residual=self.x)
            self.stage("gate_up", (gate, up), self.x, self.act, norm=norm[1])
            self.stage("plain", (down,), self.act, self.x, residual=self.x)
        head = weights[f"{network.head.name}.weight"]
        self.stage("plain", (head,), self.x, logits, norm=weights[f"{network.norm.name}.weight"])

    def stage(
        self,
        mode: str,
        matrices: tuple[DeviceMatrix, ...],
        x: DeviceArray,
        out: DeviceArray,
        *,
        norm: Any = None,
        residual: DeviceArray | None = None,
        slot: Slot | None = None,
        layer: int = 0,
        only: int | None = None,
    ) -> None:
        """Queue one launch of fused.cu.

        Args:
            only: of q, k and v, the one to compute; the others have launches of their own.
        """
        a, device = self.attention, self.ops.device
        first = matrices[only or 0]
        fields = [m.fields for m in matrices] + [NOTHING] * (3 - len(matrices))
        rows = first.rows if mode == "gate_up" else sum(m.rows for m in matrices)
        if only is not None:
            fields = [_with_rows(first, first.rows if part == only else 0) for part in range(3)]
            rows = first.rows
        fast = self.ops.mode == "fast" and first.type not in PLAIN
        chunk = FORMATS[first.type].chunk
        shared = first.pitch * chunk + 8 * (first.cols // 32) if fast else 4 * first.pitch * chunk
        threads, each = LAUNCH[
            "emu"
            if device.target.emulated
            else "fast"
            if fast
            else "values"
            if first.type in PLAIN
            else "exact"
        ]
        groups = -(-rows // (ROWS // 2 if mode == "gate_up" else ROWS))
        grid = min(device.multiprocessors * each, groups)
        team, steps, rounds = team_of(groups, -(-first.pitch // 32), grid, threads // 32)
        args = {"m0": fields[0], "m1": fields[1], "m2": fields[2], "x": x.pointer,
                "norm": norm.pointer if norm is not None else 0,
                "residual": residual.pointer if residual is not None else 0, "out": out.pointer,
                "sequence": slot.pointer if slot is not None else 0, "angles": self.angles.pointer,
                "eps": self.eps, "mode": MODE[mode], "layer": layer, "head_dim": a.size,
                "kv_heads": a.kv_heads, "pairs": self.pairs,
                "team_bits": team.bit_length() - 1, "steps": steps, "rounds": rounds}  # fmt: skip
        kernel = f"fused_{'fast' if fast else 'exact'}_{first.kind}"
        device.launch(kernel, (max(1, grid),), threads, args, shared=shared)


def attend(
    device: Device,
    a: Attention,
    sequence: Pointer,
    q: Pointer,
    out: Pointer,
    ahead: tuple[DeviceMatrix, DeviceMatrix] | None = None,
) -> None:
    """Queue attention_decode: one row of q (head, dim) over a sequence's cache, itself included.

    Args:
        sequence: a SEQUENCE in device memory, whose length is the row's position. out: (head, dim).
        ahead: matrices of one shape that a later launch reads, to be asked into the second-level cache.
    """
    group, dim = a.heads // a.kv_heads, a.size
    first, second = (matrix.pointers["q"] for matrix in ahead) if ahead else (0, 0)
    most = min(AHEAD, *(matrix.streams["q"] for matrix in ahead)) if ahead else 0
    args = {"sequence": sequence, "q": q, "out": out, "kv_heads": a.kv_heads, "group": group,
            "head_dim": dim, "layer": a.layer, "window": a.window or 0, "scale": a.scale,
            "ahead0": first, "ahead1": second, "ahead_bytes": most}  # fmt: skip
    heads = next(size for size in (1, 2, 4, GROUP) if size >= group)
    wide = dim > MOST_DIM // 2
    tile = TILE // 2 if wide else TILE
    threads = 64 if device.target.emulated else 256
    floats = threads // 32 * (2 * tile * dim + (tile + 3) * heads)  # keys, values, weights, maxima and sums
    floats += heads * dim + CLUSTER * heads * (dim + 2)  # q, and what every block sends to the first
    kernel = f"attention_decode_{'wide_' if wide else ''}{heads}"
    device.launch(kernel, (CLUSTER, a.kv_heads), threads, args, shared=4 * floats)


def team_of(groups: int, steps: int, grid: int, warps: int) -> tuple[int, int, int]:
    """Warps that share a group of rows, a power of two: those with the fewest steps one after the other.

    Returns:
        The warps, steps of each for one group, groups one after the other.
    """
    sizes = [size for size in (1, 2, 4, 8, 16) if warps % size == 0]
    shares = [(size, -(-steps // size), -(-groups // (grid * (warps // size)))) for size in sizes]
    return min(shares, key=lambda share: share[1] * share[2])


def _with_rows(matrix: DeviceMatrix, rows: int) -> tuple[int, ...]:
    """Struct Matrix of a matrix as if it had so many rows."""
    at = matrix.fields
    return (*at[:4], rows, *at[5:])
