"""Products and attention of a prompt in half precision, in the emulator, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from prill_runtime.device.machine import compile as kernels
from prill_runtime.device.machine import formats
from prill_runtime.device.machine.emulator import EmuDevice

Floats = NDArray[np.float32]
SHARED = {"128x256": 193 << 10, "128x128": 105 << 10, "128x64": 97 << 10}
SCALES = {  # where a block's halves lie
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,),
    "iq4_xs": (0,),
}  # fmt: skip
CHUNK = {"f32": 4, "f16": 8, "bf16": 8, "q8_0": 16}  # weights; 32 in the others
STREAMS = {  # bytes a chunk: high bits, scales; bytes a block of 256
    "f32": (0, 0, 0), "f16": (0, 0, 0), "bf16": (0, 0, 0), "q8_0": (0, 1, 0), "q4_0": (0, 2, 0),
    "q4_1": (0, 4, 0), "q5_0": (4, 2, 0), "q5_1": (4, 4, 0), "q4_k": (0, 2, 4), "q5_k": (4, 2, 4),
    "q6_k": (8, 2, 2), "q2_k": (0, 2, 4), "q3_k": (4, 2, 2), "mxfp4": (0, 1, 0),
    "iq4_nl": (0, 2, 0), "iq4_xs": (0, 2, 2),
}  # fmt: skip


class Warpgroups(EmuDevice):
    """The emulator with the products of an H100 instead of a warp's."""

    def _load(self, name: str) -> Mapping[str, Any]:
        flags = ("-DPRILL_WARPGROUP=1",) if name.startswith("tensor") else ()
        library = ctypes.CDLL(str(kernels.build(name, self.target, flags)))
        functions = {kernel: getattr(library, f"emu_{kernel}") for kernel in kernels.signatures(name)}
        for function in functions.values():
            function.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
        return functions


@dataclass
class Weights:
    """A repacked matrix: the fields of the struct, and the values rounded to half."""

    fields: tuple[int, ...]
    dense: NDArray[np.float64]


@pytest.fixture(scope="module", params=[EmuDevice, Warpgroups], ids=["warps", "warpgroups"])
def device(request: pytest.FixtureRequest) -> Iterator[EmuDevice]:
    device: EmuDevice = request.param()
    device.module("repack", "tensor")
    yield device
    device.close()


def put(device: EmuDevice, array: NDArray[Any]) -> int:
    pointer = device.alloc(max(array.nbytes, 16))
    device.upload(pointer, array)
    return pointer


