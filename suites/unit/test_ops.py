"""Every op of the NumPy backend against a naive float64 twin, all elements, on shapes chosen to hurt."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from prill_runtime.errors import InvalidParameter
from prill_runtime.ops.numpy import BLOCK_ROWS, BLOCK_SIZE, FEW_ROWS, QUERY_ROWS, QUERY_SCORES, NumpyBackend
from prill_runtime.ops.rounded import ROUNDING, RoundedBackend, bf16, f16, q8_0, q8_k

F64 = NDArray[np.float64]
LENGTHS = (1, 31, 32, 33, 255, 257)
SCALES = (1.0, 1e4, 1e-40)  # 1e-40 is denormal in float32
LIMIT = {"float32": 1e-10, "float64": 1e-26}
DTYPES = ("float32", "float64")


@pytest.fixture(params=DTYPES)
def ops(request: pytest.FixtureRequest) -> NumpyBackend:
    return NumpyBackend(request.param)


def draw(ops: NumpyBackend, *shape: int, scale: float = 1.0, seed: int = 0) -> NDArray[Any]:
    """Random values of the backend's dtype; the first three of a large array are exact hard cases."""
    x = np.random.default_rng([seed, *shape]).standard_normal(shape) * scale
    if x.size > 3:
        x.flat[:3] = (scale, -scale, 0.0)
    return x.astype(ops.dtype)


def check(ops: NumpyBackend, got: NDArray[Any], twin: F64) -> None:
    """Same shape, the backend's dtype, every element finite, and NMSE within the dtype's limit."""
    assert got.dtype == ops.dtype
    assert twin.dtype == np.float64
    assert got.shape == twin.shape
    assert got.size > 0
    assert np.isfinite(twin).all()
    power = float(np.sum(twin**2))
    # Denormal results are spaced too coarsely for a relative error; half a step each is the best there is.
    spacing = twin.size * float(np.finfo(ops.dtype).smallest_subnormal) ** 2
    assert float(np.sum((got.astype(np.float64) - twin) ** 2)) <= LIMIT[str(ops.dtype)] * power + 4 * spacing


def f64(x: NDArray[Any]) -> F64:
    return x.astype(np.float64)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 1, 1), (1, 33, 257), (31, 255, 1), (257, 32, 33)])
def test_linear_is_the_sum_of_products(
    ops: NumpyBackend, rows: int, inner: int, outer: int, scale: float
) -> None:
    """y[r, o] = Σ x[r, i] w[o, i] + b[o]: the weight is (out, in), the bias belongs to the output."""
    x, w = draw(ops, rows, inner, scale=scale), draw(ops, outer, inner, seed=1)
    b = draw(ops, outer, scale=scale, seed=2)
    product = np.einsum("ri,oi->ro", f64(x), f64(w))
    check(ops, ops.linear(x, w), product)
    check(ops, ops.linear(x, w, b), product + f64(b))


@pytest.mark.parametrize("outer", [BLOCK_ROWS - 1, BLOCK_ROWS, 3 * BLOCK_ROWS, 3 * BLOCK_ROWS + 1])
@pytest.mark.parametrize(
    ("rows", "inner"), [(2, 7), (FEW_ROWS, 64), (2, 15_625), (2, 15_626), (FEW_ROWS + 1, 64)]
)
def test_linear_of_few_rows_is_the_sum_of_products(
    ops: NumpyBackend, rows: int, inner: int, outer: int
) -> None:
    """A weight taken in blocks loses and doubles no row, where it fills them and where it does not, at the
    largest product that is cut up and beyond it."""
    assert BLOCK_ROWS * 2 * 15_625 == BLOCK_SIZE
    x, w, b = draw(ops, rows, inner), draw(ops, outer, inner, seed=1), draw(ops, outer, seed=2)
    check(ops, ops.linear(x, w, b), f64(x) @ f64(w).T + f64(b))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("width", LENGTHS)
def test_rms_norm_divides_by_the_root_mean_square(ops: NumpyBackend, width: int, scale: float) -> None:
    """Each row by itself, eps inside the root, mean over n."""
    x, w = draw(ops, 3, width, scale=scale), draw(ops, width, seed=1)
    twin = np.array(
        [
            [
                v / math.sqrt(math.fsum(u * u for u in row) / width + 1e-5) * g
                for v, g in zip(row, f64(w), strict=True)
            ]
            for row in f64(x)
        ]
    )
    check(ops, ops.rms_norm(x, w, 1e-5), twin)


