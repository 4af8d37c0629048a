"""Every hypothesis against a real stage: the mistake is made, and the explanation names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import prill_fixtures
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.compare import nmse
from prill_harness.stages.bisect import Subject
from prill_harness.stages.hypotheses import generic
from prill_harness.stages.hypotheses.attention import Right
from prill_harness.stages.hypotheses.case import chosen, guesses
from prill_harness.stages.hypotheses.feedforward import ACTIVATIONS, CALLED
from prill_harness.stages.hypotheses.known import REGISTRY, Case, explain, names
from prill_harness.stages.hypotheses.rope import frequencies, rotate
from prill_harness.stages.subject import open_subject
from prill_harness.stages.trace import capture
from prill_runtime.models.base import Node
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.feedforward import GATED, PLAIN
from prill_runtime.models.nodes.rope import Rope

from .tiny_gguf import tiny

FLOOR = 1e-11
POSITIONS = 40
MODELS = ("llama-tiny:f16", "gpt2-tiny:f16", "llama-tiny:q8_0", "llama-tiny:q4_0", "llama-tiny:q4_k",
          "llama-tiny:q6_k", "llama-tiny:bf16", "gpt2-tiny:f32", "windowed", "scaled", "biased")  # fmt: skip
# Guesses that read the candidate's own array: each is made by hand in a test of its own below.
LOOKING = ("forgets", "lost_row", "one_pair")
OWN = {"embed": 2, "attn_norm": 1, "q": 2, "k": 2, "v": 1, "q_rope": 4, "k_rope": 4, "attn": 6, "attn_out": 1,
       "ffn_in": 1, "ffn_norm": 1, "gate": 1, "up": 1, "act": 2, "down": 1, "out": 1, "output_norm": 1,
       "logits": 2}  # fmt: skip
"""Kind of stage -> how many hypotheses of its node's kind it has."""


def file_of(model: str, folder: Path) -> Path:
    """A fixture in some type, or a small random model with a setting that no fixture has."""
    if ":" in model:
        return prill_fixtures.path(*model.split(":"))
    path = folder / f"{model}.gguf"
    if model == "windowed":
        return tiny(path, context=128, metadata=lambda w: w.add_sliding_window(9))
    if model == "scaled":

        def scaling(writer: object) -> None:
            writer.add_rope_scaling_type(__import__("gguf").RopeScalingType.LINEAR)  # type: ignore[attr-defined]
            writer.add_rope_scaling_factor(4.0)  # type: ignore[attr-defined]

        return tiny(path, context=128, metadata=scaling)

    def biases(tensors: dict[str, np.ndarray]) -> None:
        rng = np.random.default_rng(5)
        for layer in range(2):
            for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32)):
                tensors[f"blk.{layer}.{name}.bias"] = rng.standard_normal(rows).astype(np.float32)

    return tiny(path, context=128, edit=biases)


@pytest.fixture(scope="module", params=MODELS)
def cases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Case]]:
    """A clean case for every kind of stage of one model, in its last layer."""
    path = file_of(request.param, tmp_path_factory.mktemp("model"))
    with open_engine("numpy64", path) as oracle, open_subject(path) as subject:
        size = int(oracle.info.config["vocab_size"])
        ids = np.random.default_rng(11).integers(3, size, POSITIONS).tolist()
        made = clean_cases(subject, capture(oracle, ids).stages, ids)
        blocks = request.param in MODELS[2:8]
        yield {kind: case for kind, case in made.items() if not blocks or kind in ("embed", "k", "logits")}


def clean_cases(subject: Subject, stages: dict[str, np.ndarray], ids: list[int]) -> dict[str, Case]:
    made = {}
    for stage in subject.table.values():
        inputs = tuple(stages[name] for name in stage.inputs)
        want = stages[stage.name]
        made[stage.kind] = Case(
            stage, subject.table, tuple(ids), inputs, want, want, subject.weight, subject.raw
        )
    return made


def test_every_mistake_is_named(cases: dict[str, Case]) -> None:
    """Each guess, computed in float32 as an engine would, is explained by its own clause or an equal one."""
    assert every_mistake_named(cases) > (150 if len(cases) > 3 else 40)


def every_mistake_named(cases: dict[str, Case]) -> int:
    """How many guesses were made and named."""
    tried = 0
    for kind, case in cases.items():
        with np.errstate(all="ignore"):
            made = [(clause, array.astype(np.float32).astype(np.float64)) for clause, array in guesses(case)]
        for clause, got in made:
            if not np.isfinite(got).all() or nmse(case.want, got) < 100 * FLOOR:
                continue  # this mistake changes nothing on this model
            found = explain(replace(case, got=got), FLOOR)
            assert found is not None, f"{kind}: {clause} is not explained"
            if found.clause != clause:
                with np.errstate(all="ignore"):
                    equal = [a for c, a in guesses(replace(case, got=got)) if c == found.clause]
                assert min(nmse(a, got) for a in equal) < FLOOR, f"{kind}: {clause} taken for {found.clause}"
            tried += 1
    return tried


