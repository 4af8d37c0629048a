"""Kernels on the emulator against NumPy in float64, on shapes and values chosen to hurt."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_runtime.device.machine import compile, formats
from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.device.memory.arena import Arena
from prill_runtime.device.memory.matrix import FORMATS, DeviceMatrix
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.quants.layouts import dequantize, supported_types

SIZES = {"weights": 8 << 20, "cache": 1 << 20, "activations": 8 << 20, "scratch": 36 << 20, "logits": 1 << 20}
ORACLE = NumpyBackend("float64")
TYPES = sorted(FORMATS)
HALVES = {  # where a block's scales lie, if not at its beginning alone
    T.Q4_1: (0, 2), T.Q5_1: (0, 2), T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q4_K: (0, 2), T.Q5_K: (0, 2),
    T.Q6_K: (208,), T.MXFP4: (),
}  # fmt: skip


def backend(reverse: bool = False, mode: str = "exact") -> CudaBackend:
    device = EmuDevice()
    device.reverse = reverse
    return CudaBackend(device, Arena(device, SIZES, None, "test"), mode)


@pytest.fixture(scope="module")
def ops() -> Iterator[CudaBackend]:
    made = backend()
    yield made
    made.device.close()


def raw_tensor(type: T, rows: int, cols: int, seed: int = 0) -> tuple[NDArray[np.uint8], TensorInfo]:
    """Random bytes of a tensor whose scales are ordinary numbers."""
    weights, nbytes = GGML_QUANT_SIZES[type]
    rng = np.random.default_rng([seed, int(type)])
    if type in (T.F32, T.F16, T.BF16):
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        high = (values.view(np.uint32) >> 16).astype(np.uint16)
        raw = {T.F32: values, T.F16: values.astype(np.float16), T.BF16: high}[type].view(np.uint8).ravel()
    else:
        blocks = rng.integers(0, 256, (rows * cols // weights, nbytes), dtype=np.uint8)
        for at in HALVES.get(type, (0,)):
            scale = (0.01 + 0.05 * rng.random(len(blocks))).astype(np.float16)
            blocks[:, at : at + 2] = scale[:, None].view(np.uint8)
        if type == T.MXFP4:
            blocks[:, 0] = rng.integers(118, 124, len(blocks))  # exponents of its scales
        raw = blocks.ravel()
    return raw, TensorInfo("t", (rows, cols), type)


def nmse(expected: NDArray[np.floating], got: NDArray[np.floating]) -> float:
    return float(np.sum((expected - got) ** 2) / np.sum(expected.astype(np.float64) ** 2))


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_repacked_weights_expand_bit_for_bit(ops: CudaBackend, type: T) -> None:
    """Repacking moves bits: what comes out of the streams is what quants.py reads from the file."""
    raw, info = raw_tensor(type, 5, 512)
    got = ops.download(ops.expand(ops.weight(raw, info)))
    assert np.array_equal(got.view(np.uint32), dequantize(raw, type, info.shape).view(np.uint32))


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_some_rows_of_a_matrix_are_a_matrix(ops: CudaBackend, type: T) -> None:
    """The first, some in between and the last expand to their own rows, in memory that the whole one has."""
    raw, info = raw_tensor(type, 7, 512)
    whole, expected = ops.weight(raw, info), dequantize(raw, type, info.shape)
    assert isinstance(whole, DeviceMatrix)
    for first, rows in ((0, 2), (3, 3), (6, 1)):
        got = ops.download(ops.expand(whole.part(first, rows)))
        assert np.array_equal(got, expected[first : first + rows])


def test_every_type_of_the_runtime_has_kernels() -> None:
    """What the CPU decodes, a device does: no model is refused there for a tensor's type alone."""
    assert list(supported_types()) == TYPES
    assert {type.name.lower() for type in TYPES} == set(formats.VALUES + formats.BLOCKS)


