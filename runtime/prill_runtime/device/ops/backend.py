"""The ops on a device, float32 throughout: arrays and launches in, arrays in device memory out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from prill_runtime.device.machine.base import Device, Pointer
from prill_runtime.device.memory.arena import Arena
from prill_runtime.device.memory.array import (
    F32,
    THREADS,
    Block,
    DeviceArray,
    DeviceIds,
    DeviceMemory,
    Indices,
    blocks,
)
from prill_runtime.device.memory.matrix import DeviceMatrix, is_zero, staging_bytes
from prill_runtime.device.memory.slot import SEQUENCE, CacheView
from prill_runtime.device.ops import sampler as sampling
from prill_runtime.device.ops.tensor_cores import HEADS, LEAST, TensorCores
from prill_runtime.errors import InvalidParameter
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.ops import rotary
from prill_runtime.ops.protocol import RopeLayout
from prill_runtime.quants.layouts import dequantize
from prill_runtime.sampling.sampler import SamplingParams

MODULES: Final = (
    "repack", "embed", "norm", "matvec", "matmul", "rope", "cache", "attention", "attention_decode",
    "softmax", "elementwise", "choose", "sample", "fused",
)  # fmt: skip
SPLIT: Final = 128  # keys of one block of attention_split
MATVEC_ROWS: Final = 4  # output rows of one block of a mat-vec
FEW: Final = 4  # so many rows go through the mat-vec, more through the tiled product
PARTIAL_BYTES: Final = 32 << 20
"""Of partial sums of attention at a time; one row's at least."""


