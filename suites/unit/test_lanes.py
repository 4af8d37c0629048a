"""Lanes: who is held to which bound, and that the bounds part clean engines from planted faults."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.numbers import lanes
from prill_harness.numbers.lanes import Figures, LogitTally
from prill_harness.tokens.golden import forced
from prill_runtime.errors import EngineError, UnsupportedModel
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.ops.protocol import Array
from prill_runtime.run.model import Model

from .tiny_gguf import tiny

FLOOR = Figures(
    nmse=1e-12,
    kl_mean=1e-13,
    kl_p99=1e-12,
    kl_max=2e-12,
    dlogprob_max=1e-6,
    top1=1.0,
    top5=1.0,
    worst_rank=1,
    buckets={"1-16": 1e-12, "17-64": 2e-12},
    positions=1000,
)


@pytest.mark.parametrize(
    ("kind", "arithmetic", "name", "activations"),
    [
        ("q4_0", "float32", "exact", "f32"),
        ("f16", "float64", "exact", "f32"),
        ("F16", "half", "f16", "f16"),
        ("f32", "half", "f16", "f16"),
        ("bf16", "unknown", "bf16", "bf16"),
        ("q4_0", "int8", "q4_0", "q8_0"),
        ("Q4_K", "int8", "q4_k", "q8_k"),
        ("mxfp4", "int8", "mxfp4", "q8_0"),
        ("iq4_nl", "int8", "iq4_nl", "q8_0"),
        ("iq4_xs", "int8", "iq4_xs", "q8_k"),
    ],
)
def test_the_lane_follows_type_and_arithmetic(
    kind: str, arithmetic: str, name: str, activations: str
) -> None:
    """float32 engines are exact on any file; an engine that does not say gets its file's lane."""
    lane = lanes.lane_for(kind, arithmetic)
    assert (lane.name, lane.activations) == (name, activations)


def test_a_type_without_a_lane_is_refused() -> None:
    """No lane is made up for an unknown type."""
    with pytest.raises(UnsupportedModel, match="no lane"):
        lanes.lane_for("i32", "half")


def test_bounds_are_ratio_times_floor() -> None:
    """Quadratic figures take the ratio, linear ones its root, agreement a Poisson allowance."""
    bound = lanes.bounds(lanes.EXACT, FLOOR)
    assert bound.nmse == pytest.approx(1e-10)
    assert bound.dlogprob_max == pytest.approx(1e-5)
    assert bound.buckets == pytest.approx({"1-16": 1e-10, "17-64": 2e-10})
    assert bound.worst_rank == 2
    assert bound.top1 == pytest.approx(1 - lanes.poisson_upper(5.0) / 1000)


@pytest.mark.parametrize("name", ["nmse", "kl_p99", "kl_max", "dlogprob_max", "worst_rank", "top1", "top5"])
def test_every_gated_figure_breaks_alone(name: str) -> None:
    """Each figure, and it alone, is reported when it alone is out of bound; the floor itself breaks none."""
    bound = lanes.bounds(lanes.EXACT, FLOOR)
    assert lanes.broken(FLOOR, bound) == []
    bad = {name: 0.5 if name.startswith("top") else getattr(bound, name) * 1.01}
    figures = Figures(**{field: getattr(FLOOR, field) for field in FLOOR.__slots__} | bad)
    assert [row[0] for row in lanes.broken(figures, bound)] == [name]


def test_a_late_bucket_breaks_alone_and_the_mean_does_not() -> None:
    """One bucket out of bound is named; a mean out of bound only informs; NaN is out of every bound."""
    bound = lanes.bounds(lanes.EXACT, FLOOR)
    values = {field: getattr(FLOOR, field) for field in FLOOR.__slots__}
    late = Figures(**values | {"buckets": {"1-16": 1e-12, "17-64": 1e-6}})
    assert [row[0] for row in lanes.broken(late, bound)] == ["kl_max[17-64]"]
    assert lanes.broken(Figures(**values | {"kl_mean": 1.0}), bound) == []
    assert lanes.broken(Figures(**values | {"nmse": math.nan}), bound)


