"""Is every op right that only some architectures ask for? The engine's backend against float64 twins."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from prill_harness.engines.base import Engine
from prill_harness.run.checks import Observer, check
from prill_runtime.errors import MissingCapability, UnsupportedModel
from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.models.base import Node, Pass
from prill_runtime.models.nodes.network import Layer
from prill_runtime.ops.protocol import Yarn
from prill_suites import ops_models, ops_twins
from prill_suites.ops_bench import Bench
from prill_suites.ops_shapes import about, drawn

LENGTHS = (1, 31, 33, 255, 257)
ROWS = (1, 3, 20)  # of a decoding step, of a few sequences, of a prompt
# Experts, and how many of them a row has: one, all, as many as published models, more than a warp of threads.
CHOICES = ((1, 1), (5, 5), (8, 2), (32, 4), (33, 3), (127, 2), (129, 8))
# Of products: on either side of the tiles, threads and chunks that a device divides them by.
TILED: dict[str, tuple[int, ...]] = {"rows": (17, *about(64, 128)), "outs": (3, *about(128))}
COLUMNS: dict[str, tuple[int, ...]] = {"inner": (*about(4, 8, 16, 32, 64, 128), 508, 516)}
# Of 32 columns: more and fewer steps of 64 than are copied ahead.
BLOCKS: dict[str, tuple[int, ...]] = {"blocks": (1, 3, 5, 7)}
LIMITS = ((7.0, 1.702), (1.0, 1.0))
WINDOW = 128


@pytest.fixture
def bench(observe: Observer, engine: Engine) -> Bench:
    return Bench(engine, ops_twins, observe)


@check("options.route", kills=("softmax_before_choice", "one_expert_less", "ties_to_highest_id"))
def test_route(bench: Bench) -> None:
    """The largest logits are chosen and weighted; of equals, at the border and everywhere, the lowest ids."""
    for (experts, used), rows, normalised in product(CHOICES, ROWS, (True, False)):
        drawn = bench.normal(rows, experts, scale=3.0)
        ties = {"rounded": np.round(drawn), "equal": np.zeros_like(drawn)}
        for what, logits in {"drawn": drawn, "far": 1e3 * drawn, **ties}.items():
            bench.hold(
                "route", logits, used=used, normalised=normalised,
                case=f"({rows}, {experts}) {what}, {used} used{', normalised' * normalised}",
            )  # fmt: skip
    bench.conclude()


def routed(bench: Bench, rows: int, experts: int, used: int, all_to_first: bool = False) -> NDArray[Any]:
    """Weights (row, expert) of `used` random experts of each row, the first of all rows among them or not."""
    weights = np.zeros((rows, experts), bench.backend.dtype)
    for row in weights:
        order = bench.random.permutation(experts).tolist()
        order.sort(key=lambda expert: all_to_first and expert > 0)
        row[order[:used]] = bench.random.uniform(0.1, 1.0, used)
    return weights


def held_matrices(bench: Bench, name: str, shape: tuple[int, int, int]) -> tuple[Any, NDArray[np.float64]]:
    """Matrices (expert, out, in) of a type, of the backend and in float64.

    Raises:
        MissingCapability: the backend has no experts in it.
    """
    kind, (experts, outs, inner) = Type[name], shape
    raw = ops_models.random_blocks(bench.random, kind, (experts * outs, inner))
    plain = np.asarray(gguf.quants.dequantize(raw, kind), np.float64).reshape(shape)
    try:
        return bench.backend.weight(raw, TensorInfo("experts", shape, kind)), plain
    except UnsupportedModel as error:
        raise MissingCapability(f"the backend has no experts in {name}: {error}") from error


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "MXFP4"])
@check("options.experts", kills=("expert_bias_dropped", "experts_shifted", "e8m0_scale_off_by_one"))
def test_experts(bench: Bench, name: str) -> None:
    """Each row times the matrices of its own experts, with and without biases, in types that files have them
    in: one input for all, and an input for each."""
    inner = 64
    for (experts, used), rows, biased in product(CHOICES[1:5], ROWS, (False, True)):
        weight, plain = held_matrices(bench, name, (experts, 5, inner))
        chosen = routed(bench, rows, experts, used)
        bias = bench.normal(experts, 5) if biased else None
        for shape in ((rows, inner), (rows, used, inner)):
            x = bench.normal(*shape) + plain[0, 0].astype(bench.backend.dtype)
            bench.hold(
                "expert_linear", x, weight, chosen, twin=(x, plain, chosen), used=used, bias=bias,
                case=f"{shape} by {used} of {experts} in {name}{', biased' * biased}",
            )  # fmt: skip
    for sizes in drawn(bench.random, TILED | (BLOCKS if name in ("Q8_0", "MXFP4") else COLUMNS), 60_000):
        rows, outs, inner = sizes["rows"], sizes["outs"], sizes.get("inner") or 32 * sizes["blocks"]
        experts = 4 if rows > 65 else 8  # an expert has all rows: of many it fills the larger tile
        weight, plain = held_matrices(bench, name, (experts, outs, inner))
        chosen = routed(bench, rows, experts, 2, all_to_first=True)
        x = bench.normal(rows, inner) + plain[0, 0].astype(bench.backend.dtype)
        bench.hold(
            "expert_linear", x, weight, chosen, twin=(x, plain, chosen), used=2,
            case=f"({rows}, {inner}) to {outs} by 2 of {experts} in {name}",
        )  # fmt: skip
    bench.conclude()


@check("options.mix", kills=("experts_not_weighted", "experts_weighted_by_rank"))
def test_mix(bench: Bench) -> None:
    """What a row's experts made is added, each times its own weight."""
    for (experts, used), rows, width in product(CHOICES, ROWS, LENGTHS):
        x, chosen = bench.normal(rows, used, width), routed(bench, rows, experts, used)
        bench.hold("mix", x, chosen, case=f"({rows}, {used}, {width}) of {experts}")
    bench.conclude()


