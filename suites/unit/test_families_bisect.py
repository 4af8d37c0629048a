"""What is easily got wrong in each family, planted one by one: bisect names the stage where it happens, and
what happens there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from prill_harness.engines.connect import connect
from prill_harness.engines.spec import EngineSpec
from prill_harness.faults.catalogue import catalogue, named
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.lanes import lane_for
from prill_harness.planting.faults import Fault, Patch, scoped
from prill_harness.planting.tools import forgotten, node, op, option
from prill_harness.stages.bisect import Report, bisect
from prill_harness.stages.bounds import stage_bounds
from prill_harness.stages.subject import open_subject
from prill_harness.stages.trace import capture

from .families import VOCAB, write

IDS = np.random.default_rng(9).integers(0, VOCAB, 40).tolist()
TIES, NEARLY = "gpt-oss with ties", "gpt-oss with near ties"

# Planted fault -> the family it is planted on, the kind of the first wrong stage, and a part of the sentence.
FAULTS = {
    "sinks_left_out": ("gpt-oss", "attn", "sinks left out of the softmax"),
    "one_sink_a_layer": ("gpt-oss", "attn", "one sink for all heads, that of head 0"),
    "sinks_scaled": ("gpt-oss", "attn", "sinks scaled as scores are"),
    "window_in_other_layers": ("gpt-oss", "attn", "window 7 of the file ignored"),
    "window_off_by_one": ("gpt-oss", "attn", "window 6 instead of 7"),
    "head_size_from_width": ("gpt-oss", "attn", "scaled by 1/sqrt(width / heads) instead of 1/sqrt(d)"),
    "yarn_factor_left_out": ("gpt-oss", "q_rope", "attention factor left out"),
    "yarn_bounds_rounded": ("gpt-oss", "q_rope", "YaRN's bounds rounded outwards"),
    "yarn_as_linear": ("qwen2", "q_rope", "every frequency divided by the factor, YaRN's ramp left out"),
    "softmax_before_choice": ("gpt-oss", "routed", "softmax before the choice"),
    "one_expert_less": ("gpt-oss", "routed", "2 experts instead of 3"),
    "ties_to_highest_id": (TIES, "routed", "of equal logits the highest id chosen instead of the lowest"),
    "close_experts_exchanged": (NEARLY, "routed", "its input was right"),
    "router_bias_dropped": ("gpt-oss", "router", "bias of blk.0.ffn_gate_inp left out"),
    "expert_bias_dropped": ("gpt-oss", "expert_gate", "bias of blk.0.ffn_gate_exps left out"),
    "experts_shifted": ("gpt-oss", "expert_gate", "ffn_gate_exps shifted by one expert, biases not"),
    "experts_exchanged": ("gpt-oss", "expert_gate", "matrices of experts 0 and 1 of blk.0.ffn_gate_exps"),
    "experts_not_weighted": ("gpt-oss", "experts", "experts added without their weights"),
    "experts_weighted_by_rank": ("gpt-oss", "experts", "weights in the order of size"),
    "clamp_left_out": ("gpt-oss", "expert_act", "no clamp"),
    "clamp_of_gate_alone": ("gpt-oss", "expert_act", "the gate alone clamped at 7, the linear half not"),
    "linear_half_not_raised": ("gpt-oss", "expert_act", "no one added to the linear half"),
    "clamped_alpha_one": ("gpt-oss", "expert_act", "alpha 1 instead of 1.702"),
    "mxfp4_nibbles_interleaved": ("gpt-oss", "expert_gate", "nibbles interleaved instead of low half"),
    "e8m0_scale_off_by_one": ("gpt-oss", "expert_gate", "E8M0 scale twice as large"),
    "gate_up_swapped": ("phi3", "act", "gate and up exchanged"),
    "short_divisors_for_all": ("phi3", "q_rope", "divisors for short texts, whatever the length"),
    "scores_not_capped": ("gemma2", "attn", "scores not capped at 2"),
    "logits_not_capped": ("gemma2", "logits", "logits not capped at 4"),
    "caps_cut_off": ("gemma2", "attn", "scores cut off at 2"),
    "embedding_not_scaled": ("gemma2", "embed", "scale 8 left out"),
    "silu_for_gelu": ("gemma2", "act", "SiLU instead of GELU (tanh)"),
    "post_norms_left_out": ("gemma2", "post_attn_norm", "equal to its input: the stage was skipped"),
    "queries_not_normed": ("gemma3", "q_norm", "equal to its input: the stage was skipped"),
    "keys_not_normed": ("qwen3", "k_norm", "equal to its input: the stage was skipped"),
    "heads_normed_together": ("qwen3", "q_norm", "normalised over all heads together instead of"),
    "second_base_ignored": ("gemma3", "q_rope", "as other layers are, with base 20000 instead of 10000"),
    "tanh_for_erf": ("gptneox", "act", "GELU (tanh) instead of GELU (erf)"),
    "late_queries_not_sharpened": ("mistral3", "attn", "late queries not sharpened"),
    "branches_in_sequence": ("gptneox", "ffn_norm", "computed from the stream behind attention"),
    "branches_in_parallel": ("gemma2", "ffn_norm", "computed from the stream before attention"),
}  # fmt: skip


Mistake = tuple[str, str, str, Callable[[], Patch]]
# What needs no fault of its own, for another one shows that it would be killed.
MISTAKES: dict[str, Mistake] = {
    "output bias dropped": (
        "gpt-oss", "attn_out", "bias of blk.0.attn_output left out", lambda: forgotten("attn_output.bias")),
    "query bias dropped": ("qwen2", "q", "bias of blk.0.attn_q left out", lambda: forgotten("attn_q.bias")),
    "not brought to 1": (
        "qwen3moe", "routed", "softmax before the choice", lambda: option("route", normalised=False)),
    "neighbours for halves": (
        "qwen3", "q_rope", "pairs (2i, 2i+1) instead of (i, i+d/2)", lambda: option("rope", layout="norm")),
    "window in each sixth layer": ("gemma3", "attn", "window 7 of the file ignored", lambda: node(
        "Attention.attend", lambda o, self, *a: o(replace(self, window=None if self.window else 7), *a))),
    "whole heads turned": (
        "gptneox", "q_rope", "rope dimension 16 instead of 4", lambda: option("rope", dim=16)),
    "a factor that cancels out": ("mistral3", "q_rope", "attention factor of YaRN", lambda: op(
        "rope", lambda o, self, *a, **n: o(self, *a, **{**n, "scale": 0.1 * np.log(8) + 1}))),
}  # fmt: skip


def alike(tensors: dict[str, np.ndarray], less: float = 0.0) -> None:
    """Every second expert is as likely as the one before it, or less by so many logits."""
    for name, values in tensors.items():
        if "ffn_gate_inp" in name:
            values[1::2] = values[::2] - (less if name.endswith("bias") else 0.0)


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's file, written once."""
    folder = tmp_path_factory.mktemp("bisect")

    def made(arch: str) -> Path:
        edits = {TIES: alike, NEARLY: partial(alike, less=0.01)}
        more: dict[str, Any] = {"edit": edits[arch]} if arch in edits else {}
        name = arch.partition(" ")[0]
        return write(name, folder / f"{arch}.gguf", experts=gguf.GGMLQuantizationType.MXFP4, **more)

    return cache(made)


