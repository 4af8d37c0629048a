"""Is every op right on shapes and values chosen to hurt? The engine's backend against float64 twins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cupel_harness.checks import Observer, check
from cupel_harness.compare import nmse
from cupel_harness.engines.base import Engine
from cupel_runtime.ops import Backend
from cupel_suites import ops_twins as twins
from cupel_suites.common import embedded

SEED = 7
BOUND = {"float32": 1e-10, "float64": 1e-22}  # NMSE (VALIDATION.md, ops)
LENGTHS = (1, 31, 32, 33, 255, 257)
SCALES = (1.0, 1e4, 1e-39)  # ordinary, huge, and denormal in float32
FULL_VOCABULARY = 201_088
TWIN = "naive float64 twin"
Array = NDArray[Any]


class Bench:
    """Runs one op of the engine's backend on framed inputs and holds the result to its twin."""

    def __init__(self, backend: Backend, observe: Observer) -> None:
        self.backend, self.observe = backend, observe
        self.random = np.random.default_rng(SEED)
        self.worst, self.cases, self.case = 0.0, 0, ""
        observe.seed = SEED

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """Random values in the backend's own type, so that twin and backend get the same numbers."""
        return (self.random.standard_normal(shape) * scale).astype(self.backend.dtype)

    def hold(self, op: str, *arguments: Any, case: str, **named: Any) -> None:
        """Compare every element of the op's result with the twin's.

        Arrays go in as views of a frame of NaN: a read outside shows in the result, a write in the frame.
        """
        frames = [framed(a) if isinstance(a, np.ndarray) else (a, None) for a in arguments]
        expected = getattr(twins, op)(*map(widened, arguments), **{k: widened(v) for k, v in named.items()})
        got = getattr(self.backend, op)(*(view for view, _ in frames), **named)
        self.observe.saw(got.size, oracle=TWIN)
        what = f"{op} at {case}"
        self.observe.expect(
            got.shape == expected.shape and got.dtype == self.backend.dtype,
            f"{what}: expected {self.backend.dtype} {expected.shape}, got {got.dtype} {got.shape}",
        )
        for number, (given, (view, frame)) in enumerate(zip(arguments, frames, strict=True)):
            if frame is not None:
                intact = np.array_equal(given, view) and border_is_nan(frame)
                self.observe.expect(bool(intact), f"{what}: argument {number} was written to")
                self.observe.expect(
                    not np.shares_memory(got, frame), f"{what}: the result aliases argument {number}"
                )
        error = nmse(expected, got)
        bound = BOUND[self.backend.dtype.name]
        self.observe.expect(error <= bound, f"{what}: NMSE {error:.3g}, at most {bound:.0e}", case=case)
        self.cases += 1
        if error >= self.worst:
            self.worst, self.case = error, case

    def conclude(self) -> None:
        """Record the worst figure and say it."""
        self.observe.metric("worst NMSE", self.worst, at_most=BOUND[self.backend.dtype.name])
        self.observe.say(
            f"{self.cases} cases, {self.observe.observed} values, worst NMSE {self.worst:.2g} at {self.case}"
        )