@check(
    "options.clamped",
    kills=("clamp_left_out", "clamp_of_gate_alone", "linear_half_not_raised", "clamped_alpha_one"),
)
def test_clamped(bench: Bench) -> None:
    """The clamped SwiGLU on either side of its limits: the gate has none below."""
    for (limit, alpha), width, scale in product(LIMITS, LENGTHS, (1.0, 10.0, 1e-39)):
        gate, up = bench.normal(3, width, scale=scale), bench.normal(3, width, scale=scale)
        gate[0, 0], up[0, 0], up[1, 0] = -9 * limit, -2 * limit, 2 * limit
        bench.hold(
            "swiglu_clamped", gate, up, limit=limit, alpha=alpha,
            case=f"(3, {width}) x {scale:g}, limit {limit:g}, alpha {alpha:g}",
        )  # fmt: skip
    bench.conclude()


def attending(bench: Bench, rows: int, keys: int, dim: int = 64) -> tuple[NDArray[Any], ...]:
    """Queries of four heads, and keys and values of two."""
    return bench.normal(rows, 4, dim), bench.normal(2, keys, dim), bench.normal(2, keys, dim)


@check("options.sinks", kills=("sinks_left_out", "one_sink_a_layer", "sinks_scaled"))
def test_sinks(bench: Bench) -> None:
    """A sink of each head takes its part of the softmax: next to nothing, and nearly all."""
    for rows, more, window in product(ROWS, (0, 40), (None, 9)):
        sinks = np.array([-30.0, 1.5, 0.0, 8.0], bench.backend.dtype)
        bench.hold(
            "attention", *attending(bench, rows, rows + more), start=more, scale=0.125, window=window,
            sinks=sinks, case=f"sinks, {rows} rows from {more}, window {window}",
        )  # fmt: skip
    bench.conclude()


@check("options.softcap", kills=("scores_not_capped", "caps_cut_off"))
def test_softcap(bench: Bench) -> None:
    """Values stay within their cap, and so do scores behind their scale and before the mask."""
    for width, scale, cap in product(LENGTHS, (1.0, 50.0), (30.0, 2.0)):
        x = bench.normal(3, width, scale=scale)
        bench.hold("softcap", x, cap, case=f"(3, {width}) x {scale:g} at {cap:g}")
    for rows, window in product(ROWS, (None, 9)):
        q, k, v = attending(bench, rows, rows + 5)
        bench.hold(
            "attention", 4 * q, k, v, start=5, scale=0.3, window=window, softcap=5.0,
            case=f"scores capped at 5, {rows} rows, window {window}",
        )  # fmt: skip
    bench.conclude()


