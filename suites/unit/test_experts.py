"""Mixtures of experts on the emulator against NumPy in float64: many rows by tiles, one row fused."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.device.memory.arena import Arena
from prill_runtime.device.memory.array import DeviceArray
from prill_runtime.device.memory.matrix import FORMATS
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.device.ops.tensor_cores import FULL_TILE
from prill_runtime.device.steps import launches
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.quants.layouts import BlockFormat, dequantize

from .test_kernels import SIZES, backend, nmse, raw_tensor
from .test_tensor import Warpgroups

ORACLE = NumpyBackend("float64")
HALVES = 1e-6  # NMSE of products of halves beside float64
INTEGERS = 1e-8  # beside activations that are in 8 bits there too, but for a few that fall to the other side
FLOAT32 = 1e-11
VALUES = (T.F32, T.F16, T.BF16)  # what activations are not rounded for
# Experts, used, width, inner width, and columns of a router, on either side of what kernels divide.
BORDERS = (
    (255, 15, 32, 32), (256, 16, 32, 32), (3, 2, 95, 64), (3, 2, 97, 64), (2, 1, 992, 32), (2, 1, 1056, 32),
    (3, 3, 32, 320), (4, 4, 32, 288),
)  # fmt: skip
ROUTED = (64, 96, 1020, 1028, 3068, 3076, 4096)


@pytest.fixture(params=["exact", "fast"])
def ops(request: pytest.FixtureRequest) -> Iterator[CudaBackend]:
    made = backend(mode=request.param)
    made.device.module("experts_decode")
    yield made
    made.device.close()


@pytest.fixture(params=[EmuDevice, Warpgroups], ids=["warps", "warpgroups"])
def fast(request: pytest.FixtureRequest) -> Iterator[CudaBackend]:
    """Products of tiles as warps make them, and as the warpgroups of an H100 or H200 do."""
    device = request.param()
    made = CudaBackend(device, Arena(device, SIZES, None, "test"), "fast")
    yield made
    made.device.close()


def matrices(ops: CudaBackend, type: T, experts: int, rows: int, cols: int, seed: int) -> tuple[Any, Any]:
    """The matrices of all experts, on the device and in float64."""
    raw, info = raw_tensor(type, experts * rows, cols, seed)
    info = TensorInfo("t", (experts, rows, cols), info.type)
    return ops.weight(raw, info), ORACLE.weight(raw, info)


def routes(rows: int, experts: int, used: int) -> NDArray[np.float32]:
    """Weights (row, expert): the first expert has every row, the last none; some rows have one fewer."""
    random = np.random.default_rng([rows, experts])
    routed = np.zeros((rows, experts), np.float32)
    for row in range(rows):
        others = 1 + random.permutation(experts - 2)[: used - 1 - (row % 5 == 0)]
        routed[row, [0, *others]] = random.uniform(0.1, 1, 1 + len(others))
    return routed


@pytest.mark.parametrize("type", [T.MXFP4, T.Q8_0, T.F16, T.BF16])
@pytest.mark.parametrize(
    ("rows", "outs", "experts", "used"), [(17, 130, 5, 3), (65, 64, 4, 2), (130, 34, 3, 2)]
)
def test_rows_of_an_expert_are_multiplied_together(
    fast: CudaBackend, type: T, rows: int, outs: int, experts: int, used: int
) -> None:
    """One tile and several, outputs over a tile's; an expert with all rows and one with none."""
    random, cols, tiles = np.random.default_rng(1), 96, "64" if rows * used <= FULL_TILE * experts else "128"
    weight, wide = matrices(fast, type, experts, outs, cols, 3)
    bias = random.standard_normal((experts, outs)).astype(np.float32)
    routed = routes(rows, experts, used)
    launched = []
    launch = fast.device.launch
    fast.device.launch = lambda kernel, *args, **named: (
        launched.append(kernel),
        launch(kernel, *args, **named),
    )  # type: ignore[method-assign, assignment, misc]
    try:
        for shape in ((rows, cols), (rows, used, cols)):
            x = random.standard_normal(shape).astype(np.float32)
            got = fast.download(fast.expert_linear(x, weight, routed, used=used, bias=bias))
            expected = ORACLE.expert_linear(x.astype(float), wide, routed.astype(float), used=used, bias=bias)
            assert nmse(expected, got) < HALVES
            assert not got[::5, used - 1].any()  # what is left over
            assert np.abs(got[1::5, used - 1]).min() > 0
    finally:
        del fast.device.launch
    assert launched.count(f"tensor_experts_{tiles}_{type.name.lower()}") == 2