def test_norms_see_the_epsilon(ops: NumpyBackend) -> None:
    """Another epsilon gives another result, so the tests above do observe it."""
    x, w = draw(ops, 2, 32, scale=1e-2), draw(ops, 32, seed=1)
    assert not np.allclose(ops.rms_norm(x, w, 1e-5), ops.rms_norm(x, w, 1e-6), rtol=1e-3)
    assert not np.allclose(ops.layer_norm(x, w, w, 1e-5), ops.layer_norm(x, w, w, 1e-6), rtol=1e-3)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("width", LENGTHS)
def test_layer_norm_centres_and_divides(ops: NumpyBackend, width: int, scale: float) -> None:
    """Mean and variance over n of each row, then weight and bias; a mean far from zero does no harm."""
    x = draw(ops, 3, width, scale=scale) + ops.dtype.type(scale)
    w, b = draw(ops, width, seed=1), draw(ops, width, seed=2)
    rows = []
    for row in f64(x):
        mean = math.fsum(row) / width
        variance = math.fsum((v - mean) ** 2 for v in row) / width
        rows.append(
            [
                (v - mean) / math.sqrt(variance + 1e-5) * g + c
                for v, g, c in zip(row, f64(w), f64(b), strict=True)
            ]
        )
    check(ops, ops.layer_norm(x, w, b, 1e-5), np.array(rows))