def weights(device: EmuDevice, kind: str, rows: int, cols: int, rng: np.random.Generator) -> Weights:
    """Random blocks with modest scales, repacked."""
    type = GGMLQuantizationType[kind.upper()]
    if kind in SCALES:
        per, nbytes = GGML_QUANT_SIZES[type]
        raw = rng.integers(0, 256, (rows, cols // per, nbytes), dtype=np.uint8)
        for at in SCALES[kind]:
            raw[..., at : at + 2] = (
                rng.uniform(0.01, 0.05, (*raw.shape[:2], 1)).astype(np.float16).view(np.uint8)
            )
        raw = raw.reshape(rows, -1)
    else:
        raw = gguf.quantize(rng.standard_normal((rows, cols)).astype(np.float32), type).view(np.uint8)
    dense = np.asarray(gguf.dequantize(raw, type), np.float32).reshape(rows, cols)
    pitch = -(-cols // CHUNK.get(kind, 32))
    high, scales, blocks = (rows * pitch * each for each in STREAMS[kind])
    q, h, s, d = (device.alloc(max(n, 16)) for n in (rows * pitch * 16, high, scales, blocks // 8))
    args = {"raw": put(device, raw), "q": q, "h": h, "s": s, "d": d, "rows": rows, "first": 0}
    args |= {"row_bytes": raw.shape[1], "pitch": pitch}
    name = kind if kind not in ("f32", "f16", "bf16") else "plain"
    device.launch(f"repack_{name}", (-(-rows * pitch // 256),), 256, args)
    fields = (q, h, s, d, rows, cols, pitch, cols // 256)
    return Weights(fields, dense.astype(np.float16).astype(np.float64))


def halves(device: EmuDevice, x: Floats) -> tuple[int, int]:
    """The rows in half precision on the device, and their pitch."""
    rows, cols = x.shape
    pitch = -(-cols // 64) * 64
    out = device.alloc(rows * pitch * 2)
    args = {"x": put(device, x), "out": out, "rows": rows, "cols": cols, "pitch": cols, "out_pitch": pitch}
    device.launch("tensor_halves", (-(-rows * pitch // 2048),), 256, args)
    return out, pitch


def product(
    device: EmuDevice, kind: str, tile: str, matrix: tuple[int, ...], x: Floats, bias: Floats,
    splits: int = 1,
) -> Floats:  # fmt: skip
    """One product, its sums joined if blocks shared a tile."""
    outs, (high, wide) = matrix[4], map(int, tile.split("x"))
    data, pitch = halves(device, x)
    steps = -(-pitch // 64 // splits)
    count, splits = len(x) * outs, -(-pitch // 64 // steps)
    extras = {"bias": put(device, bias)}
    out = device.alloc(splits * count * 4)
    args = {
        "m": matrix,
        "x": data,
        "residual": 0,
        "out": out,
        "rows": len(x),
        "x_pitch": pitch,
        "out_pitch": outs,
        "steps": steps,
    }
    grid = (-(-len(x) // wide), -(-outs // high), splits)
    device.launch(f"tensor_{tile}_{kind}", grid, 2 * high, args | extras, SHARED[tile])
    if splits > 1:
        sums, out = out, device.alloc(count * 4)
        args = {"sums": sums, "out": out, "count": count, "outs": outs, "splits": splits}
        device.launch("tensor_join", (-(-count // 256),), 256, args | extras)
    return device.download(out, (len(x), outs), np.float32)


def case(rows: int, outs: int, cols: int, seed: int) -> tuple[np.random.Generator, Floats, Floats]:
    rng = np.random.default_rng(seed)
    x, bias = (rng.standard_normal(n).astype(np.float32) for n in ((rows, cols), outs))
    return rng, x, bias


def assert_close(got: Floats, x: Floats, dense: NDArray[np.float64], bias: Floats) -> None:
    want = x.astype(np.float16).astype(np.float64) @ dense.T + bias
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 1e-6, f"relative error {error:.1e}"


@pytest.mark.parametrize("kind", formats.VALUES + formats.BLOCKS)
def test_every_format_agrees_with_float64(device: EmuDevice, kind: str) -> None:
    """Weights of any format, rounded once to half: float32 sums of 512 products stay within 1e-6."""
    cols = 150 if kind in ("f32", "f16", "bf16") else 512 if kind in SCALES else 160
    rng, x, bias = case(33, 150, cols, 1)
    matrix = weights(device, kind, 150, cols, rng)
    got = product(device, kind, "128x64", matrix.fields, x, bias)
    assert_close(got, x, matrix.dense, bias)


@pytest.mark.parametrize("tile", SHARED)
@pytest.mark.parametrize(("rows", "outs", "splits"), [(1, 128, 1), (31, 1, 3), (255, 130, 1), (257, 64, 2)])
def test_odd_shapes_and_splits(device: EmuDevice, tile: str, rows: int, outs: int, splits: int) -> None:
    """Rows and outputs that fill no tile, columns that fill no step: nothing read or written beside them."""
    rng, x, bias = case(rows, outs, 224, rows)
    matrix = weights(device, "q8_0", outs, 224, rng)
    got = product(device, "q8_0", tile, matrix.fields, x, bias, splits)
    assert_close(got, x, matrix.dense, bias)


@pytest.mark.parametrize("kind", formats.VALUES + formats.BLOCKS)
def test_weights_rounded_beforehand_give_the_same_bits(device: EmuDevice, kind: str) -> None:
    """Expanding on the way and expanding beforehand, on the host, are one computation."""
    rng, x, bias = case(5, 70, 256, 2)
    matrix = weights(device, kind, 70, 256, rng)
    out = put(device, matrix.dense.astype(np.float16))
    there = product(device, kind, "128x64", matrix.fields, x, bias)
    apart = product(device, "f16", "128x64", (out, 0, 0, 0, 70, 256, 32, 1), x, bias)
    assert np.array_equal(there, apart)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("rows", "past", "window"), [(1, 0, 0), (65, 70, 0), (100, 90, 17), (130, 0, 64)])
def test_attention_of_a_prompt_agrees_with_float64(dim: int, rows: int, past: int, window: int) -> None:
    """Grouped heads, a cache begun before, a window; positions past the end hold NaN, never mixed in."""
    device, rng = EmuDevice(), np.random.default_rng(dim + rows)
    device.module("prefill_attention")
    heads, groups, layers, capacity = 4, 2, 2, past + rows + 3
    shape = (layers, groups, capacity, dim)
    keys, values = (
        rng.standard_normal(shape).astype(np.float32),
        rng.standard_normal(shape).astype(np.float32),
    )
    keys[:, :, past + rows :] = values[:, :, past + rows :] = np.nan
    q = rng.standard_normal((rows, heads, dim)).astype(np.float32)
    sequence = np.zeros(1, [("pointers", "<u8", 2), ("numbers", "<i4", 6)])
    sequence["pointers"] = put(device, keys), put(device, values)
    sequence["numbers"][0, :2] = capacity, past
    out, pitch = device.alloc(q.nbytes), heads * dim + 64
    rounded = device.alloc(rows * pitch * 2)
    args = {
        "sequence": put(device, sequence),
        "q": put(device, q),
        "out": out,
        "halves": rounded,
        "rows": rows,
    }
    args |= {"heads": heads, "kv_heads": groups, "q_pitch": heads * dim, "halves_pitch": pitch, "layer": 1}
    args |= {"window": window, "scale": dim**-0.5, "softcap": 0.0, "sinks": 0}
    device.launch(f"prefill_attention_{dim}", (-(-rows // 64), heads), 128, args)
    got = device.download(out, q.shape, np.float32)
    want = np.zeros(q.shape)
    for row, head in np.ndindex(rows, heads):
        seen = slice(max(0, past + row - window + 1) if window else 0, past + row + 1)
        k, v = (each[1, head // 2, seen].astype(np.float64) for each in (keys, values))
        score = k @ q[row, head].astype(np.float64) * dim**-0.5
        weight = np.exp(score - score.max())
        want[row, head] = weight @ v / weight.sum()
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0 < error < 1e-3, f"relative error {error:.1e}"
    halved = device.download(rounded, (rows, pitch), np.uint16)
    assert np.array_equal(halved[:, : heads * dim].reshape(q.shape).view(np.float16), got.astype(np.float16))
    assert (halved[:, heads * dim :] == 0xFFFF).all()
    device.close()