def test_noise_is_not_explained(cases: dict[str, Case]) -> None:
    """A clean stage, rounding, and random errors of any size have no explanation."""
    rng = np.random.default_rng(3)
    for kind, case in cases.items():
        assert explain(case, FLOOR) is None
        for size in (1e-7, 1e-3, 1.0):
            got = case.want * (1 + size * rng.standard_normal(case.want.shape))
            assert explain(replace(case, got=got), FLOOR) is None, f"{kind} with noise {size}"


def test_an_oracle_that_differs_from_its_file_is_told(cases: dict[str, Case]) -> None:
    """Where the candidate computes what the file states and the oracle anything else, the oracle is named."""
    for kind in {"attn_norm", "q", "k", "v", "q_rope", "attn", "down"} & set(cases):
        case, tried = cases[kind], 0
        with np.errstate(all="ignore"):
            for clause, wrong in guesses(case):
                if np.isfinite(wrong).all() and nmse(wrong, case.want) > 100 * FLOOR:
                    found = explain(replace(case, want=wrong), FLOOR)
                    assert found is not None, f"{kind}: {clause}"
                    assert "as the file states, where the oracle's differ" in found.clause, (
                        f"{kind}: {clause}"
                    )
                    tried += 1
        assert tried > 5, kind


def test_all_kinds_have_hypotheses(cases: dict[str, Case]) -> None:
    """Every kind of stage has hypotheses of its own node's kind beside the generic ones."""
    for kind, case in cases.items():
        own = [function for function in chosen(case.stage) if function.__module__ != generic.__name__]
        assert len(own) == OWN[kind], kind
    assert Node in REGISTRY


@pytest.fixture(scope="module")
def long() -> Iterator[dict[str, Case]]:
    """Clean cases of llama-tiny's last layer over 300 positions of a golden."""
    from prill_harness.tokens.golden import golden_for

    prompt = golden_for("fixture:llama-tiny").prompts[0]
    ids = [*prompt.ids, *prompt.tokens][:300]
    path = prill_fixtures.path("llama-tiny")
    with open_engine("numpy64", path) as oracle, open_subject(path) as subject:
        yield clean_cases(subject, capture(oracle, ids).stages, ids)


def named(case: Case, got: np.ndarray) -> str:
    """The clause that explains float32 `got`."""
    found = explain(replace(case, got=got.astype(np.float32).astype(np.float64)), FLOOR)
    return found.clause if found else "not explained"


def attended(case: Case, sees: np.ndarray, gone: np.ndarray | None = None) -> np.ndarray:
    """Attention written down once more, plainly: a loop over heads and rows."""
    q, k, v = case.inputs
    n, heads, dim = q.shape
    out = np.zeros((n, heads, dim))
    for head in range(heads):
        kv = head // (heads // k.shape[1])
        for row in range(n):
            places = np.flatnonzero(sees[row])
            keys, values = k[places, kv].copy(), v[places, kv].copy()
            if gone is not None:
                keys[gone[row, places]] = 0
                values[gone[row, places]] = 0
            scores = keys @ q[row, head] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ values
    return out.reshape(n, -1)