def partial_sums(rows: int, heads: int, dim: int, reach: int) -> tuple[int, int, int]:
    """Rows whose partial sums attention takes at a time over so many positions, their splits, their bytes."""
    splits = -(-reach // SPLIT)
    each = 4 * heads * splits * (dim + 2)
    step = max(1, min(rows, PARTIAL_BYTES // each))
    return step, splits, each * step


def most_partial(rows: int, heads: int, dim: int, reach: int) -> int:
    """Most bytes of partial sums for up to so many rows over up to so many positions."""
    _, _, each = partial_sums(1, heads, dim, reach)
    return min(each * rows, max(each, PARTIAL_BYTES))


class CudaBackend(DeviceMemory):
    """Backend protocol over one device and one arena.

    Activations are DeviceArrays; a host array is uploaded where one is expected.
    """

    dtype = F32

    def __init__(self, device: Device, arena: Arena, mode: str = "exact") -> None:
        super().__init__(device, arena)
        self.mode = mode
        self.name = f"{device.spec} {mode}"
        self._frequencies: dict[Any, DeviceArray] = {}
        self._tensor = TensorCores(self) if mode == "fast" else None
        device.module(*MODULES)

    def weight(self, raw: NDArray[np.uint8], info: TensorInfo) -> DeviceMatrix | DeviceArray:
        """A vector as float32, a matrix repacked."""
        place = self.place(info)
        if isinstance(place, DeviceArray):
            self.device.upload(place.pointer, dequantize(raw, info.type, info.shape))
            return place
        place.zero = is_zero(raw, info.type)
        room = staging_bytes(info)
        staging = self.block(room, "scratch", passing=True)
        place.store(raw, staging.pointer, room)
        self.device.synchronize()
        return place

    def place(self, info: TensorInfo) -> DeviceMatrix | DeviceArray:
        """Memory for a weight."""
        if len(info.shape) == 1:
            return self.empty(*info.shape, purpose="weights")
        return DeviceMatrix(self.arena, info.type, info.shape)

    def is_zero(self, weight: Any) -> bool:
        return weight.zero if isinstance(weight, DeviceMatrix) else not np.asarray(weight).any()

    def embed(self, table: Any, ids: Indices) -> DeviceArray:
        fields, kind = self.fields(table := self.matrix(table))
        at = self.ids(ids)
        out = self.empty(len(at), table.shape[1])
        args = {"table": fields, "ids": at.pointer, "out": out.pointer, "rows": len(at)}
        self.device.launch(f"embed_{kind}", blocks(len(at) * fields.pitch), THREADS, args)
        return out

    def _norm(self, kernel: str, x: Any, weight: Any, bias: Any, eps: float) -> DeviceArray:
        x, weight = self.on(x), self.on(weight)
        bias = None if bias is None else self.on(bias)
        out = self.empty(*x.shape)
        args = {"x": x.pointer, "weight": weight.pointer, "bias": bias.pointer if bias else 0,
                "out": out.pointer, "width": x.shape[-1], "eps": eps}  # fmt: skip
        self.device.launch(kernel, (x.size // x.shape[-1],), THREADS, args)
        return out

    def rms_norm(self, x: Any, weight: Any, eps: float) -> DeviceArray:
        return self._norm("rms_norm", x, weight, None, eps)

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float) -> DeviceArray:
        return self._norm("layer_norm", x, weight, bias, eps)

    def linear(
        self, x: Any, weight: Any, bias: Any | None = None, out: DeviceArray | None = None
    ) -> DeviceArray:
        x = self.on(x)
        fields, kind = self.fields(weight := self.matrix(weight))
        bias = None if bias is None else self.on(bias)
        rows, outputs = x.shape[0], weight.shape[0]
        out = self.empty(rows, outputs) if out is None else out
        # Who keeps float32 in a file wants its precision, and its range, which half does not have.
        if self._tensor is not None and rows >= LEAST and kind != "f32":
            self._tensor.linear(x, weight, bias.pointer if bias else 0, out)
            return out
        args = {"m": fields, "x": x.pointer, "bias": bias.pointer if bias else 0, "out": out.pointer}
        if rows <= FEW:
            args["residual"] = 0
            threads = min(128, -(-fields.pitch // 32) * 32)
            self.device.launch(f"matvec_{kind}", (-(-outputs // MATVEC_ROWS), rows), threads, args)
        else:
            args["rows"] = rows
            self.device.launch(f"matmul_{kind}", (-(-outputs // 64), -(-rows // 64)), 256, args)
        return out

    def rope(
        self,
        x: Any,
        positions: Indices,
        *,
        base: float,
        dim: int,
        layout: RopeLayout,
        factor: float = 1.0,
        freq_factors: Any | None = None,
    ) -> DeviceArray:
        at = self.ids(positions)
        angles = self.angles(at, base, dim, factor, freq_factors)
        x = x if isinstance(x, DeviceArray) else self.on(x)
        out = self.empty(*x.shape)
        rows, heads, head_dim = x.shape
        args = {"x": x.pointer, "angles": angles.pointer, "out": out.pointer, "rows": rows, "heads": heads,
                "head_dim": head_dim, "pairs": dim // 2, "x_pitch": x.pitch,
                "neox": int(layout == "neox")}  # fmt: skip
        self.device.launch("rope", blocks(rows * heads * (head_dim - dim // 2), 128), 128, args)
        return out

    def angles(
        self, at: DeviceIds, base: float, dim: int, factor: float, divisors: Any | None
    ) -> DeviceArray:
        """Cosines and sines (row, pair, 2), made once for the positions of a step."""
        key = (base, dim, factor, None if divisors is None else id(divisors))
        if key in at.tables:
            return at.tables[key]
        frequencies = self.frequencies(base, dim, factor, divisors)
        out = self.empty(len(at), dim // 2, 2)
        args = {"positions": at.pointer, "frequencies": frequencies.pointer, "out": out.pointer,
                "rows": len(at), "pairs": dim // 2}  # fmt: skip
        self.device.launch("rope_angles", blocks(len(at) * dim // 2, 128), 128, args)
        at.tables[key] = out
        return out

    def frequencies(
        self, base: float, dim: int, factor: float = 1.0, freq_factors: Any | None = None
    ) -> DeviceArray:
        """Radians a position (pair,) of a rotation, in float64; kept from its first use on."""
        key = (base, dim, factor, None if freq_factors is None else id(freq_factors))
        theirs = freq_factors is not None and not isinstance(freq_factors, DeviceArray)
        if key not in self._frequencies or theirs:
            divisors = None if freq_factors is None else np.asarray(freq_factors)
            values = rotary.frequencies(base, dim, factor, divisors)
            block = self.block(values.nbytes, "scratch")
            self.device.upload(block.pointer, values)
            self._frequencies[key] = DeviceArray(self, block, (dim // 2, 2))
        return self._frequencies[key]

    def prepare(self, rotations: Iterable[Mapping[str, Any]]) -> None:
        """Make these frequencies now, so that an idle model holds what it will hold."""
        for settings in rotations:
            self.frequencies(**settings)

    def softmax(self, x: Any) -> DeviceArray:
        x = self.on(x)
        out = self.empty(*x.shape)
        args = {"x": x.pointer, "out": out.pointer, "width": x.shape[-1]}
        self.device.launch("softmax", (x.size // x.shape[-1],), THREADS, args)
        return out

    def attention(
        self, q: Any, k: Any, v: Any, *, start: int, scale: float, window: int | None = None
    ) -> DeviceArray:
        """As the protocol says; k and v are views of a DeviceCache, or host arrays."""
        if isinstance(k, np.ndarray):
            held = self.upload(k), self.upload(v)
            sequence = self._sequence(held[0].pointer, held[1].pointer, k.shape[1], start)
            return self._attend(q, sequence.pointer, k.shape[0], k.shape[1], 0, scale, window)
        view: CacheView = k
        if view.start is not None and view.start != start:
            raise InvalidParameter(
                "attention does not start at the cache's end", expected=view.start, got=start
            )
        return self._attend(q, view.sequence, view.kv_heads, view.reach, view.layer, scale, window)

    def _sequence(self, keys: Pointer, values: Pointer, capacity: int, length: int) -> Block:
        record = np.array([(keys, values, capacity, length, 0, 0, 0)], SEQUENCE)
        return self.upload(record, SEQUENCE)

    def any_reach(self, rows: int, dim: int) -> bool:
        """Whether the launches of attention are the same wherever in a sequence so many rows stand."""
        return self._tensor is not None and rows >= LEAST and dim in HEADS

    def _attend(
        self,
        q: Any,
        sequence: Pointer,
        kv_heads: int,
        reach: int,
        layer: int,
        scale: float,
        window: int | None,
    ) -> DeviceArray:
        """Rows of q over one cache, so many at a time that their partial sums fit.

        Args:
            reach: positions that the launch has to cover.
        """
        q = q if isinstance(q, DeviceArray) else self.on(q)
        rows, heads, dim = q.shape
        if self.any_reach(rows, dim):
            assert self._tensor is not None
            return self._tensor.attend(q, sequence, kv_heads, layer, scale, window)
        out: DeviceArray = q.beside(heads * dim)
        step, splits, nbytes = partial_sums(rows, heads, dim, reach)
        partial = self.block(nbytes, "scratch", passing=True)
        for low in range(0, rows, step):
            some = q[low : low + step]
            args = {"sequence": sequence, "q": some.pointer, "partial": partial.pointer,
                    "out": out[low : low + step].pointer, "heads": heads, "kv_heads": kv_heads,
                    "head_dim": dim,
                    "q_pitch": q.pitch, "layer": layer, "splits": splits, "window": window or 0,
                    "first": low, "scale": scale}  # fmt: skip
            self.device.launch("attention_split", (splits, heads, len(some)), 128, args, shared=4 * dim)
            self.device.launch("attention_combine", (heads, len(some)), 128, args)
        return out

    def _elementwise(self, kernel: str, x: Any, y: Any | None) -> DeviceArray:
        x, y = self.on(x), None if y is None else self.on(y)
        out = self.empty(*x.shape)
        args: Mapping[str, int] = {"x": x.pointer, "y": y.pointer if y else 0, "out": out.pointer,
                                   "count": x.size, "width": 0, "pitch": 0}  # fmt: skip
        self.device.launch(kernel, blocks(x.size), THREADS, args)
        return out

    def swiglu(self, gate: Any, up: Any) -> DeviceArray:
        return self._elementwise("swiglu", gate, up)

    def gelu_tanh(self, x: Any) -> DeviceArray:
        return self._elementwise("gelu_tanh", x, None)

    def add(self, a: Any, b: Any) -> DeviceArray:
        return self._elementwise("add", a, b)

    def draw(self, logits: Any, params: SamplingParams, position: int, history: Sequence[int] = ()) -> int:
        """The id that `sampler.sample` draws."""
        return sampling.draw(self, logits, params, position, history)
