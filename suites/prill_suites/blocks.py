"""Is every block type read bit for bit? The engine's weight loading against gguf's, on hard bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from prill_harness.engines.base import Engine
from prill_harness.run.checks import Observer, check
from prill_runtime.errors import MissingCapability, UnsupportedModel
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.quants import layouts as quants
from prill_suites.common import weight_values

BLOCKS, SEED = 512, 20260101
PLAIN = {Type.F32: "<f4", Type.F16: "<f2"}


def hard_bytes(kind: Type) -> NDArray[np.uint8]:
    """(rows, bytes) random blocks, then blocks of one byte value each: every nibble, sign and high bit."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    if size == 2:  # every number the type has
        return np.arange(1 << 16, dtype="<u2")[:, None].view(np.uint8)
    random = np.random.default_rng(SEED).integers(0, 256, (BLOCKS, size), dtype=np.uint8)
    constant = np.repeat(np.arange(256, dtype=np.uint8)[:, None], size, axis=1)
    return np.concatenate([random, constant])


def reference(data: NDArray[np.uint8], kind: Type) -> NDArray[np.float32]:
    """What gguf makes of the same bytes."""
    if kind in PLAIN:
        return np.asarray(data.view(np.dtype(PLAIN[kind])), np.float32)
    with np.errstate(all="ignore"):  # random scales overflow float16 on purpose
        return np.asarray(gguf.quants.dequantize(data, kind), dtype=np.float32)


def wrong_blocks(expected: NDArray[np.float32], got: NDArray[np.float32]) -> NDArray[np.intp]:
    """Indices of blocks that differ in any bit; two NaNs are the same value."""
    bits = expected.view(np.uint32) != got.view(np.uint32)
    return np.flatnonzero((bits & ~(np.isnan(expected) & np.isnan(got))).any(axis=1))


@pytest.mark.parametrize("name", [kind.name for kind in quants.supported_types()])
@check(
    "blocks.dequantize",
    kills=(
        "q4_k_min_sign",
        "q6_k_high_bits",
        "q8_0_scale_bf16",
        "mxfp4_nibbles_interleaved",
        "e8m0_scale_off_by_one",
    ),
)
def test_dequantize(observe: Observer, engine: Engine, name: str) -> None:
    """Every value of every block equals gguf's, bit for bit; the worst block is named."""
    kind = Type[name]
    data, backend = hard_bytes(kind), engine.ops()
    expected = reference(data, kind)
    info = TensorInfo("blocks", expected.shape, kind)
    try:
        with np.errstate(all="ignore"):
            got = weight_values(backend, backend.weight(data.reshape(-1), info)).astype(np.float32)
    except UnsupportedModel as error:
        raise MissingCapability(f"the backend does not read {name}: {error}") from error
    observe.saw(got.size, oracle="gguf.quants.dequantize, bit for bit")
    observe.seed = SEED
    observe.expect(got.shape == expected.shape, f"{name}: expected shape {expected.shape}, got {got.shape}")
    wrong = wrong_blocks(expected, got)
    if wrong.size:
        block = int(wrong[0])
        at = int(np.flatnonzero(expected[block].view(np.uint32) != got[block].view(np.uint32))[0])
        observe.fail(
            f"{name}: {wrong.size} of {len(data)} blocks differ; block {block} value {at}: "
            f"expected {expected[block, at]!r}, got {got[block, at]!r}",
            block_bytes=data[block],
        )
    observe.metric("wrong blocks", wrong.size, equals=0)
    observe.say(f"{name}: {len(data)} blocks, {got.size} values, every bit equal")


@check("blocks.all_types", kills=("block_type_missing",))
def test_all_types(observe: Observer) -> None:
    """Every block type that the gates and lanes name is implemented."""
    wanted = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"}
    wanted |= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "IQ4_NL", "IQ4_XS"}
    have = {kind.name for kind in quants.supported_types()}
    observe.saw(len(wanted), oracle="the list of types the lanes are defined for")
    observe.expect(wanted <= have, f"block types without a dequantiser: {', '.join(sorted(wanted - have))}")
    observe.say(f"{len(have)} block types: {', '.join(sorted(have))}")
