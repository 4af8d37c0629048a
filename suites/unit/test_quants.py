"""The block decoders against gguf's own, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prill_runtime.errors import InvalidParameter, UnsupportedModel
from prill_runtime.quants.layouts import STRIP_WEIGHTS, BlockFormat, dequantize, supported_types

CONTRACT = (
    "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K MXFP4 IQ4_NL IQ4_XS".split()  # noqa: SIM905
)
TYPES = [GGMLQuantizationType[name] for name in CONTRACT]
by_type = pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
# zero, the smallest subnormal, the largest subnormal, one, the largest, infinity, quiet and signalling NaN
EXTREME_HALVES = [0x0000, 0x0001, 0x03FF, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x7D01]
SCALE_FIELDS = ("d", "dmin", "m")


def expected_bits(raw: NDArray[np.uint8], type: GGMLQuantizationType) -> NDArray[np.uint32]:
    """What gguf decodes, as bit patterns, so that NaN and the sign of zero count too."""
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw.reshape(1, -1), type).reshape(-1).view(np.uint32)


def assert_same(raw: NDArray[np.uint8], type: GGMLQuantizationType) -> None:
    per_block, nbytes = GGML_QUANT_SIZES[type]
    count = raw.size // nbytes * per_block
    got = dequantize(raw, type, (count,)).view(np.uint32)
    want = expected_bits(raw, type)
    assert got.shape == want.shape
    wrong = np.flatnonzero(got != want)
    assert not wrong.size, (
        f"{type.name}: {wrong.size} of {count} weights differ, first in block {wrong[0] // per_block}, "
        f"weight {wrong[0] % per_block}: bytes "
        f"{raw.reshape(-1, nbytes)[wrong[0] // per_block].tobytes().hex()}"
    )


def blocks_of(type: GGMLQuantizationType, count: int, seed: int) -> NDArray[np.uint8]:
    """`count` blocks of random bytes, flat."""
    return np.random.default_rng(seed).integers(0, 256, count * GGML_QUANT_SIZES[type][1], np.uint8)


def test_the_contract_is_covered() -> None:
    """Exactly the promised types have a decoder, in ggml's order."""
    assert supported_types() == tuple(sorted(TYPES))


@by_type
def test_random_blocks_are_bit_exact(type: GGMLQuantizationType) -> None:
    """Every weight of 600 random blocks, which span the strips and hit NaN scales, equals gguf's."""
    assert_same(blocks_of(type, 600, seed=type), type)


@by_type
def test_every_scale_is_bit_exact(type: GGMLQuantizationType) -> None:
    """All combinations of extreme scales: ±zero, subnormal, largest, infinity, quiet and signalling NaN."""
    layout = BlockFormat.registry[type].layout
    names = [name for name in SCALE_FIELDS if name in (layout.names or ())]
    halves = np.array(EXTREME_HALVES + [half | 0x8000 for half in EXTREME_HALVES], "<u2").view("<f2")
    grid = np.stack(np.meshgrid(*[halves] * max(len(names), 1)), -1).reshape(-1, max(len(names), 1))
    raw = blocks_of(type, len(grid), seed=7)
    fields = raw.view(layout)
    for column, name in enumerate(names):
        fields[name] = grid[:, column]
    assert_same(raw, type)


def test_every_exponent_of_mxfp4_is_bit_exact() -> None:
    """All 256 shared exponents, the subnormal ones and 255 among them, with all 16 codes."""
    raw = np.zeros((256, 17), np.uint8)
    raw[:, 0] = np.arange(256)
    raw[:, 1:] = np.arange(16) * 16 + (15 - np.arange(16))
    assert_same(raw.reshape(-1), GGMLQuantizationType.MXFP4)


@pytest.mark.parametrize("type", [GGMLQuantizationType.F16, GGMLQuantizationType.BF16], ids=["F16", "BF16"])
def test_every_half_is_bit_exact(type: GGMLQuantizationType) -> None:
    """All 65,536 bit patterns of the two half-precision types."""
    assert_same(np.arange(65_536, dtype="<u2").view(np.uint8), type)


@by_type
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_block_is_bit_exact(type: GGMLQuantizationType, data: st.DataObject) -> None:
    """One block of arbitrary bytes, shrunk to the simplest on failure."""
    nbytes = GGML_QUANT_SIZES[type][1]
    raw = np.frombuffer(data.draw(st.binary(min_size=nbytes, max_size=nbytes)), np.uint8)
    assert_same(raw, type)


@by_type
def test_shape_and_strips(type: GGMLQuantizationType) -> None:
    """A matrix larger than one strip comes back in its shape, rows in order, as a fresh writable array."""
    per_block, nbytes = GGML_QUANT_SIZES[type]
    rows = STRIP_WEIGHTS // 256 + 3
    raw = blocks_of(type, rows * 256 // per_block, seed=11)
    raw.flags.writeable = False
    got = dequantize(raw, type, (rows, 256))
    assert got.shape == (rows, 256)
    assert got.dtype == np.float32
    assert got.flags.writeable
    assert not np.shares_memory(got, raw)
    last = raw[-256 // per_block * nbytes :]
    assert np.array_equal(got[-1].view(np.uint32), expected_bits(last, type))


def test_quantised_by_gguf_comes_back() -> None:
    """Bytes that gguf's quantiser wrote decode near the weights they were made from: not a mirror test."""
    weights = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32)
    packed = gguf.quantize(weights, GGMLQuantizationType.Q8_0)
    got = dequantize(packed.reshape(-1), GGMLQuantizationType.Q8_0, (4, 256))
    assert 0 < np.abs(got - weights).max() < np.abs(weights).max() / 127


def test_a_type_without_decoder_is_named() -> None:
    """An unknown block format is one sentence that names it."""
    with pytest.raises(UnsupportedModel, match="IQ2_XS") as caught:
        dequantize(np.zeros(74, np.uint8), GGMLQuantizationType.IQ2_XS, (256,))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("shape", "nbytes"), [((32,), 33), ((33,), 34), ((2, 16), 34), ((64,), 34), ((0,), 34)]
)
def test_bytes_must_fit_the_shape(shape: tuple[int, ...], nbytes: int) -> None:
    """Too few bytes, too many, or rows that cut a block are refused."""
    with pytest.raises(InvalidParameter, match="do not fit"):
        dequantize(np.zeros(nbytes, np.uint8), GGMLQuantizationType.Q8_0, shape)


def test_a_layout_of_the_wrong_size_cannot_be_declared() -> None:
    """A block class whose fields do not add up to ggml's block size fails at declaration."""
    with pytest.raises(TypeError, match="a block is 34 bytes"):
        type("Wrong", (BlockFormat,), {}, type=GGMLQuantizationType.Q8_0, layout=[("d", "<f2")])
    assert BlockFormat.registry[GGMLQuantizationType.Q8_0].__name__ == "Q8_0"


@by_type
def test_a_flipped_bit_is_seen(type: GGMLQuantizationType) -> None:
    """The comparison can fail: one bit flipped in a block's last byte changes the decoded weights."""
    # small bytes, so that every scale is finite and not zero
    raw = blocks_of(type, 8, seed=5) % np.uint8(32) + np.uint8(1)
    other = raw.copy()
    other[-1] ^= 0x10
    count = 8 * GGML_QUANT_SIZES[type][0]
    first, second = (dequantize(r, type, (count,)).view(np.uint32) for r in (raw, other))
    assert not np.array_equal(first, second)