def test_every_exponent_of_mxfp4_expands_bit_for_bit(ops: CudaBackend) -> None:
    """All 256 shared exponents, the subnormal ones and 255 among them, with all 16 codes in both halves."""
    raw = np.zeros((256, 17), np.uint8)
    raw[:, 0], raw[:, 1:] = np.arange(256), np.arange(16) * 16 + (15 - np.arange(16))
    info = TensorInfo("t", (256, 32), T.MXFP4)
    got = ops.download(ops.expand(ops.weight(raw.ravel(), info)))
    assert np.array_equal(got.view(np.uint32), dequantize(raw.ravel(), T.MXFP4, info.shape).view(np.uint32))


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_a_matrix_larger_than_the_staging_arrives_whole(ops: CudaBackend, type: T) -> None:
    """Uploaded two rows at a time, odd last piece included, it is the same matrix."""
    raw, info = raw_tensor(type, 7, 256, seed=1)
    room = 2 * raw.nbytes // 7
    matrix = DeviceMatrix(ops.arena, type, info.shape)
    staging = ops.allocate(room, "scratch")
    matrix.store(raw, staging.pointer, room)
    got = ops.download(ops.expand(matrix))
    assert np.array_equal(got, dequantize(raw, type, info.shape))


@pytest.mark.parametrize("type", [T.F32, T.F16, T.BF16], ids=lambda t: t.name)
@pytest.mark.parametrize("cols", [1, 3, 31, 33, 257])
def test_rows_that_are_no_whole_chunks(ops: CudaBackend, type: T, cols: int) -> None:
    """The last chunk of a row is filled up with zeros and does not leak into the next row."""
    raw, info = raw_tensor(type, 3, cols)
    weight, x = ops.weight(raw, info), np.random.default_rng(3).standard_normal((2, cols)).astype(np.float32)
    assert np.array_equal(ops.download(ops.expand(weight)), dequantize(raw, type, info.shape))
    expected = x.astype(np.float64) @ dequantize(raw, type, info.shape).astype(np.float64).T
    assert nmse(expected, ops.download(ops.linear(x, weight))) < 1e-12


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_products_of_every_format(ops: CudaBackend, type: T, rows: int) -> None:
    """Mat-vec and tiled product of a matrix that fills no grid, with a bias."""
    raw, info = raw_tensor(type, 67, 512, seed=2)
    rng = np.random.default_rng(4)
    x, bias = (rng.standard_normal(n).astype(np.float32) for n in ((rows, 512), 67))
    expected = ORACLE.linear(x.astype(np.float64), ORACLE.weight(raw, info), bias.astype(np.float64))
    assert nmse(expected, ops.download(ops.linear(x, ops.weight(raw, info), bias))) < 1e-12


@pytest.mark.parametrize(("multiprocessors", "kernel"), [(16, "matmul_f32"), (17, "matvec_f32")])
def test_a_product_of_few_tiles_goes_to_the_mat_vec(
    ops: CudaBackend, monkeypatch: pytest.MonkeyPatch, multiprocessors: int, kernel: str
) -> None:
    """As a router is: 7 outputs of 70 rows are two tiles, an eighth of 16 multiprocessors but not of 17."""
    launched, launch = [], ops.device.launch
    monkeypatch.setattr(ops.device, "multiprocessors", multiprocessors)
    monkeypatch.setattr(
        ops.device, "launch", lambda name, *a, **k: (launched.append(name), launch(name, *a, **k))
    )
    raw, info = raw_tensor(T.F32, 7, 96, seed=5)
    x = np.random.default_rng(6).standard_normal((70, 96)).astype(np.float32)
    got = ops.download(ops.linear(x, ops.weight(raw, info)))
    assert kernel in launched
    assert nmse(ORACLE.linear(x.astype(np.float64), ORACLE.weight(raw, info)), got) < 1e-12


def test_zero_matrices_are_seen(ops: CudaBackend) -> None:
    """A matrix never written is zero; one weight at its very end is not."""
    raw, info = raw_tensor(T.Q8_0, 3, 512)
    assert not ops.is_zero(ops.weight(raw, info))
    blank = np.zeros_like(raw)
    assert ops.is_zero(ops.weight(blank, info))
    blank.reshape(-1, 34)[-1] = raw.reshape(-1, 34)[-1]
    assert not ops.is_zero(ops.weight(blank, info))