def naive_rope(
    x: F64, positions: list[int], base: float, dim: int, layout: str, factor: float, factors: F64 | None
) -> F64:
    out = x.copy()
    for row, head, i in itertools.product(range(x.shape[0]), range(x.shape[1]), range(dim // 2)):
        frequency = base ** (-2 * i / dim) / factor / (1.0 if factors is None else factors[i])
        angle = positions[row] * frequency
        a, b = (2 * i, 2 * i + 1) if layout == "norm" else (i, i + dim // 2)
        turned = complex(x[row, head, a], x[row, head, b]) * complex(math.cos(angle), math.sin(angle))
        out[row, head, a], out[row, head, b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("layout", ["norm", "neox"])
@pytest.mark.parametrize(("heads", "head_dim", "dim"), [(1, 2, 2), (3, 10, 10), (8, 16, 6)])
def test_rope_turns_pairs_by_position(
    ops: NumpyBackend, layout: Any, heads: int, head_dim: int, dim: int
) -> None:
    """Pair i turns by position · base^(−2i/dim), divided by both factors; other components pass through."""
    positions = [0, 1, 31, 257, 100_003]
    x = draw(ops, len(positions), heads, head_dim)
    before = x.copy()
    factors = np.linspace(1, 8, dim // 2).astype(ops.dtype)
    for base, factor, each in ((10000.0, 1.0, None), (500000.0, 4.0, factors)):
        got = ops.rope(
            x,
            np.array(positions),
            base=base,
            dim=dim,
            layout=layout,
            factor=factor,
            freq_factors=each,
        )
        twin = naive_rope(f64(x), positions, base, dim, layout, factor, None if each is None else f64(each))
        assert got.dtype == ops.dtype
        # Each element: a float64 angle near 1e5 is itself only good to 1e-11.
        np.testing.assert_allclose(got, twin, atol={"float32": 2e-6, "float64": 1e-10}[str(ops.dtype)])
        check(ops, got[:4], twin[:4])
    assert (x == before).all()


def naive_attention(q: F64, k: F64, v: F64, start: int, scale: float, window: int | None) -> F64:
    rows, heads, dim = q.shape
    out = np.zeros((rows, heads, dim))
    for row, head in itertools.product(range(rows), range(heads)):
        kv = head // (heads // k.shape[0])
        at = start + row
        low = 0 if window is None else max(0, at - window + 1)
        scores = np.array([q[row, head] @ k[kv, j] * scale for j in range(low, at + 1)])
        weights = np.exp(scores - scores.max())
        out[row, head] = weights @ v[kv, low : at + 1] / weights.sum()
    return out.reshape(rows, heads * dim)


@pytest.mark.parametrize("ratio", [1, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 33), (31, 1), (30, 2), (254, 1), (224, 33)])
def test_attention_is_causal_grouped_and_scaled(
    ops: NumpyBackend, start: int, rows: int, kv_heads: int, ratio: int
) -> None:
    """Row i sees keys 0 … start + i; query head h reads cache head h // ratio; with a window fewer."""
    length, dim = start + rows, 5
    q, k = draw(ops, rows, kv_heads * ratio, dim), draw(ops, kv_heads, length, dim, seed=1)
    v = draw(ops, kv_heads, length, dim, seed=2)
    for window in (None, 1, 32):
        got = ops.attention(q, k, v, start=start, scale=dim**-0.5, window=window)
        check(ops, got, naive_attention(f64(q), f64(k), f64(v), start, dim**-0.5, window))


def test_attention_of_a_long_prompt_is_computed_in_blocks(ops: NumpyBackend) -> None:
    """More rows than one block of queries give the same as the naive twin, on both sides of each seam; behind
    as many keys as make blocks smaller, too."""
    for rows, window in (
        (QUERY_ROWS + 3, 7),
        (QUERY_ROWS + 3, None),
        (QUERY_SCORES // QUERY_ROWS + 70, None),
    ):
        q, k, v = draw(ops, rows, 2, 4), draw(ops, 1, rows, 4, seed=1), draw(ops, 1, rows, 4, seed=2)
        got = ops.attention(q, k, v, start=0, scale=0.5, window=window)
        check(ops, got, naive_attention(f64(q), f64(k), f64(v), 0, 0.5, window))


@pytest.mark.parametrize("rows", [QUERY_ROWS, 107, 150, 4 * QUERY_ROWS])
def test_attention_of_twice_the_rows_holds_twice_the_memory_at_once(ops: NumpyBackend, rows: int) -> None:
    """Blocks are cut so that scores never grow faster than the prompt, wherever its length falls."""

    def peak(count: int) -> int:
        q, k = draw(ops, count, 8, 5), draw(ops, 2, count, 5, seed=1)
        ops.attention(q, k, k, start=0, scale=0.5)
        tracemalloc.start()
        ops.attention(q, k, k, start=0, scale=0.5)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(2 * rows) <= 2.1 * peak(rows)


def test_attention_survives_scores_beyond_the_range_of_exp(ops: NumpyBackend) -> None:
    """Scores near 1e8 overflow exp unless the maximum is subtracted; the largest key wins."""
    q, k = draw(ops, 2, 1, 4, scale=1e4), draw(ops, 1, 2, 4, scale=1e4, seed=1)
    v = draw(ops, 1, 2, 4, seed=2)
    got = ops.attention(q, k, v, start=0, scale=0.5)
    check(ops, got, naive_attention(f64(q), f64(k), f64(v), 0, 0.5, None))


@pytest.mark.parametrize("size", [*LENGTHS, 201_088])
def test_softmax_sums_to_one_and_ignores_masked_entries(ops: NumpyBackend, size: int) -> None:
    """exp(x − max)/Σ, also for a flat row, a row of ±1e4, and with −inf entries, which become exactly 0."""
    rows = np.stack([np.zeros(size), draw(ops, size), draw(ops, size, scale=1e4), np.full(size, 1e-40)])
    x = rows.astype(ops.dtype)
    x[1, 1::2] = -np.inf
    shifted = np.exp(f64(x) - f64(x).max(axis=-1, keepdims=True))
    got = ops.softmax(x)
    check(ops, got, shifted / np.array([[math.fsum(row)] for row in shifted]))
    assert (got[1, 1::2] == 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", LENGTHS)
def test_swiglu_gates_with_silu_of_the_first_argument(ops: NumpyBackend, size: int, scale: float) -> None:
    """silu(gate) · up, without overflow where exp(−gate) has none to give."""
    gate, up = draw(ops, 2, size, scale=scale), draw(ops, 2, size, seed=1)

    def silu(g: float) -> float:
        return g / (1 + math.exp(-g)) if g > -700 else 0.0

    twin = np.array([silu(g) * u for g, u in zip(f64(gate).flat, f64(up).flat, strict=True)])
    check(ops, ops.swiglu(gate, up), twin.reshape(gate.shape))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", LENGTHS)
def test_gelu_is_the_tanh_form(ops: NumpyBackend, size: int, scale: float) -> None:
    """The tanh approximation, which is not the erf form: they differ by up to 5e-4."""
    x = draw(ops, 2, size, scale=scale)
    twin = np.array(
        [[v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in r] for r in f64(x)]
    )
    check(ops, ops.gelu_tanh(x), twin)
    erf = 1.5 / 2 * (1 + math.erf(1.5 / math.sqrt(2)))
    assert abs(float(ops.gelu_tanh(np.array([1.5], ops.dtype))[0]) - erf) > 1e-5


@pytest.mark.parametrize("rows", LENGTHS)
def test_embed_and_add_are_exact(ops: NumpyBackend, rows: int) -> None:
    """embed copies row ids[i] bit for bit, first and last rows included; add is one rounding per element."""
    table = draw(ops, 40, 7, scale=1e4)
    ids = np.random.default_rng(rows).integers(0, 40, rows)
    ids[0], ids[-1] = 0, 39
    got = ops.embed(table, ids)
    assert got.dtype == ops.dtype
    assert not np.shares_memory(got, table)
    assert all((got[row] == table[token]).all() for row, token in enumerate(ids))
    check(ops, ops.add(got, got[::-1]), f64(got) + f64(got[::-1]))


def test_an_unknown_precision_is_refused() -> None:
    """Only float32 and float64 exist; the sentence names them."""
    with pytest.raises(InvalidParameter, match="float32 or float64, got 'float16'"):
        NumpyBackend("float16")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter, match="q8_k or single, got 'int4'"):
        RoundedBackend("float32", "int4")  # type: ignore[arg-type]


def test_half_roundings_agree_with_the_formats() -> None:
    """f16 is IEEE half and bf16 is gguf's bfloat16, bit for bit, ties to even; infinities stay infinite."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 64)) * 10.0 ** rng.integers(-6, 5, (64, 64))).astype(np.float32)
    x[0, :6] = (0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf)
    np.testing.assert_array_equal(f16(x), x.astype(np.float16).astype(np.float32))
    kind = GGMLQuantizationType.BF16
    finite = np.where(np.isfinite(x), x, 0)
    np.testing.assert_array_equal(bf16(finite), quants.dequantize(quants.quantize(finite, kind), kind))
    assert bf16(x)[0, 4] == np.inf
    assert f16(np.float32([7e4]))[0] == np.inf


def test_q8_0_activations_agree_with_the_format() -> None:
    """Q8_0 activations are what gguf quantises and dequantises, bit for bit; zero blocks stay zero."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((33, 96)) * 10.0 ** rng.integers(-3, 3, (33, 1))).astype(np.float32)
    x[3] = 0
    kind = GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(q8_0(x), quants.dequantize(quants.quantize(x, kind), kind))


def test_q8_k_activations_map_the_largest_value_to_minus_127() -> None:
    """A naive twin of ggml's block of 256: scale = largest / −127, nearest even, at most 127."""
    x = np.random.default_rng(2).standard_normal((3, 512)).astype(np.float32)
    x[1, 256:] = 0
    for row, got in zip(x, q8_k(x), strict=True):
        for low in (0, 256):
            block = row[low : low + 256]
            largest = block[np.abs(block).argmax()]
            scale = largest / np.float32(-127)
            twin = [min(round(float(v / scale)), 127) * float(scale) if largest else 0.0 for v in block]
            np.testing.assert_allclose(got[low : low + 256], twin, rtol=1e-6)


@pytest.mark.parametrize("kind", sorted(ROUNDING))
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_backends_round_what_they_claim(kind: Any, dtype: Any) -> None:
    """Integer lanes round only what enters a linear; half lanes round every result; exact rounds nothing."""
    plain, rounded = NumpyBackend(dtype), RoundedBackend(dtype, kind)
    entering, leaving = ROUNDING[kind]
    x, w = draw(plain, 3, 40), draw(plain, 8, 40, seed=1)
    np.testing.assert_array_equal(rounded.linear(x, w), leaving(plain.linear(entering(x), w)))
    q = x.reshape(3, 4, 10)
    cache = draw(plain, 2, 3, 10, seed=2)
    turn: dict[str, Any] = {"base": 1e4, "dim": 10, "layout": "norm"}
    pairs = [
        (b.embed(w, np.array([1, 0])), b.rms_norm(x, w[0], 1e-5), b.layer_norm(x, w[0], w[1], 1e-5),
         b.swiglu(x, x), b.gelu_tanh(x), b.add(x, x), b.softmax(x), b.rope(q, np.arange(3), **turn))
        for b in (plain, rounded)
    ]  # fmt: skip
    attended = rounded.attention(q, cache, cache, start=0, scale=0.3)
    np.testing.assert_array_equal(attended, leaving(attended))
    for exactly, got in zip(*pairs, strict=True):
        assert got.dtype == plain.dtype
        np.testing.assert_array_equal(got, leaving(exactly))
    changed = not np.array_equal(rounded.linear(x, w), plain.linear(x, w))
    assert changed == (kind != "exact")