def widened(value: Any) -> Any:
    """Float arrays in float64; integer arrays as lists; the rest as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return value.astype(np.float64) if value.dtype.kind == "f" else value.tolist()


def framed(array: Array) -> tuple[Array, Array | None]:
    """A copy of a float array inside a border of NaN, and the whole frame."""
    if array.dtype.kind != "f":
        return array, None
    frame = np.full([n + 2 for n in array.shape], np.nan, array.dtype)
    view = frame[tuple(slice(1, -1) for _ in array.shape)]
    view[...] = array
    return view, frame


def border_is_nan(frame: Array) -> bool:
    """Whether no value of the border was overwritten."""
    inner = np.zeros(frame.shape, bool)
    inner[tuple(slice(1, -1) for _ in frame.shape)] = True
    return bool(np.isnan(frame[~inner]).all())


@pytest.fixture
def bench(observe: Observer, engine: Engine) -> Bench:
    return Bench(embedded(engine).backend, observe)


@check("ops.embed", kills=("embed_off_by_one",))
def test_embed(bench: Bench) -> None:
    """Every id gets its own row: first, last, repeated, out of order."""
    for width in LENGTHS:
        ids = np.array([0, 36, 1, 1, 35, 0], dtype=np.int64)
        bench.hold("embed", bench.normal(37, width), ids, case=f"table (37, {width})")
    bench.conclude()


@check("ops.rms_norm", kills=("rms_eps_too_small", "rms_tail_dropped", "norm_weight_offset"))
def test_rms_norm(bench: Bench) -> None:
    """RMSNorm at every length and magnitude; at denormals eps decides alone."""
    for width, rows, scale, eps in product(LENGTHS, (1, 3), SCALES, (1e-5, 1e-6)):
        x, weight = bench.normal(rows, width, scale=scale), bench.normal(width)
        bench.hold("rms_norm", x, weight, eps, case=f"({rows}, {width}) x {scale:g}, eps {eps:g}")
    bench.conclude()


@check("ops.layer_norm", kills=("layer_norm_no_bias", "variance_n_minus_1", "norm_weight_offset"))
def test_layer_norm(bench: Bench) -> None:
    """LayerNorm at every length and magnitude, a row of one value included."""
    for width, rows, scale in product(LENGTHS, (1, 3), SCALES):
        x, weight, bias = bench.normal(rows, width, scale=scale), bench.normal(width), bench.normal(width)
        bench.hold("layer_norm", x, weight, bias, 1e-5, case=f"({rows}, {width}) x {scale:g}")
    bench.conclude()


@check("ops.linear", kills=("linear_bias_dropped", "linear_tail_dropped", "linear_input_in_half"))
def test_linear(bench: Bench) -> None:
    """Matrix products that are not square, of one row, of one column, with bias and without."""
    shapes = ((1, 1, 1), (1, 257, 3), (33, 31, 65), (2, 256, 1), (3, 1, 31), (7, 255, 32))
    for (rows, inner, outer), scale, biased in product(shapes, (1.0, 1e4), (False, True)):
        x, weight = bench.normal(rows, inner, scale=scale), bench.normal(outer, inner)
        bias = (bench.normal(outer),) if biased else ()
        bench.hold("linear", x, weight, *bias, case=f"({rows}, {inner}) by ({outer}, {inner}) x {scale:g}")
    bench.conclude()


def rope_cases() -> Iterator[dict[str, Any]]:
    """Layouts, bases, partial rotation, scaling."""
    for layout, base, (head_dim, dim) in product(
        ("norm", "neox"), (10_000.0, 500_000.0), ((64, 64), (64, 32), (2, 2), (6, 4))
    ):
        yield {"layout": layout, "base": base, "head_dim": head_dim, "dim": dim}
    yield {"layout": "norm", "base": 10_000.0, "head_dim": 64, "dim": 64, "factor": 4.0}
    yield {"layout": "neox", "base": 10_000.0, "head_dim": 8, "dim": 8, "freq_factors": (1.0, 2.0, 5.0, 8.0)}


@check(
    "ops.rope",
    kills=(
        "rope_base_default",
        "rope_pairing",
        "rope_exponent",
        "rope_positions_from_one",
        "rope_scaling_ignored",
    ),
)
def test_rope(bench: Bench) -> None:
    """Rotary embedding in both layouts, on part of a head, scaled, at early and at very late positions."""
    positions = np.array([0, 1, 2, 255, 1023, 131_071], dtype=np.int64)
    for case in rope_cases():
        named, says = dict(case), ", ".join(f"{key} {value}" for key, value in case.items())
        x = bench.normal(len(positions), 3, named.pop("head_dim"))
        if "freq_factors" in named:
            named["freq_factors"] = np.array(named["freq_factors"], dtype=bench.backend.dtype)
        bench.hold("rope", x, positions, case=says, **named)
    bench.conclude()


@check("ops.softmax", kills=("softmax_no_max", "softmax_truncated"))
def test_softmax(bench: Bench) -> None:
    """Softmax with huge values, with masked ones, and flat over a full vocabulary."""
    for width, scale in product(LENGTHS, (1.0, 1e4)):
        x = bench.normal(3, width, scale=scale)
        bench.hold("softmax", x, case=f"(3, {width}) x {scale:g}")
        x[:, 1::2] = -np.inf
        bench.hold("softmax", x, case=f"(3, {width}) x {scale:g}, every second one masked")
    flat = np.zeros((1, FULL_VOCABULARY), bench.backend.dtype)
    bench.hold("softmax", flat, case=f"flat over {FULL_VOCABULARY}")
    bench.conclude()


@check(
    "ops.attention",
    kills=(
        "attention_scale_1_over_d",
        "gqa_interleaved",
        "mask_off_by_one",
        "window_off_by_one",
        "softmax_no_max",
    ),
)
def test_attention(bench: Bench) -> None:
    """Causal attention: grouped heads, odd head counts, caches before the first row, windows, far scores."""
    heads = ((1, 1), (3, 3), (4, 1), (8, 2), (8, 1), (6, 3))
    spans = ((1, 0), (1, 30), (1, 256), (3, 29), (33, 0), (31, 2))
    for (n_heads, kv_heads), (rows, start), window in product(heads, spans, (None, 16)):
        q, length = bench.normal(rows, n_heads, 16), start + rows
        k, v = bench.normal(kv_heads, length, 16), bench.normal(kv_heads, length, 16)
        bench.hold(
            "attention", q, k, v, start=start, scale=0.25, window=window,
            case=f"{n_heads}/{kv_heads} heads, {rows} rows from {start}, window {window}",
        )  # fmt: skip
    # Whole numbers, so that scores up to 3000 are exact and only a missing maximum can overflow.
    q, k = np.zeros((5, 2, 16), bench.backend.dtype), np.zeros((2, 5, 16), bench.backend.dtype)
    q[..., 0], k[..., 0] = 1000, np.arange(-2, 3)
    bench.hold(
        "attention", q, k, bench.normal(2, 5, 16), start=0, scale=1.5, case="scores from -3000 to 3000"
    )
    # One row a tile longer than any tile a backend is likely to use.
    q, k, v = bench.normal(257, 2, 4), bench.normal(1, 257, 4), bench.normal(1, 257, 4)
    bench.hold("attention", q, k, v, start=0, scale=0.5, case="257 rows at once")
    bench.conclude()


@check("ops.swiglu", kills=("gate_up_swapped", "silu_without_gate"))
def test_swiglu(bench: Bench) -> None:
    """SwiGLU at every length and magnitude: large negative gates give 0, not NaN."""
    for width, scale in product(LENGTHS, (1.0, 1e4)):
        gate, up = bench.normal(3, width, scale=scale), bench.normal(3, width)
        bench.hold("swiglu", gate, up, case=f"(3, {width}) x {scale:g}")
    bench.conclude()


@check("ops.gelu_tanh", kills=("gelu_erf",))
def test_gelu_tanh(bench: Bench) -> None:
    """GELU in its tanh form, at every length and magnitude."""
    for width, scale in product(LENGTHS, SCALES):
        bench.hold("gelu_tanh", bench.normal(3, width, scale=scale), case=f"(3, {width}) x {scale:g}")
    bench.conclude()


@check("ops.add", kills=("residual_dropped",))
def test_add(bench: Bench) -> None:
    """The residual sum at every length and magnitude."""
    for width, scale in product(LENGTHS, (1.0, 1e4)):
        bench.hold("add", bench.normal(3, width, scale=scale), bench.normal(3, width), case=f"(3, {width})")
    bench.conclude()