@pytest.mark.parametrize(
    ("type", "rows", "experts", "used", "kernel", "grid"),
    [
        (T.MXFP4, 16, 4, 2, "experts_mxfp4", (130, 32)),  # too few rows for tiles
        (T.F32, 160, 4, 2, "experts_f32", (130, 320)),  # more precise than halves
        (T.MXFP4, 17, 4, 2, "tensor_experts_64_mxfp4", (2, 5, 1)),
        (T.F16, 80, 4, 2, "tensor_experts_64_f16", (2, 5, 2)),  # 40 rows an expert, on average
        (T.F16, 81, 4, 2, "tensor_experts_128_f16", (2, 5, 1)),
        (T.Q8_0, 129, 4, 2, "tensor_experts_128_q8_0", (2, 5, 2)),
    ],
)
def test_how_a_product_of_experts_is_divided(
    monkeypatch: pytest.MonkeyPatch, type: T, rows: int, experts: int, used: int, kernel: str, grid: Any
) -> None:
    """By single outputs, or tiles of 64 or 128 rows: enough blocks that one expert may have every row, and
    those of one expert more for what is left over."""
    made = backend(mode="fast")
    weight, _ = matrices(made, type, experts, 130, 64, 1)
    launched: dict[str, Any] = {}
    monkeypatch.setattr(made.device, "launch", lambda name, grid, *args, **how: launched.update({name: grid}))
    monkeypatch.setattr(made.device, "module", lambda *names: None)
    made.expert_linear(np.zeros((rows, 64), np.float32), weight, routes(rows, experts, used), used=used)
    assert {name: shape for name, shape in launched.items() if "experts" in name} == {kernel: grid}
    made.device.close()


@pytest.mark.parametrize("type", [T.MXFP4, T.F16])
def test_the_order_of_threads_does_not_matter(fast: CudaBackend, type: T) -> None:
    """Threads from last to first give the same bits: no barrier is missing between copies and products, or
    in the list of an expert's rows."""
    weight, _ = matrices(fast, type, 4, 130, 224, 3)
    x, routed = np.random.default_rng(1).standard_normal((65, 224)).astype(np.float32), routes(65, 4, 2)
    got = []
    for fast.device.reverse in (False, True):  # type: ignore[attr-defined]
        got.append(fast.download(fast.expert_linear(x, weight, routed.copy(), used=2)))
    assert got[0].tobytes() == got[1].tobytes()


def test_a_code_becomes_the_half_that_its_float_rounds_to(fast: CudaBackend) -> None:
    """Every code of MXFP4 with scales within half's range, below it and far below, bit for bit."""
    scales = [0, 1, 90, 100, 101, 102, 103, 104, 112, 113, 127, 140]
    blocks = np.zeros((2 * len(scales), 3), BlockFormat.registry[T.MXFP4].layout)
    blocks["e"] = np.repeat(scales, 2)[:, None]
    blocks["q"] = np.arange(blocks["q"].size).reshape(blocks["q"].shape) * 151 % 256
    info = TensorInfo("t", (2, len(scales), 96), T.MXFP4)
    raw = blocks.view(np.uint8).ravel()
    routed, x = np.ones((96, 2), np.float32), np.eye(96, dtype=np.float32)
    got = fast.download(fast.expert_linear(x, fast.weight(raw, info), routed, used=2))
    floats = dequantize(raw, T.MXFP4, info.shape).transpose(2, 0, 1)
    assert len(np.unique(floats / np.abs(floats).max(axis=0))) > 8
    assert np.array_equal(got, floats.astype(np.float16).astype(np.float32))