def walked(path: Path, *planted: Fault, ids: list[int] = IDS) -> Report:
    with (
        scoped(lambda: connect(EngineSpec.parse("numpy"), path), planted) as candidate,
        open_engine("numpy64", path) as oracle,
        open_subject(path) as subject,
    ):
        bounds = stage_bounds(path, lane_for("f32", "float32"), ids, capture(oracle, ids).stages)
        return bisect(candidate, oracle, ids, subject, bounds)


def named_rightly(report: Report, stage: str, part: str) -> None:
    assert not report.ok
    assert report.findings[0].stages[0].rpartition(".")[2] == stage, report.sentence
    assert part in report.findings[0].sentence, report.sentence


@pytest.mark.parametrize("fault", FAULTS)
def test_bisect_names_a_planted_fault(fault: str, path_of: Callable[[str], Path]) -> None:
    """The first wrong stage is the one where the fault is, in the first layer that has it, and the sentence
    says what it does there."""
    arch, stage, part = FAULTS[fault]
    named_rightly(walked(path_of(arch), *named([fault])), stage, part)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bisect_names_a_mistake(mistake: str, path_of: Callable[[str], Path]) -> None:
    """The same of what is no fault of the catalogue."""
    arch, stage, part, make = MISTAKES[mistake]
    planted = Fault("mistake", "attention", ("attn",), "A mistake", ("any",), lambda: iter([make()]))
    named_rightly(walked(path_of(arch), planted), stage, part)


def test_places_of_experts_are_no_heads(path_of: Callable[[str], Path]) -> None:
    """Where an expert's product is wrong, is told by its place among those chosen."""
    sentence = walked(path_of("gpt-oss"), *named(["experts_exchanged"])).sentence
    assert "chosen expert" in sentence
    assert "head" not in sentence


def test_bisect_names_the_divisors_of_a_short_text(path_of: Callable[[str], Path]) -> None:
    """Up to the original length the long ones are the wrong ones."""

    def rope(original: Any, self: Any, *given: Any, long: Any = None, **how: Any) -> Any:
        return original(self, *given, **{**how, "freq_factors": long[0]})

    planted = Fault("mistake", "rope", ("q_rope",), "A mistake", ("any",), lambda: iter([op("rope", rope)]))
    report = walked(path_of("phi3"), planted, ids=IDS[:20])
    named_rightly(report, "q_rope", "divisors for long texts, whatever the length")


@pytest.mark.parametrize("arch", sorted({arch for arch, *_ in (*FAULTS.values(), *MISTAKES.values())}))
def test_bisect_finds_nothing_in_a_sound_family(arch: str, path_of: Callable[[str], Path]) -> None:
    """The same walk without a mistake."""
    assert walked(path_of(arch)).ok


def test_every_fault_of_an_option_is_named() -> None:
    """None that is planted in what only some architectures have is left out above."""
    assert {name for name, fault in catalogue().items() if fault.area == "options"} <= FAULTS.keys()