def test_the_order_of_threads_changes_nothing() -> None:
    """Every op gives the same bits when threads run from last to first: no barrier is missing."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((6, 4, 64)).astype(np.float32)
    k, v = (rng.standard_normal((2, 300, 64)).astype(np.float32) for _ in "kv")
    raw, info = raw_tensor(T.Q4_K, 67, 2048)
    wide = rng.standard_normal((6, 2048)).astype(np.float32)
    results = []
    for reverse in (False, True):
        ops = backend(reverse)
        weight = ops.weight(raw, info)
        results.append([
            ops.download(made)
            for made in (
                ops.rms_norm(wide, wide[0], 1e-5),
                ops.layer_norm(wide, wide[0], wide[1], 1e-5),
                ops.softmax(wide),
                ops.linear(wide, weight),
                ops.linear(wide[:1], weight),
                ops.attention(x, k, v, start=294, scale=0.125),
            )
        ])  # fmt: skip
        ops.device.close()
    for forward, backward in zip(*results, strict=True):
        assert np.isfinite(forward).all()
        assert np.array_equal(forward, backward)


@pytest.mark.parametrize(
    ("start", "rows", "window"), [(0, 1, None), (127, 1, None), (128, 2, None), (250, 3, 130), (5, 1, 3)]
)
def test_attention_across_splits(ops: CudaBackend, start: int, rows: int, window: int | None) -> None:
    """Lengths at, before and behind the border of a split, and windows that begin inside one."""
    rng = np.random.default_rng([start, rows])
    q = rng.standard_normal((rows, 4, 16)).astype(np.float32)
    k, v = (rng.standard_normal((2, start + rows, 16)).astype(np.float32) for _ in "kv")
    wide = [array.astype(np.float64) for array in (q, k, v)]
    expected = ORACLE.attention(*wide, start=start, scale=0.25, window=window)
    got = ops.download(ops.attention(q, k, v, start=start, scale=0.25, window=window))
    assert nmse(expected, got) < 1e-12


def test_rows_stay_where_they_are_until_they_are_needed(ops: CudaBackend) -> None:
    """Slices, parts of rows, gathered and joined rows read as NumPy's do."""
    x = np.arange(4 * 3 * 2 * 5, dtype=np.float32).reshape(4, 30)
    whole = ops.on(x).reshape(-1, 3, 2, 5)
    assert np.array_equal(whole[1:3].copy(), x.reshape(4, 3, 2, 5)[1:3])
    assert np.array_equal(whole[:, 1:3].copy(), x.reshape(4, 3, 2, 5)[:, 1:3])
    assert np.array_equal(ops.on(x)[np.array([3, 0])].copy(), x[[3, 0]])
    assert np.array_equal(np.asarray(np.concatenate([ops.on(x)[1:2], ops.on(x)[3:]])), x[[1, 3]])  # type: ignore[call-overload]


def test_nothing_is_held_once_nobody_looks(ops: CudaBackend) -> None:
    """Activations go back to the arena with the last array that looks at them."""
    held = ops.arena.ledger()["activations"]
    part = ops.on(np.ones((8, 4), np.float32))[2:4]
    assert ops.arena.ledger()["activations"] == held + 128
    del part
    assert ops.arena.ledger()["activations"] == held


def test_a_wait_in_a_header_counts() -> None:
    """Launches of the fused kernels overlap the ones before them, wherever their wait is written; those of a
    file that waits nowhere do not, though the header with the wait's own definition is theirs too."""
    assert {name for name in ("fused", "hooked", "choose", "tensor", "norm") if compile.waits(name)} == {
        "fused",
        "hooked",
        "choose",
    }


def test_a_kernel_beside_one_that_waits_waits() -> None:
    """A file's launches overlap those before them all or none: in such a file every kernel that is written
    out waits before it reads."""
    whole = re.compile(r"^KERNEL\((\w+), \w+, \w+\) \{[^\n]*\n(.*?)^\}", re.M | re.S)
    files = [name for name in compile.names() if compile.waits(name)]
    found = {kernel: "wait_for_previous();" in body for file in files
             for kernel, body in whole.findall(compile.source(file))}  # fmt: skip
    assert {"rope", "rope_angles", "temper", "choose"} <= set(found)
    assert all(found.values()), found
