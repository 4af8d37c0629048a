"""What is easily got wrong in each family, planted one by one: bisect names the stage where it happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prill_harness.engines.connect import connect
from prill_harness.engines.spec import EngineSpec
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.lanes import lane_for
from prill_harness.planting.faults import Fault, Patch, scoped
from prill_harness.planting.tools import node, op, wiring
from prill_harness.stages.bisect import Report, bisect
from prill_harness.stages.bounds import stage_bounds
from prill_harness.stages.subject import open_subject
from prill_harness.stages.trace import capture

from .families import VOCAB, write

IDS = np.random.default_rng(9).integers(0, VOCAB, 40).tolist()


def with_option(name: str, **changed: Any) -> Patch:
    """An op whose options have other values, where it has them at all."""

    def call(original: Any, self: Any, *given: Any, **options: Any) -> Any:
        found = {key: value(options[key]) if callable(value) else value
                 for key, value in changed.items() if options.get(key) is not None}  # fmt: skip
        return original(self, *given, **{**options, **found})

    return op(name, call)


def without(ending: str) -> Patch:
    """A model that was loaded without these tensors."""

    def forget(weights: Any) -> None:
        for name in [name for name in weights if name.endswith(ending)]:
            del weights[name]

    return wiring(forget)


def skipped(stage: str) -> Patch:
    """A norm that lets everything through."""

    def norm(original: Any, self: Any, p: Any, x: Any) -> Any:
        return p.tap(self.name, x) if self.name.endswith(stage) else original(self, p, x)

    return node("RmsNorm", norm)


def other_layers(original: Any, self: Any, p: Any, *given: Any) -> Any:
    """Windows in the layers that have none, and none in those that have one."""
    windows = [layer.attention.window for layer in p.network.layers]
    window = None if self.window else next(filter(None, windows))
    return original(replace(self, window=window), p, *given)


def not_clamped(original: Any, self: Any, gate: Any, up: Any, *, limit: float, alpha: float) -> Any:
    """The linear half is not clamped."""
    most = np.minimum(gate, limit)
    return most / (1 + np.exp(-alpha * most)) * (up + 1)


def one_forgotten(original: Any, self: Any, gate: Any, up: Any, **how: Any) -> Any:
    """Nothing is added to the linear half."""
    most = np.minimum(gate, how["limit"])
    return original(self, gate, up, **how) - most / (1 + np.exp(-how["alpha"] * most))


def ignoring(name: str, option: str) -> Patch:
    """An op that does not look at one of its options."""
    return op(name, lambda o, self, *a, **how: o(self, *a, **{k: v for k, v in how.items() if k != option}))


def rounded(yarn: Any) -> Any:
    return yarn._replace(truncate=True)


def rolled(original: Any, self: Any, x: Any, weight: Any, *given: Any, **how: Any) -> Any:
    """Each expert with the matrix of the one before it."""
    return original(self, x, np.roll(weight, 1, axis=0), *given, **how)


Mistake = tuple[str, str, Callable[[], Patch]]
MISTAKES: dict[str, Mistake] = {
    "sinks left out": ("gpt-oss", "attn", lambda: with_option("attention", sinks=lambda s: s - 1e4)),
    "one sink a layer": ("gpt-oss", "attn", lambda: with_option("attention", sinks=lambda s: 0 * s + s[0])),
    "window in odd layers": ("gpt-oss", "attn", lambda: node("Attention.attend", other_layers)),
    "window too narrow": ("gpt-oss", "attn", lambda: with_option("attention", window=lambda w: w - 1)),
    "attention factor left out": ("gpt-oss", "q_rope", lambda: with_option("rope", scale=1.0)),
    "bounds rounded": ("gpt-oss", "q_rope", lambda: with_option("rope", yarn=rounded)),
    "softmax before top-k": ("gpt-oss", "routed", lambda: with_option("route", normalised=False)),
    "one expert less": ("gpt-oss", "routed", lambda: with_option("route", used=lambda n: n - 1)),
    "router's bias dropped": ("gpt-oss", "router", lambda: without("ffn_gate_inp.bias")),
    "experts' bias dropped": ("gpt-oss", "expert_gate", lambda: without("gate_exps.bias")),
    "output bias dropped": ("gpt-oss", "attn_out", lambda: without("attn_output.bias")),
    "clamp of the gate alone": ("gpt-oss", "expert_act", lambda: op("swiglu_clamped", not_clamped)),
    "one not added": ("gpt-oss", "expert_act", lambda: op("swiglu_clamped", one_forgotten)),
    "alpha of 1": ("gpt-oss", "expert_act", lambda: with_option("swiglu_clamped", alpha=1.0)),
    "experts exchanged": ("gpt-oss", "expert_gate", lambda: op("expert_linear", rolled)),
    "experts not weighted": ("gpt-oss", "experts", lambda: op(
        "mix", lambda o, self, x, routed: o(self, x, (routed != 0).astype(routed.dtype)))),
    "not brought to 1": ("qwen3moe", "routed", lambda: with_option("route", normalised=False)),
    "queries not normed": ("qwen3", "q_norm", lambda: skipped(".q_norm")),
    "keys not normed": ("qwen3", "k_norm", lambda: skipped(".k_norm")),
    "neighbours for halves": ("qwen3", "q_rope", lambda: with_option("rope", layout="norm")),
    "query bias dropped": ("qwen2", "q", lambda: without("attn_q.bias")),
    "yarn as linear": ("qwen2", "q_rope", lambda: ignoring("rope", "yarn")),
    "short divisors for all": ("phi3", "q_rope", lambda: ignoring("rope", "long")),
    "gate and up exchanged": ("phi3", "act", lambda: op("swiglu", lambda o, self, g, u: o(self, u, g))),
    "scores not capped": ("gemma2", "attn", lambda: with_option("attention", softcap=1e9)),
    "logits not capped": ("gemma2", "logits", lambda: node(
        "Head", lambda o, head, *a: o(replace(head, softcap=None), *a))),
    "embedding not scaled": ("gemma2", "embed", lambda: op("scale", lambda o, self, x, by: x.copy())),
    "SiLU for GELU": ("gemma2", "act", lambda: op("geglu", lambda o, self, g, u: self.swiglu(g, u))),
    "no norm behind attention": ("gemma2", "post_attn_norm", lambda: skipped(".post_attn_norm")),
    "no norm behind the layer": ("gemma2", "post_ffn_norm", lambda: skipped(".post_ffn_norm")),
    "one base for all layers": ("gemma3", "q_rope", lambda: with_option("rope", base=20000.0)),
    "window in each sixth layer": ("gemma3", "attn", lambda: node("Attention.attend", other_layers)),
    "GELU by tanh": ("gptneox", "act", lambda: op("gelu_erf", lambda o, self, x: self.gelu_tanh(x))),
    "whole heads turned": ("gptneox", "q_rope", lambda: with_option("rope", dim=16)),
    "late queries as early ones": ("mistral3", "attn", lambda: op(
        "temper", lambda o, self, x, *a, **n: x.copy())),
    "a factor that cancels out": ("mistral3", "q_rope", lambda: op(
        "rope", lambda o, self, *a, **n: o(self, *a, **{**n, "scale": 1.2}))),
}  # fmt: skip


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's file, written once."""
    folder = tmp_path_factory.mktemp("bisect")
    return cache(lambda arch: write(arch, folder / f"{arch}.gguf"))


def walked(path: Path, *patches: Patch) -> Report:
    planted = Fault("mistake", "attention", ("attn",), "A mistake", ("any",), lambda: iter(patches))
    spec = EngineSpec.parse("numpy")
    with (
        scoped(lambda: connect(spec, path), (planted,) if patches else ()) as candidate,
        open_engine("numpy64", path) as oracle,
        open_subject(path) as subject,
    ):
        bounds = stage_bounds(path, lane_for("f32", "float32"), IDS, capture(oracle, IDS).stages)
        return bisect(candidate, oracle, IDS, subject, bounds)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bisect_names_the_stage_of_a_mistake(mistake: str, path_of: Callable[[str], Path]) -> None:
    """The first wrong stage is the one where the mistake is, in the first layer that has it."""
    arch, stage, make = MISTAKES[mistake]
    report = walked(path_of(arch), make())
    assert not report.ok
    assert report.findings[0].stages[0].rpartition(".")[2] == stage, report.sentence


@pytest.mark.parametrize("arch", sorted({arch for arch, _, _ in MISTAKES.values()}))
def test_bisect_finds_nothing_in_a_sound_family(arch: str, path_of: Callable[[str], Path]) -> None:
    """The same walk without a mistake."""
    assert walked(path_of(arch)).ok
