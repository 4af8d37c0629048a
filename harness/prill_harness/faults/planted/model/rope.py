"""Faults of rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, node, op, option

ROPE = "prill_runtime.ops.numpy:NumpyBackend.rope"
BLAMES = ("q_rope", "k_rope")


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_base_default() -> Iterator[Patch]:
    """The base is 10000 whatever the file says."""

    def wrap(rope: Any) -> Any:
        return lambda self, x, positions, *, base, **rest: rope(self, x, positions, base=10000.0, **rest)

    yield Patch(ROPE, wrap)


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_pairing() -> Iterator[Patch]:
    """Pairs (i, i+d/2) are rotated where the file means (2i, 2i+1)."""

    def wrap(rope: Any) -> Any:
        return lambda self, x, positions, *, layout, **rest: rope(self, x, positions, layout="neox", **rest)

    yield Patch(ROPE, wrap)


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_exponent() -> Iterator[Patch]:
    """Pair i turns by base^(-i) where it is base^(-2i/d)."""

    def rope(original: Any, self: Any, x: Any, positions: Any, *, base: float, dim: int, **rest: Any) -> Any:
        return original(self, x, positions, base=base ** (dim / 2), dim=dim, **rest)

    yield op("rope", rope)


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_positions_from_one() -> Iterator[Patch]:
    """Positions are counted from 1."""
    yield op("rope", lambda o, self, x, positions, **rest: o(self, x, positions + 1, **rest))


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_wrong_way() -> Iterator[Patch]:
    """Pairs are turned the other way."""
    yield op("rope", lambda o, self, x, positions, **rest: o(self, x, -positions, **rest))


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_scaling_ignored() -> Iterator[Patch]:
    """The file's scaling of positions, linear or by frequency, is ignored."""

    def rope(
        original: Any, self: Any, *arguments: Any, factor: Any = 1, freq_factors: Any = None, **rest: Any
    ) -> Any:
        return original(self, *arguments, **rest)

    yield op("rope", rope)


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_ignored() -> Iterator[Patch]:
    """Nothing is rotated."""
    yield op("rope", lambda o, self, x, positions, **rest: x.copy())


@fault(area="rope", blames=("k_rope",), needs=("rope",))
def rope_keys_not_rotated() -> Iterator[Patch]:
    """Queries are rotated, keys are not."""

    def rotate(original: Any, self: Any, p: Any, x: Any, stage: str) -> Any:
        return p.tap(stage, x.copy()) if stage.endswith("k_rope") else original(self, p, x, stage)

    yield node("Rope", rotate)


@fault(area="rope", blames=("state", *BLAMES), needs=("rope",))
def rope_position_restarts() -> Iterator[Patch]:
    """Positions start again at 0 in every chunk."""
    yield op("rope", lambda o, self, x, positions, **rest: o(self, x, positions - positions[0], **rest))


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_late_positions_stuck() -> Iterator[Patch]:
    """Every position past 256 is taken as 256."""
    yield op("rope", lambda o, self, x, positions, **rest: o(self, x, np.minimum(positions, 256), **rest))


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_half_of_head() -> Iterator[Patch]:
    """Only the first half of each head is rotated."""

    def rope(original: Any, self: Any, x: Any, positions: Any, *, dim: int, **rest: Any) -> Any:
        out = original(self, x, positions, dim=dim, **rest)
        out[..., dim // 2 :] = x[..., dim // 2 :]
        return out

    yield op("rope", rope)


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_frequencies_in_half() -> Iterator[Patch]:
    """Frequencies are rounded to half precision, so that late angles drift."""

    def rope(original: Any, self: Any, x: Any, positions: Any, *, base: float, dim: int, **rest: Any) -> Any:
        exact = np.power(float(base), -np.arange(0, dim, 2, dtype=np.float64) / dim)
        rounded = exact.astype(np.float16).astype(np.float64)
        given = rest.pop("freq_factors", None)
        drift = exact / rounded * (1 if given is None else given)
        return original(self, x, positions, base=base, dim=dim, freq_factors=drift, **rest)

    yield op("rope", rope)


@fault(area="rope", blames=BLAMES, needs=("rope",))
def rope_pair_swapped_last_layer() -> Iterator[Patch]:
    """In the last layer one pair of every head is turned as (b, a)."""

    def rotate(original: Any, self: Any, p: Any, x: Any, stage: str) -> Any:
        if not stage.startswith(p.network.layers[-1].at):
            return original(self, p, x, stage)
        order = np.arange(x.shape[-1])
        order[[10, 11]] = 11, 10
        turned = original(self, replace(p, tap=lambda stage, x: x), x[..., order], stage)
        return p.tap(stage, turned[..., order])

    yield node("Rope", rotate)


@fault(area="options", blames=BLAMES, needs=("yarn",))
def yarn_factor_left_out() -> Iterator[Patch]:
    """Cosines and sines lack the attention factor of YaRN."""
    yield option("rope", scale=1.0)


@fault(area="options", blames=BLAMES, needs=("yarn",))
def yarn_bounds_rounded() -> Iterator[Patch]:
    """The bounds of YaRN are rounded outwards where the model keeps them, and kept where it rounds."""
    yield option("rope", yarn=lambda yarn: yarn._replace(truncate=not yarn.truncate))


@fault(area="options", blames=BLAMES, needs=("yarn",))
def yarn_as_linear() -> Iterator[Patch]:
    """Every frequency is divided by the factor, where YaRN leaves the fast ones as they are."""
    yield op("rope", lambda o, self, *given, yarn=None, **how: o(self, *given, **how))


@fault(area="options", blames=BLAMES, needs=("two_bases",))
def second_base_ignored() -> Iterator[Patch]:
    """Layers with a window are turned as the others are, by their base and scaling."""

    def rotate(original: Any, self: Any, p: Any, x: Any, stage: str) -> Any:
        ropes = (layer.attention.rope for layer in p.network.layers)
        return original(next((rope for rope in ropes if not rope.local), self), p, x, stage)

    yield node("Rope", rotate)


@fault(area="options", blames=BLAMES, models=ONE)
def short_divisors_for_all() -> Iterator[Patch]:
    """The divisors of short texts are taken for long ones, too."""
    yield op("rope", lambda o, self, *given, long=None, **how: o(self, *given, **how))
