"""Faults of late positions in the kernels: right until there are many splits, tiles, rows or positions."""

from __future__ import annotations

from collections.abc import Iterator

from prill_harness.faults.planted.device.device import source
from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import LONG


@fault(area="late", blames=("attn",), models=LONG, engine="emu")
def device_late_split_not_rescaled() -> Iterator[Patch]:
    """Splits of keys from 512 on are not brought to the common maximum when they are joined."""
    factor = "expf(parts[s * (dim + 2)] - top)"
    yield source("attention", factor, f"(s < 4 ? {factor} : 1.0f)")


@fault(area="late", blames=("attn",), models=LONG, engine="emu")
def device_late_splits_left_out() -> Iterator[Patch]:
    """No more than four splits of keys are joined."""
    yield source("attention", "min(position / SPLIT, a.splits - 1)", "min(position / SPLIT, 3)")


@fault(area="late", blames=("attn",), models=LONG, engine="emu")
def device_late_rows_unmasked() -> Iterator[Patch]:
    """Rows of a prompt from the 512th on see the row after them too."""
    yield source(
        "attention",
        "high = min(split * SPLIT + SPLIT, position + 1);",
        "high = min(split * SPLIT + SPLIT, position + 1 + (a.first + row >= 512));",
    )


@fault(area="late", blames=("attn",), models=LONG, engine="emu")
def device_late_append_wraps() -> Iterator[Patch]:
    """The place of a new key has nine bits, so that position 512 overwrites the first."""
    yield source("cache", "at = a.sequence->length + row;", "at = (a.sequence->length + row) & 511;")


@fault(area="late", blames=("q_rope", "k_rope"), models=LONG, engine="emu")
def device_late_position_of_nine_bits() -> Iterator[Patch]:
    """A position has nine bits when its angles are computed."""
    yield source("rope", "turn_of(a.positions[i / a.pairs],", "turn_of(a.positions[i / a.pairs] & 511,")


@fault(area="late", blames=("attn",), models=LONG, engine="emu")
def device_late_tile_unmasked() -> Iterator[Patch]:
    """On tensor cores rows of a prompt from the 512th on see eight rows after them too."""
    yield source(
        "prefill_attention",
        "if (at > position || at < first)",
        "if (at > position + (mine + 8 * e >= 512 ? 8 : 0) || at < first)",
    )


@fault(area="late", blames=("generate",), models=LONG, engine="emu")
def device_late_decode_forgets() -> Iterator[Patch]:
    """A captured step at position 512 or later does not see the first eight keys."""
    yield source(
        "attention_decode",
        "visible = a.window ? max(position - a.window + 1, 0) : 0;",
        "visible = a.window ? max(position - a.window + 1, 0) : position < 512 ? 0 : 8;",
    )
