"""The ops on a device: arrays in device memory, float32 between any two ops."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prill_runtime.device.machine.base import Device, Pointer
from prill_runtime.device.memory.arena import Arena
from prill_runtime.device.memory.array import (
    BLOCK_THREADS,
    F32,
    Allocation,
    DeviceArray,
    DeviceIds,
    DeviceMemory,
    Indices,
    Operand,
    Weight,
    grid_of,
)
from prill_runtime.device.memory.matrix import DeviceMatrix, is_zero, staging_bytes
from prill_runtime.device.memory.slot import SEQUENCE_DTYPE, CacheView
from prill_runtime.device.ops import experts
from prill_runtime.device.ops import sampler as sampling
from prill_runtime.device.ops.tensor_cores import HEAD_SIZES, LEAST_TILE_ROWS, TensorCores
from prill_runtime.errors import InvalidParameter
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.ops import rotary
from prill_runtime.ops.protocol import Backend, RopeLayout, Yarn
from prill_runtime.quants.layouts import dequantize
from prill_runtime.sampling.sampler import SamplingParams

Held: TypeAlias = CacheView | NDArray[Any]  # keys or values
MODULES: Final = (
    "repack", "embed", "norm", "matvec", "matmul", "rope", "cache", "attention", "attention_decode",
    "softmax", "elementwise", "choose", "sample", "fused", "experts",
)  # fmt: skip
SPLIT_KEYS: Final = 128  # keys that a thread block of attention_split takes
MATVEC_ROWS: Final = 4  # output rows that a thread block of a mat-vec takes
MOST_MATVEC_ROWS: Final = 4  # rows up to which the mat-vec is used, and beyond which the tiled product
TILE_ROWS: Final = 64  # rows and outputs of a tile of that product, which is a thread block's
IDLE: Final = 8  # a product whose tiles occupy less than one multiprocessor in so many goes to the mat-vec
PARTIAL_BYTES: Final = 32 << 20
"""Bytes of attention's partial sums at a time; at least those of one row."""