def test_a_bucket_the_floor_never_reached_still_has_a_bound() -> None:
    """Positions beyond the floor's are held to its widest bucket, not let through."""
    values = {field: getattr(FLOOR, field) for field in FLOOR.__slots__}
    beyond = Figures(**values | {"buckets": {"257+": 1e-3}})
    assert [row[0] for row in lanes.broken(beyond, lanes.bounds(lanes.EXACT, FLOOR))] == ["kl_max[257+]"]


@pytest.mark.parametrize(("mean", "count"), [(0.0, 0), (0.0005, 0), (0.01, 1), (1.0, 5), (5.0, 13)])
def test_poisson_upper_by_table(mean: float, count: int) -> None:
    """99.9 % quantiles of the Poisson distribution, from its table."""
    assert lanes.poisson_upper(mean) == count


@given(st.floats(0, 2000), st.floats(0, 10))
def test_poisson_upper_grows_with_the_mean(mean: float, more: float) -> None:
    """A noisier lane never has a smaller budget, across the switch to the normal bound too."""
    assert math.floor(mean) <= lanes.poisson_upper(mean) <= lanes.poisson_upper(mean + more) + 1


def test_expected_flips_by_hand() -> None:
    """An exact tie flips half the time; a gap of the largest explained size one time in 31,574."""
    assert lanes.expected_flips(np.array([0.0]), 1.0) == pytest.approx(0.5)
    assert lanes.expected_flips(np.array([1.0]), 1.0) == pytest.approx(1 / 31574, rel=1e-3)
    assert lanes.expected_flips(np.array([0.0, 5.0]), 0.0) == 1.0


def test_tau_is_never_below_one_unit_in_the_last_place() -> None:
    """With a floor of zero, the type's own resolution decides."""
    quiet = Figures(0, 0, 0, 0, 0.0, 1, 1, 1, {}, 1)
    assert lanes.tau(lanes.type_lane("f16"), quiet, 20.0) == 2.0**-6
    assert lanes.tau(lanes.EXACT, FLOOR, 20.0) == pytest.approx(2e-5)


def test_tally_counts_positions_from_one_and_refuses_other_shapes() -> None:
    """Two sequences of 20 give 40 positions in two buckets; a shorter candidate is an error."""
    rng = np.random.default_rng(0)
    tally = LogitTally()
    for _ in range(2):
        z = rng.normal(size=(20, 5))
        tally.add(z, z)
    figures = tally.figures()
    assert (figures.positions, figures.nmse, figures.kl_max, figures.top1) == (40, 0.0, 0.0, 1.0)
    assert set(figures.buckets) == {"1-16", "17-64"}
    with pytest.raises(EngineError, match="another shape"):
        tally.add(np.zeros((20, 5)), np.zeros((19, 5)))


class Sequential(NumpyBackend):
    """float32 sums one product after another: the noisiest order an honest engine has."""

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        total = np.zeros((len(x), len(weight)), np.float32)
        for column in range(x.shape[-1]):
            total += x[:, column : column + 1] * weight[:, column]
        return total if bias is None else total + bias


class Permuted(NumpyBackend):
    """float32 sums in another order."""

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        order = np.random.default_rng(x.shape[-1]).permutation(x.shape[-1])
        return super().linear(x[..., order], weight[:, order], bias)


class WrongEps(NumpyBackend):
    """The norms' epsilon is 1e-6 instead of the file's 1e-5."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return super().rms_norm(x, weight, eps / 10)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return super().layer_norm(x, weight, bias, eps / 10)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_exact_ratio_parts_summation_orders_from_a_wrong_epsilon(tmp_path: Path, arch: str) -> None:
    """Sequential and permuted sums stay within ratio x floor; eps 1e-6 for 1e-5 does not."""
    path = tiny(tmp_path / "model.gguf", arch, context=128)
    ids = np.random.default_rng(1).integers(3, 300, 120).tolist()

    def figures(backend: NumpyBackend) -> Figures:
        tally = LogitTally()
        with Model.load(path, dtype="float64") as oracle, Model.load(path, backend=backend) as model:
            tally.add(forced(oracle, ids), forced(model, ids))
        return tally.figures()

    bound = lanes.bounds(lanes.EXACT, figures(NumpyBackend("float32")))
    for clean in (Sequential("float32"), Permuted("float32")):
        assert lanes.broken(figures(clean), bound) == []
    assert "kl_max" in [row[0] for row in lanes.broken(figures(WrongEps("float32")), bound)]
