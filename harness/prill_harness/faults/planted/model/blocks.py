"""Faults of decoding quantised blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, around, decode

BLOCKS = ("blocks",)
Q8_0, Q4_0, Q4_K, Q6_K = ((f"{ONE[0]}:{kind}",) for kind in ("q8_0", "q4_0", "q4_k", "q6_k"))


def changed(fields: Any, **values: Any) -> Any:
    """A copy of the blocks' fields with some of them replaced."""
    copy = fields.copy()
    for name, value in values.items():
        copy[name] = value
    return copy


@fault(area="blocks", blames=BLOCKS, models=ONE)
def block_type_missing() -> Iterator[Patch]:
    """MXFP4 has no decoder."""

    def without(registry: Any) -> Any:
        return {kind: block for kind, block in registry.items() if kind.name != "MXFP4"}

    yield Patch("prill_runtime.quants.layouts:BlockFormat.registry", without)


@fault(area="blocks", blames=BLOCKS, models=ONE)
def mxfp4_nibbles_interleaved() -> Iterator[Patch]:
    """The nibbles of an MXFP4 byte are neighbours, where they belong to the two halves of the block."""
    yield decode("MXFP4", lambda o, b: o(b).reshape(-1, 2, 16).swapaxes(1, 2).reshape(-1, 32))


@fault(area="blocks", blames=BLOCKS, models=ONE)
def e8m0_scale_off_by_one() -> Iterator[Patch]:
    """The exponent of an E8M0 scale is one too large."""
    yield Patch(
        "prill_runtime.quants.layouts:_E8M0_HALF", lambda table: np.append(table[1:], np.float32(np.inf))
    )


@fault(area="blocks", blames=BLOCKS, models=ONE)
def e2m1_subnormal_lost() -> Iterator[Patch]:
    """The one subnormal of E2M1, a half, is read as zero."""

    def without(table: Any) -> Any:
        return np.where(np.abs(table) == 1, np.float32(0), table)

    yield Patch("prill_runtime.quants.layouts:_E2M1", without)


@fault(area="blocks", blames=BLOCKS, models=Q4_K)
def q4_k_min_sign() -> Iterator[Patch]:
    """The minima of Q4_K are added where they are subtracted."""
    yield decode("Q4_K", lambda o, b: o(changed(b, dmin=-b["dmin"])))


@fault(area="blocks", blames=BLOCKS, models=Q4_K)
def six_bit_scales_cut() -> Iterator[Patch]:
    """The upper two bits of the scales and minima of groups 4 to 7 are left out."""

    def low_bits(original: Any, packed: Any) -> Any:
        scales, minima = original(packed)
        keep = np.repeat(np.array([63, 15], np.uint8), 4)
        return scales & keep, minima & keep

    yield around("prill_runtime.quants.layouts:_six_bit_pairs", low_bits)


@fault(area="blocks", blames=BLOCKS, models=Q6_K)
def q6_k_high_bits() -> Iterator[Patch]:
    """The high bits of Q6_K go to the neighbouring group."""

    def swapped(original: Any, b: Any) -> Any:
        h = b["h"]
        return original(changed(b, h=((h & 0x33) << 2) | ((h & 0xCC) >> 2)))

    yield decode("Q6_K", swapped)


@fault(area="blocks", blames=BLOCKS, models=Q8_0)
def q8_0_scale_bf16() -> Iterator[Patch]:
    """The scale of Q8_0 is read as bfloat16."""

    def decoded(original: Any, b: Any) -> Any:
        bits = np.ascontiguousarray(b["d"]).view("<u2").astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)[:, None] * b["q"].astype(np.float32)

    yield decode("Q8_0", decoded)


@fault(area="blocks", blames=BLOCKS, models=Q8_0)
def q8_0_unsigned() -> Iterator[Patch]:
    """The weights of Q8_0 are read without their sign."""

    def decoded(original: Any, b: Any) -> Any:
        return b["d"].astype(np.float32)[:, None] * b["q"].astype(np.uint8).astype(np.float32)

    yield decode("Q8_0", decoded)


@fault(area="blocks", blames=BLOCKS, models=Q4_0)
def q4_0_halves_swapped() -> Iterator[Patch]:
    """High nibbles of Q4_0 are the first half of the block, low ones the second."""
    yield decode("Q4_0", lambda o, b: np.roll(o(b), 16, axis=-1))


@fault(area="blocks", blames=BLOCKS, models=Q4_0)
def q4_0_offset_lost() -> Iterator[Patch]:
    """Q4_0 counts from 0 where it counts from -8."""

    def decoded(original: Any, b: Any) -> Any:
        return original(b) + b["d"].astype(np.float32)[:, None] * np.float32(8)

    yield decode("Q4_0", decoded)


@fault(area="blocks", blames=BLOCKS, models=ONE)
def fifth_bit_lost() -> Iterator[Patch]:
    """The fifth bits of Q5_0 and Q5_1 are taken as zero."""
    yield around("prill_runtime.quants.layouts:_five_bits", lambda o, b: o(changed(b, h=0)))


@fault(area="blocks", blames=BLOCKS, models=ONE)
def q3_k_scale_unsigned() -> Iterator[Patch]:
    """The scales of Q3_K lack their offset of 32."""

    def decoded(original: Any, b: Any) -> Any:
        ones = changed(b, s=np.repeat(np.array([0x11, 0xAA], np.uint8), [8, 4]))  # every scale 33, less 32
        return original(b) + original(ones) * np.float32(32)

    yield decode("Q3_K", decoded)


@fault(area="blocks", blames=BLOCKS, models=ONE)
def q2_k_scale_and_min_swapped() -> Iterator[Patch]:
    """Scale and minimum of a Q2_K group are taken from each other's nibble."""
    yield decode("Q2_K", lambda o, b: o(changed(b, s=(b["s"] << 4) | (b["s"] >> 4))))


@fault(area="blocks", blames=BLOCKS, models=ONE)
def f16_subnormals_flushed() -> Iterator[Patch]:
    """Half-precision numbers below the smallest normal one are read as zero."""

    def flushed(original: Any, b: Any) -> Any:
        x = original(b)
        return np.where(np.abs(x) < np.float32(2.0**-14), np.float32(0), x)

    yield decode("F16", flushed)


@fault(area="blocks", blames=BLOCKS, models=ONE)
def bf16_read_as_f16() -> Iterator[Patch]:
    """bfloat16 is read as half precision."""
    yield decode("BF16", lambda o, b: b["x"].view("<f2").astype(np.float32))
