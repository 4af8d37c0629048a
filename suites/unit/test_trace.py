"""Traces: captured, saved, read under other engines' names, laid out as the oracle lays them out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prill_harness.engines.base import Engine
from prill_harness.engines.models import resolve_model
from prill_harness.faults.opening import open_engine
from prill_harness.stages import trace
from prill_harness.stages.subject import stage_table
from prill_harness.stages.table import canonical
from prill_runtime.errors import InvalidParameter, UsageError
from prill_runtime.models import walks

from .networks import network

IDS = [1, 306, 17, 900, 44, 5, 5, 81]
MODELS = ("fixture:llama-tiny", "fixture:gpt2-tiny")
STAGES = list(walks.stages(network(layers=3)))


@pytest.fixture(params=MODELS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with open_engine("numpy", request.param) as opened:
        yield opened


def test_a_traced_run_gives_the_tokens_of_an_untraced_one(engine: Engine) -> None:
    """Greedy ids picked from traced logits, one traced pass a token, are those that `generate` gives."""
    free = engine.generate(IDS, max_tokens=12, ignore_eos=True)
    ids = [*IDS]
    for _ in range(12):
        logits = dict(engine.trace(ids))["logits"]
        ids.append(int(np.argmax(logits[-1])))
    assert tuple(ids[len(IDS) :]) == free.ids
    assert engine.generate(IDS, max_tokens=12, ignore_eos=True).ids == free.ids


def test_stages_come_in_execution_order_and_are_copies(engine: Engine) -> None:
    """Every stage of the table, in its order; changing one array changes no other and no later run."""
    made = list(engine.trace(IDS))
    assert [name for name, _ in made] == list(stage_table(resolve_model(engine.info.model)))
    before = [array.copy() for _, array in made]
    made[3][1][...] = 7.0
    for at, (_, array) in enumerate(made):
        assert at == 3 or np.array_equal(array, before[at])
    again = list(engine.trace(IDS))
    assert all(np.array_equal(array, kept) for (_, array), kept in zip(again, before, strict=True))


def test_a_replaced_stage_is_what_the_rest_is_computed_from(engine: Engine) -> None:
    """Zeros handed on in place of the first block's result give the trace of zeros from there on."""
    plain = trace.capture(engine, IDS)
    zeros = np.zeros_like(plain.stages["blk.0.out"])
    moved = trace.capture(engine, IDS, {"blk.0.out": zeros})
    assert np.array_equal(moved.stages["blk.0.out"], plain.stages["blk.0.out"])
    assert not np.array_equal(moved.stages["blk.1.attn_norm"], plain.stages["blk.1.attn_norm"])
    same = trace.capture(engine, IDS, {"blk.0.out": plain.stages["blk.0.out"]})
    assert np.array_equal(same.stages["logits"], plain.stages["logits"])
    with pytest.raises(InvalidParameter, match=r"blk\.0\.out"):
        trace.capture(engine, IDS, {"blk.0.out": zeros[:, :-1]})


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_saved_trace_is_read_as_it_was(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ids, names, order and every bit of every array survive the file."""
    names = data.draw(st.lists(st.sampled_from(STAGES), unique=True, min_size=1, max_size=6))
    ids = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9))
    shape = hnp.array_shapes(min_dims=1, max_dims=3, max_side=4)
    arrays = {name: data.draw(hnp.arrays(np.float64, shape)) for name in names}
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    trace.save(trace.Trace(tuple(ids), arrays), path)
    read = trace.load(path)
    assert read.ids == tuple(ids)
    assert list(read.stages) == names
    for name, array in arrays.items():
        np.testing.assert_array_equal(read.stages[name], array)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("blk.3.q_rope", "blk.3.q_rope"),
        ("logits", "logits"),
        ("inp_embd", "embed"),
        ("embd", "embed"),
        ("blk.2.attn_output.bias", "blk.2.attn_out"),
        ("blk.2.attn_output.scale", None),
        ("attn_norm-3", "blk.3.attn_norm"),
        ("Qcur-0", "blk.0.q"),
        ("Vcur-12", "blk.12.v"),
        ("kqv_out-1", "blk.1.attn"),
        ("ffn_inp-1", "blk.1.ffn_in"),
        ("ffn_swiglu-2", "blk.2.act"),
        ("l_out-5", "blk.5.out"),
        ("result_norm", "output_norm"),
        ("result_output", "logits"),
        ("model.layers.2.self_attn.q_proj", "blk.2.q"),
        ("model.layers.2", "blk.2.out"),
        ("layers.0.mlp.down_proj.input", "blk.0.act"),
        ("model.embed_tokens", "embed"),
        ("transformer.h.7.attn.c_attn", "blk.7.qkv"),
        ("h.1.mlp.act", "blk.1.act"),
        ("transformer.ln_f", "output_norm"),
        ("lm_head", "logits"),
        ("blk.3.nothing", None),
        ("KQ_mask", None),
        ("model.layers.2.self_attn.rotary_emb", None),
    ],
)
def test_names_of_other_engines(name: str, stage: str | None) -> None:
    """llama.cpp's callback names and transformers' module paths mean the stage that they compute."""
    assert canonical(name) == stage


@pytest.mark.parametrize(
    ("told", "stages"),
    [
        # The last norm without its weight has transformers' name of the whole one.
        ({"norm = RMS_NORM(l_out-3)": 1, "result_norm = MUL(norm, output_norm.weight)": 2},
         {"output_norm": 2}),
        ({"norm": 1, "result_norm": 2}, {"output_norm": 2}),
        ({"norm": 1}, {"output_norm": 1}),
        # GPT-2 adds positions to what is looked up.
        ({"embd = GET_ROWS(token_embd.weight, inp_tokens)": 1, "inpL = ADD(embd, pos_embd)": 2},
         {"embed": 2}),
        # What has no name of its own is known by its parameter, behind the bias where there is one.
        ({"node_37 = MUL_MAT(blk.0.attn_output.weight, kqv_out-0)": 1,
          "node_38 = ADD(node_37, blk.0.attn_output.bias)": 2}, {"blk.0.attn_out": 2}),
        ({"node_37 = MUL_MAT(blk.0.attn_output.weight, kqv_out-0)": 1,
          "attn_out-0 = ADD(node_37, blk.0.attn_output.bias)": 2}, {"blk.0.attn_out": 2}),
        ({"attn_out-1 = MUL_MAT(blk.1.attn_output.weight, kqv_out-1)": 1}, {"blk.1.attn_out": 1}),
        ({"ffn_moe_logits-0 = MUL_MAT(blk.0.ffn_gate_inp.weight, x)": 1,
          "ffn_moe_probs-0 = ADD(ffn_moe_logits-0, blk.0.ffn_gate_inp.bias)": 2}, {"blk.0.router": 2}),
        ({"node_9 = ADD(a, b)": 1}, {}),
        # One fork calls a residual sum what elsewhere is a norm; a sum with a bias may be one.
        ({"ffn_norm-0 = ADD(attn_out-0, inpL)": 1}, {}),
        ({"ffn_norm-0 = ADD(norm_w-0, blk.0.ffn_norm.bias)": 1}, {"blk.0.ffn_norm": 1}),
        ({"ffn_inp-0 = ADD(attn_out-0, inpL)": 1, "l_out-0 = ADD(a, b)": 2},
         {"blk.0.ffn_in": 1, "blk.0.out": 2}),
        ({"Qcur-0 = MUL_MAT(blk.0.attn_q.weight, attn_norm-0)": 1, "Qcur-0 = ROPE(Qcur-0, inp_pos)": 2},
         {"blk.0.q": 1, "blk.0.q_rope": 2}),
    ],
)  # fmt: skip
def test_ops_tell_what_names_do_not(told: dict[str, int], stages: dict[str, int]) -> None:
    """`NAME = OP(SOURCES)` is the stage that it was computed to be, whatever it is called."""
    made = trace.collect([1], [(name, np.full((1, 2), value)) for name, value in told.items()])
    assert {name: int(array[0, 0]) for name, array in made.stages.items()} == stages
    for stage, value in stages.items():
        said = next(name for name, given in told.items() if given == value)
        assert f"{made.names[stage]} = {made.ops.get(stage, '')}" in f"{said} = "


def test_a_fused_projection_is_three_stages() -> None:
    """`wqkv_b-0` and `attn.c_attn` hold queries, keys and values side by side."""
    whole = np.arange(2 * 12, dtype=np.float64).reshape(2, 12)
    for name in ("wqkv_b-0", "transformer.h.0.attn.c_attn"):
        made = trace.collect([1, 2], [(name, whole)])
        assert list(made.stages) == ["blk.0.q", "blk.0.k", "blk.0.v"]
        np.testing.assert_array_equal(np.concatenate(list(made.stages.values()), axis=-1), whole)


@pytest.mark.parametrize("sizes", [(4, 1, 1), (4, 2, 2), (3, 3, 3)])
def test_a_fused_projection_of_grouped_heads_is_divided_as_the_oracles(sizes: tuple[int, ...]) -> None:
    """Queries of more heads than keys: each part has its own heads, also where there are no thirds."""
    parts = [f"blk.0.{part}" for part in "qkv"]
    truth = {name: np.random.default_rng(heads).standard_normal((2, heads, 8))
             for name, heads in zip(parts, sizes, strict=True)}  # fmt: skip
    whole = np.concatenate([array.reshape(2, -1) for array in truth.values()], axis=-1)
    made = trace.collect([1, 2], [("wqkv_b-0", whole)])
    fitted, odd = trace.fit(made, truth, {})
    assert not odd
    assert list(fitted) == parts
    for name, array in truth.items():
        np.testing.assert_array_equal(fitted[name], array)
    found = list(trace.pairs(made, trace.Trace((1, 2), truth)))
    assert [(name, got.size) for name, got, _ in found] == [(name, truth[name].size) for name in parts]


def test_one_name_for_projection_and_rotation() -> None:
    """llama.cpp calls the projection and its rotation `Qcur` alike: the second is the rotated one."""
    first, second = np.ones((2, 4)), np.full((2, 4), 2.0)
    made = trace.collect([1, 2], [("Qcur-0", first), ("Qcur-0", second)])
    assert list(made.stages) == ["blk.0.q", "blk.0.q_rope"]
    np.testing.assert_array_equal(made.stages["blk.0.q_rope"], second)


def test_shapes_are_laid_out_as_the_oracles() -> None:
    """A batch axis of one goes, heads are split, last rows are the last, and what cannot fit is said."""
    truth = {"blk.0.q_rope": np.zeros((5, 4, 8)), "blk.0.out": np.zeros((5, 32)), "logits": np.zeros((5, 7))}
    rows = np.arange(160, dtype=np.float64)
    shown = trace.Trace(
        (1, 2, 3, 4, 5),
        {
            "blk.0.q_rope": rows.reshape(1, 5, 32),
            "blk.0.out": rows[:64].reshape(2, 32),
            "logits": np.zeros((5, 6)),
        },
    )
    fitted, odd = trace.fit(shown, truth, {})
    np.testing.assert_array_equal(fitted["blk.0.q_rope"], rows.reshape(5, 4, 8))
    assert fitted["blk.0.out"].shape == (2, 32)
    assert odd == {"logits": (5, 6)}


def test_as_many_tokens_as_heads_are_not_turned() -> None:
    """An array of the oracle's own shape stays as it is; heads before tokens are turned where shapes tell."""
    square = np.arange(16, dtype=np.float64).reshape(2, 2, 4)
    fitted, _ = trace.fit(trace.Trace((1, 2), {"blk.0.k": square}), {"blk.0.k": np.zeros((2, 2, 4))}, {})
    np.testing.assert_array_equal(fitted["blk.0.k"], square)
    heads_first = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    fitted, _ = trace.fit(
        trace.Trace((1, 2, 3), {"blk.0.k": heads_first}), {"blk.0.k": np.zeros((3, 2, 4))}, {}
    )
    np.testing.assert_array_equal(fitted["blk.0.k"], heads_first.swapaxes(0, 1))


@pytest.mark.parametrize(("layout", "order"), [("norm", [0, 2, 1, 3]), ("neox", [0, 1, 2, 3])])
def test_transformers_pairs_are_laid_out_as_the_rotation_takes_them(layout: Any, order: list[int]) -> None:
    """Where a model's rotation turns neighbours, and only under transformers' name of what is rotated."""
    made = network(width=8, heads=2, kv_heads=2, size=4)
    attention = made.layers[0].attention
    assert attention.rope is not None
    layer = replace(made.layers[0], attention=replace(attention, rope=replace(attention.rope, layout=layout)))
    table = walks.stages(replace(made, layers=(layer,)))
    halves = np.arange(8, dtype=np.float64).reshape(1, 2, 4)
    for name, expected in (("model.layers.0.self_attn.q_proj", halves[..., order]), ("Qcur-0", halves)):
        for stage in ("blk.0.q", "blk.0.v"):
            shown = trace.Trace((1,), {stage: halves}, names={stage: name})
            fitted, _ = trace.fit(shown, {stage: np.zeros((1, 2, 4))}, table)
            np.testing.assert_array_equal(fitted[stage], expected if stage == "blk.0.q" else halves)


def test_a_file_that_is_no_trace_is_one_sentence(tmp_path: Path) -> None:
    """Absent, a folder, no archive, without ids, with text in it: each is refused by name."""
    (tmp_path / "text.npz").write_text("hello", encoding="utf-8")
    np.savez(tmp_path / "noids.npz", logits=np.zeros(3))
    np.savez(tmp_path / "words.npz", ids=np.array([1]), logits=np.array(["a"]))
    np.savez(tmp_path / "floats.npz", ids=np.array([0.5]), logits=np.zeros(3))
    for name, says in (
        ("absent.npz", "no such trace file"),
        ("", "got a folder"),
        ("text.npz", "not a trace"),
        ("noids.npz", "expected an array `ids`"),
        ("words.npz", "no numbers"),
        ("floats.npz", "no token ids"),
    ):
        with pytest.raises(UsageError, match=says):
            trace.load(tmp_path / name)
