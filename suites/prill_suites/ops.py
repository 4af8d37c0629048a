"""Is every op right on shapes and values chosen to hurt? The engine's backend against float64 twins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from prill_fixtures import synth
from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.lanes import lane_for
from prill_harness.run.checks import Observer, check
from prill_runtime.errors import MissingCapability, UnsupportedModel
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.quants import layouts as quants
from prill_suites import ops_models, ops_twins
from prill_suites.ops_bench import Bench, bound_of
from prill_suites.ops_shapes import COUNTS, HEAD_SIZES, STORED, WIDTHS, about, attentions, drawn, products

LENGTHS = (1, 31, 32, 33, 255, 257)
SCALES = (1.0, 1e4, 1e-39)  # ordinary, huge, and denormal in float32
FULL_VOCABULARY = 201_088
# Types whose tiles arrive in ways of their own: as they are, by halves of a block, whole, by groups.
BY_KERNEL = ("F16", "Q8_0", "Q4_0", "Q4_K")


@pytest.fixture
def bench(observe: Observer, engine: Engine) -> Bench:
    return Bench(engine, ops_twins, observe)


@check("ops.embed", kills=("embed_off_by_one",))
def test_embed(bench: Bench) -> None:
    """Every id gets its own row: first, last, repeated, out of order."""
    for width, scale in product(LENGTHS, SCALES):
        ids = np.array([0, 36, 1, 1, 35, 0], dtype=np.int64)
        bench.hold(
            "embed", bench.normal(37, width, scale=scale), ids, case=f"table (37, {width}) x {scale:g}"
        )
    for count, width in (*product(COUNTS[:-1], (4, 5)), (COUNTS[-1], 1)):
        ids = bench.random.integers(0, 7, count)
        bench.hold("embed", bench.normal(7, width), ids, case=f"{count} ids of a table (7, {width})")
    bench.conclude()


@check(
    "ops.rms_norm",
    kills=(
        "rms_eps_too_small",
        "rms_tail_dropped",
        "norm_weight_offset",
        "norm_input_clipped",
        "shapes_norm_past_1024",
    ),
)
def test_rms_norm(bench: Bench) -> None:
    """RMSNorm at every length and magnitude; at denormals eps decides alone."""
    ordinary = product(LENGTHS, (1, 3), SCALES, (1e-5, 1e-6))
    for width, rows, scale, eps in (*ordinary, *((width, 2, 1.0, 1e-5) for width in WIDTHS)):
        x, weight = bench.normal(rows, width, scale=scale), bench.normal(width)
        bench.hold("rms_norm", x, weight, eps, case=f"({rows}, {width}) x {scale:g}, eps {eps:g}")
    bench.conclude()


@check(
    "ops.layer_norm",
    kills=("layer_norm_no_bias", "variance_n_minus_1", "norm_weight_offset", "norm_input_clipped"),
)
def test_layer_norm(bench: Bench) -> None:
    """LayerNorm at every length and magnitude, a row of one value included."""
    for width, rows, scale in (*product(LENGTHS, (1, 3), SCALES), *((width, 2, 1.0) for width in WIDTHS)):
        x, weight, bias = bench.normal(rows, width, scale=scale), bench.normal(width), bench.normal(width)
        bench.hold("layer_norm", x, weight, bias, 1e-5, case=f"({rows}, {width}) x {scale:g}")
    bench.conclude()


@check(
    "ops.linear",
    kills=(
        "linear_bias_dropped",
        "linear_tail_dropped",
        "linear_input_in_half",
        "shapes_columns_past_1024",
        "shapes_rows_past_4096",
        "shapes_outputs_past_4096",
        "shapes_odd_rows_past_300",
    ),
)
def test_linear(bench: Bench) -> None:
    """Matrix products that are not square, of one row, of one column, with bias and without."""
    shapes = ((1, 1, 1), (1, 257, 3), (33, 31, 65), (2, 256, 1), (3, 1, 31), (7, 255, 32))
    tiles = ((1, 33, 257), (4, 32, 33), (5, 33, 31), (65, 64, 66))  # about 4, 32 and 64
    for (rows, inner, outer), scale, biased in product(shapes + tiles, SCALES, (False, True)):
        if scale < 1 and rows * inner * outer == 1:
            continue  # one denormal product is rounded more coarsely than any bound
        x, weight = bench.normal(rows, inner, scale=scale), bench.normal(outer, inner)
        bias = (bench.normal(outer),) if biased else ()
        bench.hold("linear", x, weight, *bias, case=f"({rows}, {inner}) by ({outer}, {inner}) x {scale:g}")
    for rows, inner, outer in products(bench.random):
        weight = bench.normal(outer, inner)
        bench.hold(
            "linear", bench.beside(rows, weight), weight, case=f"({rows}, {inner}) by ({outer}, {inner})"
        )
    bench.conclude()


@pytest.mark.parametrize("name", [kind.name for kind in quants.supported_types()])
@check(
    "ops.matvec",
    kills=(
        "linear_tail_dropped",
        "q4_0_halves_swapped",
        "q4_k_min_sign",
        "q6_k_high_bits",
        "q8_0_scale_bf16",
        "fifth_bit_lost",
        "mxfp4_nibbles_interleaved",
        "e8m0_scale_off_by_one",
    ),
)
def test_matvec(bench: Bench, name: str) -> None:
    """A matrix of every block type, times one row and times many, as gguf's own weights give it."""
    kind = Type[name]
    block = int(gguf.GGML_QUANT_SIZES[kind][0])
    inner = (block, 3 * block) if block > 1 else (1, 31, 257)
    small = [shape for shape in product((1, 2, 5, 33), (1, 3, 33, 65), inner) if shape[0] * shape[1] <= 1000]
    wide = [(2, 3, -(-1056 // block) * block)]  # columns past 1,024
    sizes = dict(STORED, blocks=[n * max(block, 64) for n in STORED["blocks"]])
    many = [(s["rows"], s["outer"], s["blocks"]) for s in drawn(bench.random, sizes, 40_000)]
    for rows, outer, width in (*small, *wide, *(many if name in BY_KERNEL else ())):
        raw = ops_models.random_blocks(bench.random, kind, (outer, width))
        plain = np.asarray(gguf.quants.dequantize(raw, kind), np.float64).reshape(outer, width)
        info = TensorInfo("matrix", (outer, width), kind)
        try:
            weight = bench.backend.weight(raw, info)
        except UnsupportedModel as error:
            raise MissingCapability(f"the backend has no products with {name}: {error}") from error
        x = bench.beside(rows, plain)
        bench.hold(
            "linear", x, weight, twin=(x, plain), case=f"({rows}, {width}) by {name} ({outer}, {width})"
        )
    bench.conclude()


def rope_cases() -> Iterator[dict[str, Any]]:
    """Layouts, bases, partial rotation, scaling."""
    for layout, base, (head_dim, dim) in product(
        ("norm", "neox"), (10_000.0, 500_000.0), ((64, 64), (64, 32), (2, 2), (6, 4))
    ):
        yield {"layout": layout, "base": base, "head_dim": head_dim, "dim": dim}
    for layout, head_dim in product(("norm", "neox"), HEAD_SIZES):
        yield {"layout": layout, "base": 10_000.0, "head_dim": head_dim, "dim": head_dim}
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
        "shapes_rope_pairs_past_32",
    ),
)
def test_rope(bench: Bench) -> None:
    """Rotary embedding in both layouts, on part of a head, scaled, at early and at very late positions."""
    positions = np.array([0, 1, 2, 255, 1023, 131_071], dtype=np.int64)
    for case, scale in product(rope_cases(), SCALES):
        named, says = dict(case), ", ".join(f"{key} {value}" for key, value in case.items()) + f" x {scale:g}"
        x = bench.normal(len(positions), 3, named.pop("head_dim"), scale=scale)
        if "freq_factors" in named:
            named["freq_factors"] = np.array(named["freq_factors"], dtype=bench.backend.dtype)
        bench.hold("rope", x, positions, case=says, **named)
    for rows in (*about(128), 301):
        x, positions = bench.normal(rows, 1, 2), np.arange(rows)[::-1].copy()
        bench.hold("rope", x, positions, case=f"{rows} rows", layout="norm", base=10_000.0, dim=2)
    bench.conclude()


@check("ops.softmax", kills=("softmax_no_max", "softmax_truncated", "scores_clipped"))
def test_softmax(bench: Bench) -> None:
    """Softmax with huge values, with masked ones, and flat over a full vocabulary."""
    for width, scale in product(LENGTHS, SCALES):
        x = bench.normal(3, width, scale=scale)
        bench.hold("softmax", x, case=f"(3, {width}) x {scale:g}")
        x[:, 1::2] = -np.inf
        bench.hold("softmax", x, case=f"(3, {width}) x {scale:g}, every second one masked")
    for width in WIDTHS:
        bench.hold("softmax", bench.normal(2, width), case=f"(2, {width})")
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
        "scores_clipped",
        "shapes_head_tail",
        "shapes_head_past_128",
        "shapes_fifth_split",
        "shapes_group_not_power_of_two",
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
    # Odd numbers of cache heads with 4 and 8 query heads each, real dimensions, lengths about 32 and 256.
    # Values are huge, or keys so small that every score is nought: denormal values could not hold a bound.
    grouped = product(((12, 3), (24, 3), (3, 1)), ((1, 31), (1, 32), (1, 254), (2, 255)), (64, 128), SCALES)
    for (n_heads, kv_heads), (rows, start), dim, scale in grouped:
        q, length, small = bench.normal(rows, n_heads, dim), start + rows, scale < 1
        k = bench.normal(kv_heads, length, dim, scale=scale if small else 1.0)
        v = bench.normal(kv_heads, length, dim, scale=1.0 if small else scale)
        bench.hold(
            "attention", q, k, v, start=start, scale=dim**-0.5,
            case=f"{n_heads}/{kv_heads} heads of {dim}, {rows} rows from {start}, x {scale:g}",
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
    for rows, length, kv_heads, group, dim, window in attentions(bench.random):
        k, v = bench.normal(kv_heads, length, dim), bench.normal(kv_heads, length, dim)
        bench.hold(
            "attention", bench.normal(rows, kv_heads * group, dim), k, v,
            start=length - rows, scale=dim**-0.5, window=window,
            case=f"{kv_heads * group}/{kv_heads} heads of {dim}, {rows} rows of {length}, window {window}",
        )  # fmt: skip
    bench.conclude()


@check("ops.swiglu", kills=("gate_up_swapped", "silu_without_gate", "shapes_last_thread_idle"))
def test_swiglu(bench: Bench) -> None:
    """SwiGLU at every length and magnitude: large negative gates give 0, not NaN."""
    for width, scale in product(LENGTHS, SCALES):
        gate, up = bench.normal(3, width, scale=scale), bench.normal(3, width)
        bench.hold("swiglu", gate, up, case=f"(3, {width}) x {scale:g}")
    for count in COUNTS:
        bench.hold("swiglu", bench.normal(1, count), bench.normal(1, count), case=f"(1, {count})")
    bench.conclude()


@check("ops.gelu_tanh", kills=("gelu_erf",))
def test_gelu_tanh(bench: Bench) -> None:
    """GELU in its tanh form, at every length and magnitude."""
    for width, scale in product(LENGTHS, SCALES):
        bench.hold("gelu_tanh", bench.normal(3, width, scale=scale), case=f"(3, {width}) x {scale:g}")
    for count in COUNTS:
        bench.hold("gelu_tanh", bench.normal(1, count), case=f"(1, {count})")
    bench.conclude()


@check("ops.add", kills=("residual_dropped", "denormals_flushed"))
def test_add(bench: Bench) -> None:
    """The residual sum at every length and magnitude."""
    for width, scale, other in product(LENGTHS, SCALES, SCALES):
        a, b = bench.normal(3, width, scale=scale), bench.normal(3, width, scale=other)
        bench.hold("add", a, b, case=f"(3, {width}) x {scale:g} and {other:g}")
    for count in COUNTS:
        bench.hold("add", bench.normal(1, count), bench.normal(1, count), case=f"(1, {count})")
    bench.conclude()


@pytest.mark.parametrize("quant", synth.QUANTS)
@check(
    "ops.decode",
    kills=("gqa_interleaved", "attention_scale_1_over_d", "cache_last_row_not_written", "matrix_transposed"),
    needs=(Capability.GENERATE,),
)
def test_decode(
    observe: Observer, engine: Engine, pytestconfig: pytest.Config, tmp_path: Path, quant: str
) -> None:
    """Whole decoding steps, which an engine may fuse: what it says of its own greedy tokens, on small random
    models of odd shapes, is what the oracle says of them."""
    bound, worst, at, seen = 0.0, 0.0, "", 0
    observe.seed = ops_models.SEED
    random = np.random.default_rng(ops_models.SEED)
    shapes = defaultdict[str, set[int]](set)
    for what, file, length, sizes in ops_models.models(tmp_path, quant):
        for axis, some in sizes.items():
            shapes[axis] |= some
        with (
            open_engine(pytestconfig.getoption("prill_engine"), file) as candidate,
            open_engine("numpy64", file) as oracle,
        ):
            assert isinstance(oracle, Embedded)
            # An engine may compute in the type of the file; what a step's products add up to is measured.
            lane = lane_for(quant, candidate.info.arithmetic)
            for size in (1, length):
                prompt = random.integers(0, ops_models.VOCABULARY, size).tolist()
                done = candidate.generate(prompt, max_tokens=ops_models.TOKENS, ignore_eos=True)
                case = f"{quant}, {what}, prompt of {size}"
                observe.expect(
                    len(done.ids) == ops_models.TOKENS,
                    f"{case}: asked for {ops_models.TOKENS} tokens, got {len(done.ids)}",
                )
                text = [*prompt, *done.ids]
                rows = oracle.logits(text)[size - 1 : -1]
                noise = ops_models.noise(file, lane, text, rows)
                bound = max(bound_of(candidate), lane.ratio * noise)
                expected = ops_models.logprobs(rows)
                chosen = expected[np.arange(len(rows)), list(done.ids)]
                observe.saw(len(rows), oracle="numpy64 on the same file, given the same tokens")
                # The power of the error, over that of the logits about their mean.
                error = float(np.mean((chosen - done.logprobs) ** 2) / np.mean(rows.var(axis=-1)))
                observe.expect(error <= bound, f"{case}: NMSE {error:.3g}, at most {bound:.1e}")
                gap = float(np.max((expected.max(axis=-1) - chosen) ** 2) / np.mean(rows.var(axis=-1)))
                observe.expect(gap <= 4 * bound, f"{case}: a token is {gap:.3g} below the most probable one")
                seen += 1
                if error >= worst:
                    worst, at = error, case
    observe.note(shapes={axis: sorted(some) for axis, some in shapes.items()})
    observe.metric("worst NMSE", worst, at_most=bound)
    observe.say(f"{seen} texts, {observe.observed} tokens as the oracle says, worst NMSE {worst:.2g} at {at}")