@check("options.window", kills=("window_off_by_one",))
def test_window(bench: Bench) -> None:
    """A window of 128 at 127, 128 and 129 keys, and where a prompt goes past it, without sinks and with."""
    sinks = np.array([-30.0, 1.5, 0.0, 8.0], bench.backend.dtype)
    lengths = (WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 70)
    for keys, rows, own in product(lengths, (1, 3, 100), ({}, {"sinks": sinks})):
        q, k, v = attending(bench, rows, keys)
        bench.hold(
            "attention", q, k, v, start=keys - rows, scale=0.125, window=WINDOW, **own,
            case=f"{rows} rows of {keys} keys, window {WINDOW}{', sinks' * bool(own)}",
        )  # fmt: skip
    bench.conclude()


@check(
    "options.stretched",
    kills=("yarn_factor_left_out", "yarn_bounds_rounded", "yarn_as_linear", "short_divisors_for_all"),
)
def test_stretched(bench: Bench) -> None:
    """YaRN's frequencies, its bounds rounded or not, and its factor; divisors by length."""
    positions = np.array([1, 100, 5000], dtype=np.int64)
    for layout, truncate, scale in product(("norm", "neox"), (True, False), (1.0, 1.3465735902799727)):
        x, yarn = bench.normal(3, 2, 64), Yarn(4096, truncate=truncate)
        bench.hold(
            "rope", x, positions, base=150_000.0, dim=64, layout=layout, factor=32.0, yarn=yarn, scale=scale,
            case=f"YaRN, bounds {'rounded' if truncate else 'kept'}, {layout}, factor {scale:g}",
        )  # fmt: skip
    short, late = np.linspace(1.0, 1.1, 8), np.linspace(1.1, 60.0, 8)
    divisors = [each.astype(bench.backend.dtype) for each in (short, late)]
    for last in (4095, 4096):
        bench.hold(
            "rope", bench.normal(3, 2, 20), np.array([0, 7, last]), base=10_000.0, dim=16, layout="neox",
            freq_factors=divisors[0], long=(divisors[1], 4096), case=f"{last + 1} positions of 4096",
        )  # fmt: skip
    bench.conclude()


@check("options.temper", kills=("late_queries_not_sharpened",))
def test_temper(bench: Bench) -> None:
    """Queries are sharpened from each multiple of the original length on."""
    positions = np.array([0, 8191, 8192, 16_383, 16_384, 131_071], dtype=np.int64)
    for dim in (2, 64):
        x = bench.normal(len(positions), 3, dim)
        bench.hold(
            "temper", x, positions, beta=0.1, original=8192, case=f"{len(positions)} rows of 3 x {dim}"
        )
    bench.conclude()


@check("options.scale", kills=("embedding_not_scaled",))
def test_scale(bench: Bench) -> None:
    """Every value of an embedding is multiplied."""
    for width, by in product(LENGTHS, (48**0.5, 0.25)):
        bench.hold("scale", bench.normal(3, width), by, case=f"(3, {width}) by {by:g}")
    bench.conclude()


@check("options.activations", kills=("tanh_for_erf", "silu_for_gelu"))
def test_activations(bench: Bench) -> None:
    """GELU in its exact form, and GELU as the gate of another half, at every magnitude."""
    for width, scale in product(LENGTHS, (1.0, 1e4, 1e-39)):
        x, up = bench.normal(3, width, scale=scale), bench.normal(3, width)
        bench.hold("gelu_erf", x, case=f"GELU by erf, (3, {width}) x {scale:g}")
        bench.hold("geglu", x, up, case=f"GEGLU, (3, {width}) x {scale:g}")
    bench.conclude()


@dataclass(frozen=True)
class Branch(Node):
    """One op in the place of attention or of a feed-forward layer."""

    op: str
    by: tuple[float, ...] = ()

    def __call__(self, p: Pass, x: Any) -> Any:
        return getattr(p.ops, self.op)(x, *self.by)


def layer(ops: Any, x: Any, *, by: float, parallel: bool) -> Any:
    """What a layer adds up whose branches are one op each."""
    attention: Any = Branch("scale", (by,))
    dense: Any = Branch("gelu_tanh")
    return Layer("blk.0.", attention, dense, parallel)(Pass(None, {}, ops, None), x)  # type: ignore[arg-type]


@check("options.branches", kills=("branches_in_sequence", "branches_in_parallel"))
def test_branches(bench: Bench) -> None:
    """Branches side by side both see the stream that comes in; of others the second sees the first's sum."""
    for width, by, parallel in product(LENGTHS, (0.7, -2.0), (True, False)):
        bench.hold(
            "layer", bench.normal(3, width), made=layer, by=by, parallel=parallel,
            case=f"(3, {width}), {by:g} times it, {'side by side' if parallel else 'in sequence'}",
        )  # fmt: skip
    bench.conclude()