def partial_sums(rows: int, heads: int, dim: int, reach: int) -> tuple[int, int, int]:
    """Rows that attention over `reach` positions takes at a time, splits of each, bytes of partial sums."""
    splits = -(-reach // SPLIT_KEYS)
    each = 4 * heads * splits * (dim + 2)
    step = max(1, min(rows, PARTIAL_BYTES // each))
    return step, splits, each * step


def most_partial(rows: int, heads: int, dim: int, reach: int) -> int:
    """The most bytes of partial sums for up to `rows` rows over up to `reach` positions."""
    _, _, each = partial_sums(1, heads, dim, reach)
    return min(each * rows, max(each, PARTIAL_BYTES))


class CudaBackend(DeviceMemory, Backend[DeviceArray, DeviceMatrix | DeviceArray, Held]):
    """Backend protocol over one device and one arena.

    Activations are DeviceArrays; a host array is uploaded where one is expected.
    """

    dtype = F32

    def __init__(self, device: Device, arena: Arena, mode: str = "exact") -> None:
        super().__init__(device, arena)
        self.mode = mode
        self.name = f"{device.spec} {mode}"
        self._frequencies: dict[Hashable, DeviceArray] = {}
        self._tensor = TensorCores(self) if mode == "fast" else None
        device.module(*MODULES)

    def weight(self, raw: NDArray[np.uint8], info: TensorInfo) -> DeviceMatrix | DeviceArray:
        """Upload a weight: a vector as float32, a matrix repacked."""
        place = self.place(info)
        if isinstance(place, DeviceArray):
            self.device.upload(place.pointer, dequantize(raw, info.type, info.shape))
            return place
        place.zero = is_zero(raw, info.type)
        room = staging_bytes(info)
        staging = self.allocate(room, "scratch", passing=True)
        place.store(raw, staging.pointer, room)
        self.device.synchronize()
        return place

    def place(self, info: TensorInfo) -> DeviceMatrix | DeviceArray:
        """Allocate a weight's memory."""
        if len(info.shape) == 1:
            return self.empty(*info.shape, purpose="weights")
        return DeviceMatrix(self.arena, info.type, info.shape)

    def is_zero(self, weight: Weight) -> bool:
        return weight.zero if isinstance(weight, DeviceMatrix) else not np.any(np.asarray(weight))

    def embed(self, table: Weight, ids: Indices) -> DeviceArray:
        fields, kind = self.fields(table := self.matrix(table))
        at = self.ids(ids)
        out = self.empty(len(at), table.shape[1])
        args = {"table": fields, "ids": at.pointer, "out": out.pointer, "rows": len(at)}
        self.device.launch(f"embed_{kind}", grid_of(len(at) * fields.pitch), BLOCK_THREADS, args)
        return out

    def _norm(self, kernel: str, x: Operand, weight: Weight, bias: Weight | None, eps: float) -> DeviceArray:
        x, weight = self.on(x), self.on(weight)
        bias = None if bias is None else self.on(bias)
        out = self.empty(*x.shape)
        args = {"x": x.pointer, "weight": weight.pointer, "bias": bias.pointer if bias else 0,
                "residual": 0, "out": out.pointer, "width": x.shape[-1], "eps": eps}  # fmt: skip
        self.device.launch(kernel, (x.size // x.shape[-1],), BLOCK_THREADS, args)
        return out

    def rms_norm(self, x: Operand, weight: Weight, eps: float) -> DeviceArray:
        return self._norm("rms_norm", x, weight, None, eps)

    def layer_norm(self, x: Operand, weight: Weight, bias: Weight, eps: float) -> DeviceArray:
        return self._norm("layer_norm", x, weight, bias, eps)

    def linear(
        self, x: Operand, weight: Weight, bias: Weight | None = None, out: DeviceArray | None = None
    ) -> DeviceArray:
        x = self.on(x)
        fields, kind = self.fields(weight := self.matrix(weight))
        bias = None if bias is None else self.on(bias)
        rows, outputs = x.shape[0], weight.shape[0]
        out = self.empty(rows, outputs) if out is None else out
        # A file that stores float32 is taken to need its precision and range, which half does not have.
        if self._tensor is not None and rows >= LEAST_TILE_ROWS and kind != "f32":
            self._tensor.linear(x, weight, bias.pointer if bias else 0, out)
            return out
        args = {"m": fields, "x": x.pointer, "bias": bias.pointer if bias else 0, "out": out.pointer}
        tiles = -(-outputs // TILE_ROWS), -(-rows // TILE_ROWS)
        # A router's few outputs make few tiles; the mat-vec has a block for 4 of them of each row.
        if rows <= MOST_MATVEC_ROWS or tiles[0] * tiles[1] * IDLE < self.device.multiprocessors:
            threads = min(128, -(-fields.pitch // 32) * 32)
            self.device.launch(f"matvec_{kind}", (-(-outputs // MATVEC_ROWS), rows), threads, args)
        else:
            args["rows"] = rows
            self.device.launch(f"matmul_{kind}", tiles, 256, args)
        return out

    def rope(
        self,
        x: Operand,
        positions: Indices,
        *,
        base: float,
        dim: int,
        layout: RopeLayout,
        factor: float = 1.0,
        **scaling: Any,
    ) -> DeviceArray:
        at = self.ids(positions)
        angles = self.angles(at, base=base, dim=dim, factor=factor, **scaling)
        x = x if isinstance(x, DeviceArray) else self.on(x)
        out = self.empty(*x.shape)
        rows, heads, head_dim = x.shape
        args = {"x": x.pointer, "angles": angles.pointer, "out": out.pointer, "rows": rows, "heads": heads,
                "head_dim": head_dim, "pairs": dim // 2, "x_pitch": x.pitch,
                "neox": int(layout == "neox")}  # fmt: skip
        self.device.launch("rope", grid_of(rows * heads * (head_dim - dim // 2), 128), 128, args)
        return out

    def angles(
        self,
        at: DeviceIds,
        *,
        scale: float = 1.0,
        long: tuple[Weight, int] | None = None,
        freq_factors: Weight | None = None,
        **settings: Any,
    ) -> DeviceArray:
        """Cosines and sines (row, pair, 2), computed once for the positions of a step."""
        late = None if long is None else self.frequencies(freq_factors=long[0], **settings)
        frequencies = self.frequencies(freq_factors=freq_factors, **settings)
        key = (frequencies.pointer, late and late.pointer, scale)
        if key in at.tables:
            return at.tables[key]
        pairs = settings["dim"] // 2
        out = self.empty(len(at), pairs, 2)
        args = {"positions": at.pointer, "frequencies": frequencies.pointer, "out": out.pointer,
                "late": 0 if late is None else late.pointer, "original": 0 if long is None else long[1],
                "scale": scale, "rows": len(at), "pairs": pairs}  # fmt: skip
        self.device.launch("rope_angles", grid_of(len(at) * pairs, 128), 128, args)
        at.tables[key] = out
        return out

    def frequencies(
        self,
        base: float,
        dim: int,
        factor: float = 1.0,
        freq_factors: Weight | None = None,
        yarn: Yarn | None = None,
    ) -> DeviceArray:
        """Radians per position (pair,) of a rotation, in float64; computed on first use and kept."""
        key = (base, dim, factor, None if freq_factors is None else id(freq_factors), yarn)
        theirs = freq_factors is not None and not isinstance(freq_factors, DeviceArray)
        if key not in self._frequencies or theirs:
            divisors = None if freq_factors is None else np.asarray(freq_factors)
            values = rotary.frequencies(base, dim, factor, divisors, yarn)
            allocation = self.allocate(values.nbytes, "scratch")
            self.device.upload(allocation.pointer, values)
            self._frequencies[key] = DeviceArray(self, allocation, (dim // 2, 2))
        return self._frequencies[key]

    def prepare(self, rotations: Iterable[Mapping[str, Any]]) -> None:
        """Compute these frequencies now, so that an idle model holds as much memory as it ever will."""
        for settings in rotations:
            kept = {name: value for name, value in settings.items() if name not in ("scale", "long")}
            self.frequencies(**kept)
            if (long := settings.get("long")) is not None:
                self.frequencies(**{**kept, "freq_factors": long[0]})

    def temper(self, x: Operand, positions: Indices, *, beta: float, original: int) -> DeviceArray:
        x, at = self.on(x), self.ids(positions)
        out = self.empty(*x.shape)
        args = {"x": x.pointer, "positions": at.pointer, "out": out.pointer, "count": x.size,
                "width": x.width, "original": original, "beta": beta}  # fmt: skip
        self.device.launch("temper", grid_of(x.size, 128), 128, args)
        return out

    def softmax(self, x: Operand) -> DeviceArray:
        x = self.on(x)
        out = self.empty(*x.shape)
        args = {"x": x.pointer, "out": out.pointer, "width": x.shape[-1]}
        self.device.launch("softmax", (x.size // x.shape[-1],), BLOCK_THREADS, args)
        return out

    def attention(
        self,
        q: Operand,
        k: Held,
        v: Held,
        *,
        start: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Weight | None = None,
    ) -> DeviceArray:
        """As the protocol says; k and v are views of a DeviceCache, or host arrays."""
        there = None if sinks is None else self.on(sinks)
        how = {"scale": scale, "window": window or 0, "softcap": softcap or 0.0,
               "sinks": 0 if there is None else there.pointer}  # fmt: skip
        if isinstance(k, CacheView):
            if k.start is not None and k.start != start:
                raise InvalidParameter(
                    "attention does not start at the cache's end", expected=k.start, got=start
                )
            return self._attend(q, k.sequence, k.kv_heads, k.reach, k.layer, how)
        assert not isinstance(v, CacheView)
        keys, values = self.upload(k), self.upload(v)
        sequence = self._sequence(keys.pointer, values.pointer, k.shape[1], start)
        return self._attend(q, sequence.pointer, k.shape[0], k.shape[1], 0, how)

    def _sequence(self, keys: Pointer, values: Pointer, capacity: int, length: int) -> Allocation:
        record = np.array([(keys, values, capacity, length, 0, 0, 0)], SEQUENCE_DTYPE)
        return self.upload(record, SEQUENCE_DTYPE)

    def any_reach(self, rows: int, dim: int) -> bool:
        """Whether attention of so many rows takes the same launches wherever in a sequence they are."""
        return self._tensor is not None and rows >= LEAST_TILE_ROWS and dim in HEAD_SIZES

    def _attend(
        self,
        q: Operand,
        sequence: Pointer,
        kv_heads: int,
        reach: int,
        layer: int,
        how: Mapping[str, Any],
    ) -> DeviceArray:
        """Attention of the rows of q over one cache, as many at a time as have room for their partial sums.

        Args:
            reach: positions that the launch has to cover. how: scale, window, softcap and sinks, for kernels.
        """
        q = q if isinstance(q, DeviceArray) else self.on(q)
        rows, heads, dim = q.shape
        if self.any_reach(rows, dim):
            assert self._tensor is not None
            return self._tensor.attend(q, sequence, kv_heads, layer, how)
        out: DeviceArray = q.beside(heads * dim)
        step, splits, nbytes = partial_sums(rows, heads, dim, reach)
        partial = self.allocate(nbytes, "scratch", passing=True)
        for low in range(0, rows, step):
            some = q[low : low + step]
            args = {"sequence": sequence, "q": some.pointer, "partial": partial.pointer,
                    "out": out[low : low + step].pointer, "heads": heads, "kv_heads": kv_heads,
                    "head_dim": dim,
                    "q_pitch": q.pitch, "layer": layer, "splits": splits, "first": low, **how}  # fmt: skip
            self.device.launch("attention_split", (splits, heads, len(some)), 128, args, shared=4 * dim)
            self.device.launch("attention_combine", (heads, len(some)), 128, args)
        return out

    def _elementwise(
        self,
        kernel: str,
        x: Operand,
        y: Operand | None = None,
        out: DeviceArray | None = None,
        **numbers: float,
    ) -> DeviceArray:
        x, y = self.on(x), None if y is None else self.on(y)
        out = self.empty(*x.shape) if out is None else out
        args: Mapping[str, float] = {"x": x.pointer, "y": y.pointer if y else 0, "out": out.pointer,
                                     "count": x.size, **(numbers or {"width": 0, "pitch": 0})}  # fmt: skip
        self.device.launch(kernel, grid_of(x.size), BLOCK_THREADS, args)
        return out

    def swiglu(self, gate: Operand, up: Operand) -> DeviceArray:
        return self._elementwise("swiglu", gate, up)

    def swiglu_clamped(self, gate: Operand, up: Operand, *, limit: float, alpha: float) -> DeviceArray:
        return self._elementwise("swiglu_clamped", gate, up, by=limit, alpha=alpha)

    def geglu(self, gate: Operand, up: Operand) -> DeviceArray:
        return self._elementwise("geglu", gate, up)

    def gelu_tanh(self, x: Operand) -> DeviceArray:
        return self._elementwise("gelu_tanh", x)

    def gelu_erf(self, x: Operand) -> DeviceArray:
        return self._elementwise("gelu_erf", x)

    def scale(self, x: Operand, by: float, out: DeviceArray | None = None) -> DeviceArray:
        return self._elementwise("scale", x, out=out, by=by, alpha=0.0)

    def softcap(self, x: Operand, cap: float, out: DeviceArray | None = None) -> DeviceArray:
        return self._elementwise("softcap", x, out=out, by=cap, alpha=0.0)

    def add(self, a: Operand, b: Operand) -> DeviceArray:
        return self._elementwise("add", a, b)

    def route(self, logits: Operand, *, used: int, normalised: bool) -> DeviceArray:
        return experts.route(self, logits, used, normalised)

    def expert_linear(
        self, x: Operand, weight: Weight, routed: Operand, *, used: int, bias: Weight | None = None
    ) -> DeviceArray:
        return experts.linear(self, x, weight, routed, used, bias, self._tensor)

    def mix(self, x: Operand, routed: Operand) -> DeviceArray:
        return experts.mix(self, x, routed)

    def draw(
        self, logits: Operand, params: SamplingParams, position: int, history: Sequence[int] = ()
    ) -> int:
        """The id that `sampler.sample` draws."""
        return sampling.draw(self, logits, params, position, history)
