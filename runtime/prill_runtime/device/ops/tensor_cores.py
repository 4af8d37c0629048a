"""Matrix products and attention of many rows on tensor cores, in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from prill_runtime.device.machine.base import Device, Pointer
from prill_runtime.device.memory.array import Allocation, DeviceArray, DeviceMemory
from prill_runtime.device.memory.matrix import DeviceMatrix, Matrix

LEAST_TILE_ROWS: Final = 17
"""Fewer rows would leave a tile mostly empty."""
HEAD_SIZES: Final = (64, 128)  # head sizes that prefill_attention has kernels for
TILE_OUTS, STAGE_COLUMNS = 128, 64  # outputs of a tile, columns of a stage
SHARED_BYTES: Final = {256: 193 << 10, 128: 105 << 10, 64: 97 << 10}
FULL_TILE: Final = 40
"""Rows of an expert, on average, above which a tile of 128 takes them: many experts have more than 64."""
MOST_SPLITS: Final = 8
JOINED_BYTES: Final = 20 << 20
"""The most bytes of partial sums that splits may leave to be added up."""


@dataclass(frozen=True)
class Tiling:
    """How a product is divided: rows of a tile, thread blocks that share a tile, stages of each block."""

    rows: int
    splits: int
    steps: int

    @classmethod
    def of(cls, rows: int, outs: int, x_pitch: int, multiprocessors: int) -> Tiling:
        """Tiles as high as the rows need; if they are too few to fill the device, the columns are split."""
        tile = 64 if rows <= 64 else 128 if rows <= 128 else 256
        slots = multiprocessors * (1 if tile == 256 else 2)
        total = x_pitch // STAGE_COLUMNS
        tiles = -(-rows // tile) * -(-outs // TILE_OUTS)
        splits = max(1, min(slots // tiles, MOST_SPLITS, total // 8, JOINED_BYTES // (4 * rows * outs)))
        steps = -(-total // splits)
        return cls(tile, -(-total // steps), steps)


def most_sums(rows: int, outs: int) -> int:
    """The most bytes of partial sums that a product of up to `rows` rows leaves, on any device."""
    return min(JOINED_BYTES, 4 * MOST_SPLITS * rows * outs)


class TensorCores:
    """What a backend in mode `fast` uses for many rows; activations are float32 between the ops."""

    def __init__(self, ops: DeviceMemory) -> None:
        self.ops = ops

    @property
    def device(self) -> Device:
        """The device, with these kernels loaded: on first use only, for they take long to compile."""
        self.ops.device.module("tensor", "prefill_attention")
        return self.ops.device

    def halves(self, x: DeviceArray) -> tuple[Allocation, int]:
        """x (row, in) rounded to half, rows padded with zeros: its memory, and its pitch in halves.

        It is kept with x, for several products may need it.
        """
        pitch = -(-x.width // STAGE_COLUMNS) * STAGE_COLUMNS
        if x.halves is None:
            allocation = self.ops.allocate(2 * len(x) * pitch, rows=len(x))
            args = {"x": x.pointer, "out": allocation.pointer, "rows": len(x), "cols": x.width,
                    "pitch": x.pitch, "out_pitch": pitch}  # fmt: skip
            self.device.launch("tensor_halves", (-(-len(x) * pitch // 2048),), 256, args)
            x.halves = allocation
        return x.halves, pitch

    def linear(
        self,
        x: DeviceArray,
        weight: DeviceMatrix | DeviceArray,
        bias: Pointer,
        out: DeviceArray,
    ) -> None:
        """out (row, out) = x (row, in) · weightᵀ + bias, the products of halves summed in float32."""
        device, (fields, kind) = self.device, self.ops.fields(weight)
        rows, outs = out.shape
        source, pitch = self.halves(x)
        tiling = Tiling.of(rows, outs, pitch, device.multiprocessors)
        split = tiling.splits > 1
        nbytes = 4 * tiling.splits * rows * outs
        sums = self.ops.allocate(nbytes, "scratch", passing=True) if split else out.allocation
        args: dict[str, Any] = {
            "m": fields, "x": source.pointer, "bias": 0 if split else bias, "residual": 0,
            "out": sums.pointer if split else out.pointer, "rows": rows, "x_pitch": pitch,
            "out_pitch": outs, "steps": tiling.steps,
        }  # fmt: skip
        grid = (-(-rows // tiling.rows), -(-outs // TILE_OUTS), tiling.splits)
        kernel = f"tensor_{TILE_OUTS}x{tiling.rows}_{kind}"
        device.launch(kernel, grid, 2 * TILE_OUTS, args, shared=SHARED_BYTES[tiling.rows])
        if split:
            join = {"sums": sums.pointer, "bias": bias, "out": out.pointer,
                    "count": rows * outs, "outs": outs, "splits": tiling.splits}  # fmt: skip
            device.launch("tensor_join", (-(-rows * outs // 256),), 256, join)

    def experts(
        self,
        x: DeviceArray,
        weight: DeviceMatrix | DeviceArray,
        bias: Matrix,
        routed: DeviceArray,
        out: DeviceArray,
    ) -> None:
        """out (row, used, out): each row of x (row, in), or (row, used, in), times its experts' matrices.

        Args:
            weight: those of all experts, one below the other. bias: (expert, out) of float32, or nothing.
            routed: (row, expert).
        """
        device, (fields, kind) = self.device, self.ops.fields(weight)
        device.module("tensor_experts")
        rows, used, outs = out.shape
        count = routed.shape[1]
        apart = x.ndim == 3
        source, pitch = self.halves(x.reshape(rows * used, x.shape[-1]) if apart else x)
        args = {"m": fields, "x": source.pointer, "bias": bias.q, "order": self.order(routed, used).pointer,
                "out": out.pointer, "rows": rows, "used": used, "each": 1 if apart else used,
                "x_pitch": pitch, "outs": outs, "bias_pitch": 4 * bias.pitch}  # fmt: skip
        tile = 64 if rows * used <= FULL_TILE * count else 128
        grid = (-(-outs // TILE_OUTS), count + 1, -(-rows // tile))
        shared = SHARED_BYTES[tile]
        device.launch(f"tensor_experts_{tile}_{kind}", grid, 2 * TILE_OUTS, args, shared=shared)

    def order(self, routed: DeviceArray, used: int) -> Allocation:
        """The rows of each expert, for tensor_experts; kept with `routed`, for several products need it."""
        if routed.order is None:
            rows, experts = routed.shape
            routed.order = self.ops.allocate(4 * rows * (experts + used), rows=rows)
            args = {"routed": routed.pointer, "order": routed.order.pointer, "rows": rows,
                    "experts": experts, "used": used}  # fmt: skip
            self.ops.device.launch("group", (experts + 1,), 128, args)
        return routed.order

    def attend(
        self,
        q: DeviceArray,
        sequence: Pointer,
        kv_heads: int,
        layer: int,
        how: Mapping[str, Any],
    ) -> DeviceArray:
        """Attention of q (row, head, dim) over a cache that already holds its keys: (row, head · dim).

        Args:
            how: scale, window, softcap and sinks, as the kernels take them.
        """
        rows, heads, dim = q.shape
        out = q.beside(heads * dim)
        pitch = -(-heads * dim // STAGE_COLUMNS) * STAGE_COLUMNS
        if q.whole is None:  # a batch's rows are converted to halves together
            out.halves = self.ops.allocate(2 * rows * pitch, rows=rows)
        halves = 0 if out.halves is None else out.halves.pointer
        args = {"sequence": sequence, "q": q.pointer, "out": out.pointer, "halves": halves,
                "rows": rows, "heads": heads, "kv_heads": kv_heads, "q_pitch": q.pitch,
                "halves_pitch": pitch, "layer": layer, **how}  # fmt: skip
        kind = "hooked" if how["softcap"] or how["sinks"] else "attention"
        self.device.launch(f"prefill_{kind}_{dim}", (-(-rows // 64), heads), 128, args)
        return out
