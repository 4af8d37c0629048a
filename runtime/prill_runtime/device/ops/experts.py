"""Mixtures of experts on a device: routing, the experts' products, and their sum."""

from __future__ import annotations

from typing import Final

from prill_runtime.device.memory.array import DeviceArray, DeviceMemory, Operand, Weight, grid_of
from prill_runtime.device.memory.matrix import DeviceMatrix, Matrix
from prill_runtime.device.ops.tensor_cores import LEAST_TILE_ROWS, TensorCores
from prill_runtime.errors import UnsupportedModel

THREADS: Final = 128
NOTHING: Final = Matrix(0, 0, 0, 0, 0, 0, 0, 0)


def route(ops: DeviceMemory, logits: Operand, used: int, normalised: bool) -> DeviceArray:
    """`Backend.route`."""
    x = ops.on(logits)
    out = ops.empty(*x.shape)
    args = {"logits": x.pointer, "out": out.pointer, "experts": x.shape[1], "used": used,
            "normalised": int(normalised)}  # fmt: skip
    ops.device.launch("route", (len(x),), THREADS, args)
    return out


def linear(
    ops: DeviceMemory,
    x: Operand,
    weight: Weight,
    routed: Operand,
    used: int,
    bias: Weight | None,
    tensor: TensorCores | None,
) -> DeviceArray:
    """`Backend.expert_linear`; a bias is of float32, as converters write it. `tensor`: for many rows."""
    count, outs, _ = weight.shape
    held = [_below(ops, each) for each in (weight, bias) if each is not None]
    fields, kind = ops.fields(held[0])
    add, of = (NOTHING, "f32") if bias is None else ops.fields(held[1])
    if of != "f32":
        raise UnsupportedModel("a bias of experts of this type is not implemented", expected="F32", got=of)
    x, routed = ops.on(x), ops.on(routed)
    out = ops.empty(len(x), used, outs)
    if tensor is not None and len(x) >= LEAST_TILE_ROWS and kind != "f32":
        tensor.experts(x, held[0], add, routed, out)
        return out
    args = {"m": fields, "bias": add, "x": x.pointer, "routed": routed.pointer, "out": out.pointer,
            "outs": outs, "experts": count, "used": used, "apart": int(x.ndim == 3)}  # fmt: skip
    threads = min(THREADS, -(-fields.pitch // 32) * 32)
    ops.device.launch(f"experts_{kind}", (outs, len(x) * used), threads, args)
    return out


def mix(ops: DeviceMemory, x: Operand, routed: Operand) -> DeviceArray:
    """`Backend.mix`."""
    x, routed = ops.on(x), ops.on(routed)
    rows, used, width = x.shape
    out = ops.empty(rows, width)
    args = {"x": x.pointer, "routed": routed.pointer, "out": out.pointer, "rows": rows, "width": width,
            "experts": routed.shape[1], "used": used}  # fmt: skip
    ops.device.launch("mix", grid_of(rows * width), 256, args)
    return out


def _below(ops: DeviceMemory, weight: Weight) -> DeviceMatrix | DeviceArray:
    """The rows of all experts, one below the other."""
    return ops.matrix(weight if isinstance(weight, DeviceMatrix) else weight.reshape(-1, weight.shape[-1]))