def test_the_order_of_rows_is_made_once(fast: CudaBackend) -> None:
    """Two products of one routing read one list: each expert's places, ascending, then what nobody has."""
    routed = fast.on(routes(300, 4, 3))
    first = fast._tensor.order(routed, 3)  # type: ignore[union-attr]
    assert fast._tensor.order(routed, 3) is first  # type: ignore[union-attr]
    got = fast.device.download(first.pointer, (300 * 7,), np.int32)
    host = np.asarray(routed)
    held = []
    for expert in range(4):
        mine = got[expert * 300 : (expert + 1) * 300]
        rows = np.flatnonzero(host[:, expert])
        places = rows * 3 + (host[rows, :expert] != 0).sum(axis=1)
        assert mine.tolist() == [*places, *[-1] * (300 - len(rows))]
        held += places.tolist()
    assert sorted(held + [place for place in got[1200:].tolist() if place >= 0]) == list(range(900))


def bound_of(ops: CudaBackend, type: T) -> float:
    """NMSE that a mixture in matrices of a type may leave."""
    return FLOAT32 if ops.mode == "exact" or type in VALUES else INTEGERS


def rounded(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each 32 values as integers of 8 bits times one scale."""
    blocks = x.reshape(-1, 32)
    step = np.abs(blocks).max(axis=1, keepdims=True) / 127
    return np.asarray((np.rint(blocks / step) * step).reshape(x.shape))


def one_row(
    ops: CudaBackend,
    logits: NDArray[np.float32],
    used: int,
    type: T,
    down: T,
    width: int = 96,
    ffn: int = 160,
    **how: Any,
) -> tuple[Any, Any]:
    """What a mixture adds to a row for these logits of its router: of the kernels and of float64."""
    experts, random = len(logits), np.random.default_rng(2)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    gate, up = (matrices(ops, type, experts, ffn, width, seed) for seed in (1, 2))
    last = matrices(ops, down, experts, width, ffn, 3)
    b_gate, b_up, b_down = draw(experts, ffn), draw(experts, ffn), draw(experts, width)
    x, norm, eps = draw(1, width), 1 + 0.1 * draw(width), 1e-5
    node: Any = SimpleNamespace(router=SimpleNamespace(rows=experts), used=used, **how)
    held = [ops.on(array) for array in (logits[None], x, norm, b_gate, b_up, b_down)]
    at, there, scale, *biases = held
    act = ops.empty(1, used * ffn)
    pointers = tuple(bias.pointer for bias in biases)
    launches.mixture(ops, node, (gate[0], up[0]), pointers[:2], at, there, act, norm=scale.pointer, eps=eps)
    launches.mixture(ops, node, (last[0],), pointers[2:], at, act, there, residual=there)
    wide = x.astype(float)
    h = ORACLE.rms_norm(wide, norm.astype(float), eps)
    whole = ops.mode == "exact"
    h = h if whole or type in VALUES else rounded(h)
    routed = ORACLE.route(logits[None].astype(float), used=used, normalised=how["normalised"])
    parts = [
        ORACLE.expert_linear(h, w[1], routed, used=used, bias=b) for w, b in ((gate, b_gate), (up, b_up))
    ]
    if how["clamp"] is None:
        acted = ORACLE.swiglu(*parts)
    else:
        acted = ORACLE.swiglu_clamped(*parts, limit=how["clamp"][0], alpha=how["clamp"][1])
    acted *= routed[routed != 0][:, None]  # an expert's weight is put on what goes into its last matrix
    acted = acted if whole or down in VALUES else rounded(acted)
    added = ORACLE.expert_linear(acted, last[1], routed, used=used).sum(axis=1) + routed @ b_down
    return added, ops.download(there) - x


@pytest.mark.parametrize("type", [T.MXFP4, T.Q8_0, T.F16])
@pytest.mark.parametrize(
    ("experts", "used", "normalised"), [(1, 1, True), (5, 2, False), (33, 4, True), (16, 16, True)]
)
def test_one_row_through_its_experts(
    ops: CudaBackend, type: T, experts: int, used: int, normalised: bool
) -> None:
    """Clamped or not, softmax over the chosen or all, more experts than a warp has lanes, all of them."""
    logits = np.random.default_rng(experts).standard_normal(experts).astype(np.float32)
    for clamp in (None, (1.5, 1.702)):
        expected, got = one_row(ops, logits, used, type, T.BF16, normalised=normalised, clamp=clamp)
        assert nmse(expected, got) < bound_of(ops, type)


@pytest.mark.parametrize(("experts", "used", "width", "ffn"), BORDERS)
@pytest.mark.parametrize("type", [T.Q8_0, T.F16])
def test_one_row_on_either_side_of_what_kernels_divide(
    ops: CudaBackend, type: T, experts: int, used: int, width: int, ffn: int
) -> None:
    """As many experts, and as many of a row, as there is room for; rows that fill no group of four;
    activations that a block's threads take at once, and more."""
    logits = np.random.default_rng(experts).standard_normal(experts).astype(np.float32)
    stored = T.F16 if width % 32 else type
    expected, got = one_row(ops, logits, used, stored, stored, width, ffn, normalised=True, clamp=None)
    assert nmse(expected, got) < bound_of(ops, stored)


@pytest.mark.parametrize("type", sorted(FORMATS))
def test_one_row_through_matrices_of_every_type(ops: CudaBackend, type: T) -> None:
    """Chunks of 4 to 32 weights, as each type has them, for gate, up and down."""
    logits = np.array([0.5, -1, 2], np.float32)
    expected, got = one_row(ops, logits, 2, type, type, 256, 256, normalised=True, clamp=None)
    assert nmse(expected, got) < bound_of(ops, type)


def test_of_equal_logits_the_lower_ids_are_chosen(ops: CudaBackend) -> None:
    """Ties on the edge: of six equal experts the first four count, and those behind them do not."""
    logits = np.array([0, 1, 1, 1, 1, 1, 1, -1], np.float32)
    expected, got = one_row(ops, logits, 4, T.F16, T.F16, normalised=True, clamp=None)
    other, _ = one_row(
        ops, logits + np.float32([0, 0, 0, 0, 0, 0, 0.01, 0]), 4, T.F16, T.F16, normalised=True, clamp=None
    )
    assert nmse(expected, got) < FLOAT32
    assert nmse(other, got) > 1e-3


def test_logits_that_are_not_numbers_stay_within_memory(ops: CudaBackend) -> None:
    """More experts than are used compare as the largest: the row is NaN, and no other expert is read."""
    logits = np.array([np.nan, 0, np.nan, np.nan, 1], np.float32)
    _, got = one_row(ops, logits, 2, T.F16, T.F16, normalised=True, clamp=None)
    assert np.isnan(got).all()


@pytest.mark.parametrize("cols", ROUTED)
def test_a_router_reads_the_norm(ops: CudaBackend, cols: int) -> None:
    """Fewer columns than threads, no whole number of these, as many as threads hold and more; with a bias."""
    random = np.random.default_rng(cols)
    raw, info = raw_tensor(T.F32, 7, cols)
    x, norm, bias = (random.standard_normal(shape).astype(np.float32) for shape in ((1, cols), cols, 7))
    out: DeviceArray = ops.empty(1, 7)
    held = [ops.on(array) for array in (x, norm, bias)]
    launches.route(ops, ops.weight(raw, info), held[0], out, held[1].pointer, 1e-5, held[2].pointer)  # type: ignore[arg-type]
    h = ORACLE.rms_norm(x.astype(float), norm.astype(float), 1e-5)
    assert nmse(ORACLE.linear(h, ORACLE.weight(raw, info), bias.astype(float)), ops.download(out)) < FLOAT32


def one_row_sizes() -> dict[str, set[int]]:
    """What the tests above divide, by axis; a router's chunks are of 4 weights."""
    experts, used, width, ffn = (set(sizes) for sizes in zip(*BORDERS, strict=True))
    inner = width | {used * ffn for _, used, _, ffn in BORDERS}
    return {"router.chunks": {-(-cols // 4) for cols in ROUTED}, "mixture.outer": width | ffn,
            "mixture.inner": inner, "mixture.experts": experts, "mixture.used": used}  # fmt: skip