@pytest.mark.parametrize("length", [128, 100, 64, 256, 299])
def test_the_length_of_a_cache_is_told(long: dict[str, Case], length: int) -> None:
    """A cache that evicts, zeroes, refuses or forgets past a length is named with that length."""
    case = long["attn"]
    row, column = np.indices((300, 300))
    causal = column <= row
    assert named(case, attended(case, causal)) == "not explained"  # it is right
    evicts = named(case, attended(case, causal & (row - column < length)))
    assert evicts == f"only the last {length} positions are seen (window or eviction past {length})"
    if length > 256:
        return  # one token alone cannot tell the others apart
    full = named(case, attended(case, causal & ((column < length) | (row == column))))
    assert full == f"positions from {length} on are never seen (cache full at {length})"
    zeroed = named(case, attended(case, causal, row - column >= length))
    assert zeroed == f"positions evicted past {length} are read as zeros"
    cleared = named(case, attended(case, causal & (column // length == row // length)))
    assert f"forgotten once the cache is full at {length}" in cleared


def test_a_lost_cache_row_is_told(long: dict[str, Case]) -> None:
    """A row of the cache that was never written is named, the last one and one in the middle."""
    case = long["attn"]
    row, column = np.indices((300, 300))
    for lost in (299, 150):
        gone = np.broadcast_to(column == lost, (300, 300))
        assert named(case, attended(case, column <= row, gone)) == f"cache row {lost} not written (zeros)"


@pytest.mark.parametrize("kind", ["q_rope", "k_rope"])
@pytest.mark.parametrize("pair", [0, 5, 31])
def test_one_swapped_pair_is_told(long: dict[str, Case], kind: str, pair: int) -> None:
    """One rotary pair that is exchanged, rotated the other way or not at all is named with its number."""
    case = long[kind]
    i, j = 2 * pair, 2 * pair + 1
    x, want = case.inputs[0], case.want
    after = want.copy()
    after[..., [i, j]] = want[..., [j, i]]
    assert (
        named(case, after) == f"rope pair {pair} swapped: elements {i} and {j} exchanged after the rotation"
    )
    angle = np.arange(300)[:, None] * case.stage.node.base ** (-i / want.shape[-1])
    a, b = x[..., i], x[..., j]
    before = want.copy()
    before[..., i] = b * np.cos(angle) - a * np.sin(angle)
    before[..., j] = b * np.sin(angle) + a * np.cos(angle)
    text = f"rope pair {pair} swapped: elements {i} and {j} exchanged before the rotation"
    assert named(case, before) == text
    turned = want.copy()
    turned[..., j] = b * np.cos(angle) - a * np.sin(angle)
    turned[..., i] = b * np.sin(angle) + a * np.cos(angle)
    assert named(case, turned) == f"rope pair {pair} swapped: rotated as ({j}, {i}) instead of ({i}, {j})"
    still = want.copy()
    still[..., [i, j]] = x[..., [i, j]]
    assert named(case, still) == f"rope pair {pair} not rotated"


def test_two_exchanged_pairs_are_told(long: dict[str, Case]) -> None:
    """Two rotary pairs that take each other's place are named."""
    case = long["q_rope"]
    got = case.want.copy()
    got[..., [6, 7, 8, 9]] = case.want[..., [8, 9, 6, 7]]
    assert named(case, got) == "rope pairs 3 and 4 exchanged after the rotation"


def test_epsilon_is_told(long: dict[str, Case]) -> None:
    """RMSNorm with 1e-6 where the file says 1e-5 is named with both numbers."""
    for kind in ("attn_norm", "ffn_norm", "output_norm"):
        case = long[kind]
        x, weight = case.inputs[0], case.weight(f"{case.stage.tensors[0]}.weight")
        assert weight is not None
        got = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * weight
        assert named(case, got) == "epsilon 1e-06 instead of 1e-05"


def test_every_looking_hypothesis_has_a_test_of_its_own() -> None:
    """Those that read the candidate's array are not covered by the general test; these are all of them."""
    every = {name.partition(": ")[2] for name in names()}
    assert set(LOOKING) <= every


def test_the_node_says_what_is_right(long: dict[str, Case]) -> None:
    """Pairs half a head apart, a scale of its own: what the node says is right, and the usual is wrong."""
    case = long["q_rope"]
    node = case.stage.node
    assert isinstance(node, Rope)
    x, angles = case.inputs[0], frequencies(node.dim, node.base)
    near, far = (rotate(x, case.positions, angles, half_split=half) for half in (False, True))
    turned = replace(case, stage=replace(case.stage, node=replace(node, layout="neox")), want=far)
    assert named(turned, near) == "pairs (2i, 2i+1) instead of (i, i+d/2)"
    assert named(case, far) == "pairs (i, i+d/2) instead of (2i, 2i+1)"
    swapped = far.copy()
    swapped[..., [5, 37]] = far[..., [37, 5]]
    assert named(turned, swapped) == "rope pair 5 swapped: elements 5 and 37 exchanged after the rotation"

    case = long["attn"]
    attention = case.stage.node
    assert isinstance(attention, Attention)
    scaled = replace(attention, scale=0.3)
    right, wrong = Right.of(case, scaled)(), Right.of(case, attention)()
    case = replace(case, stage=replace(case.stage, node=scaled), want=right)
    assert named(case, wrong) == "scores scaled by 1/sqrt(d) instead of 0.3"


def test_every_activation_of_a_node_has_hypotheses() -> None:
    """What a feed-forward node may compute is known by the name that a sentence gives it."""
    assert set(CALLED) == {*GATED, *PLAIN}
    assert set(CALLED.values()) <= set(ACTIVATIONS)
