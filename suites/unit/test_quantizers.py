"""The K quantisers pack what the formats say and lose as little as the formats allow."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prill_fixtures import path, quantizers
from prill_fixtures.quantizers import quantize

K_TYPES = (Type.Q4_K, Type.Q6_K)


def weights(rows: int = 16, columns: int = 512, seed: int = 0) -> NDArray[np.float32]:
    """Half-precision values with rows of very different size, some sub-blocks lopsided."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-3, 2, (rows, 1))
    values[::3, :64] += 2 * np.abs(values[::3, :64]).max()
    return values.astype(np.float16).astype(np.float32)


def nmse(values: NDArray[np.float32], type: Type) -> float:
    decoded = gguf.quants.dequantize(quantize(values, type), type).reshape(values.shape)
    error = values.astype(np.float64) - decoded
    return float((error**2).sum() / (values.astype(np.float64) ** 2).sum())


def decode_q4_k(block: bytes) -> list[float]:
    """One block of 144 bytes, value by value, as the format is described."""
    d, dmin = (float(v) for v in np.frombuffer(block[:4], "<f2"))
    packed, quants = block[4:16], block[16:]
    out = []
    for i in range(256):
        j = i // 32
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
            minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4
        byte = quants[i // 64 * 32 + i % 32]
        q = byte >> 4 if j % 2 else byte & 15
        out.append(d * scale * q - dmin * minimum)
    return out


def decode_q6_k(block: bytes) -> list[float]:
    """One block of 210 bytes, value by value, as the format is described."""
    low, high = block[:128], block[128:192]
    scales, d = np.frombuffer(block[192:208], np.int8), float(np.frombuffer(block[208:], "<f2")[0])
    out = []
    for i in range(256):
        half, quarter, at = i // 128, i // 32 % 4, i % 32
        byte = low[64 * half + 32 * (quarter % 2) + at]
        q = (byte >> 4 if quarter >= 2 else byte & 15) | (high[32 * half + at] >> 2 * quarter & 3) << 4
        out.append(d * int(scales[i // 16]) * (q - 32))
    return out


@pytest.mark.parametrize(("type", "decode"), [(Type.Q4_K, decode_q4_k), (Type.Q6_K, decode_q6_k)])
def test_blocks_decode_alike_in_gguf_and_by_the_description(type: Type, decode: object) -> None:
    """What gguf reads from our blocks is what a plain reading of the format gives, near the values."""
    values = weights()
    packed = quantize(values, type)
    size = gguf.GGML_QUANT_SIZES[type][1]
    assert packed.shape == (16, 2 * size)
    read = gguf.quants.dequantize(packed, type).reshape(-1, 256)
    plain = np.array([decode(bytes(block)) for block in packed.reshape(-1, size)])  # type: ignore[operator]
    np.testing.assert_allclose(read, plain, rtol=1e-5, atol=1e-6 * np.abs(plain).max(1, keepdims=True).max())
    assert nmse(values, type) < {Type.Q4_K: 1e-2, Type.Q6_K: 5e-4}[type]


def test_each_format_is_better_than_the_smaller_one() -> None:
    """On the trained weights, matrix by matrix: Q4_0 > Q4_K > Q6_K > Q8_0 in error."""
    for name in ("llama-tiny", "gpt2-tiny"):
        matrices = [t for t in gguf.GGUFReader(path(name)).tensors if t.data.ndim == 2]
        assert len(matrices) > 15
        for tensor in matrices:
            values = tensor.data[:128].astype(np.float32)
            errors = [nmse(values, type) for type in (Type.Q4_0, Type.Q4_K, Type.Q6_K, Type.Q8_0)]
            assert errors == sorted(errors, reverse=True), f"{name} {tensor.name}: {errors}"
            assert errors[1] < 0.85 * errors[0]
            assert errors[2] < 1e-3


@pytest.mark.parametrize("type", K_TYPES)
def test_values_the_format_holds_come_back(type: Type) -> None:
    """Values on the format's own grid are found again exactly."""
    rng = np.random.default_rng(3)
    if type is Type.Q4_K:
        values = rng.integers(0, 16, (4, 256)).astype(np.float32)
        values[:, ::32], values[:, 1::32] = 0, 15  # every sub-block spans the whole range
        values *= 63 * 2.0**-6
    else:
        values = rng.integers(-32, 32, (4, 256)).astype(np.float32)
        values[:, ::16] = -32
        values *= 128 * 2.0**-9
    decoded = gguf.quants.dequantize(quantize(values, type), type).reshape(values.shape)
    np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize("type", K_TYPES)
@pytest.mark.parametrize("fill", [0.0, 1.0, -1.0, 6.0e-8, -65504.0, 65504.0])
def test_constant_blocks(type: Type, fill: float) -> None:
    """Blocks without any spread give finite values of the right size; zeros stay zeros."""
    values = np.full((1, 256), fill, np.float32)
    decoded = gguf.quants.dequantize(quantize(values, type), type)
    assert np.isfinite(decoded).all()
    if fill == 0 or abs(fill) > 1e-3:
        np.testing.assert_allclose(decoded.reshape(-1), fill, rtol=1e-2)


@pytest.mark.parametrize("type", K_TYPES)
def test_the_search_pays(type: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the search over scales the error is a tenth larger or more."""
    values = weights(64)
    searched = nmse(values, type)
    monkeypatch.setattr(quantizers, "TRIES", 0)
    assert searched < 0.9 * nmse(values, type)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_order_of_summation_does_not_matter(seed: int) -> None:
    """Permuting the values of a sub-block leaves its scale the same to the last bit: the sums are exact."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((4, 256)) * 2.0 ** rng.integers(-12, 12, (4, 256))
    values = values.astype(np.float16).astype(np.float32)
    for sub in (16, 32):
        columns = quantizers._columns(values, sub)
        shuffled = quantizers._columns(rng.permuted(values.reshape(-1, sub), axis=1).reshape(4, 256), sub)
        assert (columns != shuffled).any()
        pairs = zip(quantizers._affine(columns, 15), quantizers._affine(shuffled, 15), strict=True)
        for one, other in (
            *pairs,
            (abs(quantizers._symmetric(columns, 32)), abs(quantizers._symmetric(shuffled, 32))),
        ):
            np.testing.assert_array_equal(one, other)


def test_a_row_that_is_no_whole_number_of_blocks_is_refused() -> None:
    """255 columns do not fit a block of 256, and the message says both numbers."""
    with pytest.raises(ValueError, match=r"256 values in a block, a row has 255"):
        quantize(np.zeros((2, 255), np.float32), Type.Q4_K)
