"""What counts as a kill, and whom a run's evidence blames."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.faults.trial.blame import CAUSES, OPS, blame, kills
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.stages.table import KINDS, OUTER
from prill_harness.tokens.choices import Part
from prill_runtime.models import walks

from .families import FAMILIES, described
from .networks import network

MODEL = "fixture:llama-tiny"
WRONG = "is the first wrong stage: NMSE 0.3 at positions 0-63, at most 1e-11 in lane exact"
# One check of each kind, in the order of a diagnosis, with what it finds and whom it makes a person blame.
LADDER = (
    ("harness.oracle", "the oracle computes in float32", "harness"),
    ("tokens.golden_is_current", "the golden is stale", "harness"),
    ("file.weights", "blk.0.attn_q.weight differs", "file"),
    ("tokenizer.merges", "ids differ", "tokenizer"),
    ("stages.early", f"blk.1.q_rope {WRONG}", "q_rope"),
    ("ops.swiglu", "NMSE 0.1", "act"),
    ("sampler.filters", "top-k keeps one too many", "sampler"),
    ("memory.total", "a buffer is left", "memory"),
    ("cache.sessions_apart", "the sessions differ", "state"),
    ("properties.batch", "prompt 2 in batch", "batch"),
    ("cache.size", "holds twice as much", "memory"),
    ("properties.cancel", "went on", "generate"),
    ("sampler.engine_replay", "drew another token", "sampler"),
    ("errors.model_file", "was accepted", "file"),
    ("errors.too_long", "was accepted", "errors"),
    ("file.configuration", "norm_eps: the file says 1e-5, the engine uses 1e-6", "file"),
    ("tokens.teacher_forced", "KL 0.3", "logits"),
    ("ops.decode", "NMSE 0.2", "logits"),
)


def seen(
    check: str,
    sentence: str = "wrong",
    status: Status = Status.FAILED,
    engine: str = "numpy+fault:x",
    observed: int = 1,
    **detail: Any,
) -> Evidence:
    cell = Cell(MODEL, engine, check.partition(".")[0])
    return Evidence(
        check, "c" * 64, cell, status, observed, sentence, "oracle", ("x",), "prill run", detail=detail
    )


def sound(*checks: str) -> list[Evidence]:
    return [seen(check, status=Status.PASSED, engine="numpy") for check in checks]


FAILURES = [seen(check, sentence) for check, sentence, _ in LADDER]
CLEAN = sound(*(check for check, _, _ in LADDER))


def test_a_fault_of_the_harness_is_noticed_by_what_is_no_longer_seen() -> None:
    """Less than nine tenths of what the check saw on the clean engine, for faults of the harness alone;
    silence only where nothing else tells."""
    clean = [seen(f"ops.{n}", status=Status.PASSED, engine="numpy", observed=100) for n in ("a", "b", "c")]
    found = [seen(f"ops.{n}", status=Status.PASSED, observed=o) for n, o in (("a", 90), ("b", 89))]
    found.append(seen("ops.c", status=Status.INCONCLUSIVE, observed=0))
    assert kills(found, clean) == []
    assert [e.check for e in kills(found, clean, silence=True)] == ["ops.b"]
    assert [e.check for e in kills([found[0], found[2]], clean, silence=True)] == ["ops.c"]
    told = blame(kills(found, clean, silence=True))
    assert told is not None
    assert told.parts == ("harness",)


def test_a_failed_check_that_passes_without_the_fault_is_a_kill() -> None:
    """Only a failure beside a pass counts: not an error, not silence, not a check that is always red."""
    statuses = {f"ops.{status}": status for status in Status if status is not Status.WAIVED}
    found = [seen(check, status=status) for check, status in statuses.items()]
    assert [e.check for e in kills(found, sound(*statuses))] == ["ops.failed"]
    assert kills(found, []) == []
    assert kills(found, [seen("ops.failed", engine="numpy")]) == []


def test_a_pass_on_another_model_is_no_control() -> None:
    """The clean engine must have passed with the same model."""
    other = Evidence(
        "ops.add", "", Cell("fixture:gpt2-tiny", "numpy", "ops"), Status.PASSED, 1, "", "o", ("x",), ""
    )
    assert kills([seen("ops.add")], [other]) == []


def test_silence_counts_against_the_harness_alone() -> None:
    """A check that saw nothing where it passed before kills a fault of the harness, and no other."""
    quiet = [
        seen("ops.add", "the check ended without having observed anything", Status.INCONCLUSIVE, observed=0)
    ]
    assert kills(quiet, sound("ops.add")) == []
    (found,) = kills(quiet, sound("ops.add"), silence=True)
    assert blame([found]).parts == ("harness",)
    told = [*quiet, seen("harness.oracle", "the oracle computes in float32")]
    assert kills(told, sound("ops.add", "harness.oracle"), silence=True) == told[1:]


def test_an_error_kills_nothing_even_in_the_harness() -> None:
    """A crash says that nobody looked."""
    assert kills([seen("ops.add", status=Status.ERROR)], sound("ops.add"), silence=True) == []


def test_a_refusal_is_credited_to_the_file_suite_alone() -> None:
    """An engine that does not open fails every check; only the suite that owes the refusal has seen it."""
    refusal = "model file error in model.gguf: tensor is missing"
    checks = ("cache.reset", "file.tensors", "file.weights", "stages.early", "tokens.greedy")
    found = kills([seen(check, refusal, observed=0) for check in checks], sound(*checks))
    assert [e.check for e in found] == ["file.tensors", "file.weights"]
    assert blame(found).parts == ("file",)
    without = kills([seen(check, refusal, observed=0) for check in checks[3:]], sound(*checks))
    assert [e.check for e in without] == ["stages.early"]


def test_nothing_killed_blames_nobody() -> None:
    """Without a kill there is no blame."""
    assert blame([]) is None


@pytest.mark.parametrize(("check", "sentence", "part"), LADDER, ids=[row[0] for row in LADDER])
def test_each_finding_alone_blames_its_part(check: str, sentence: str, part: str) -> None:
    """What a single failing check says is who is blamed, and the blame carries its sentence."""
    found = blame([seen(check, sentence)])
    assert (part in found.parts, found.check, found.sentence) == (True, check, sentence)


@given(
    st.integers(0, len(LADDER) - 1), st.sets(st.sampled_from(FAILURES).map(lambda e: e.check)), st.randoms()
)
def test_what_comes_first_in_the_walk_explains_the_rest(
    first: int, later: set[str], rng: random.Random
) -> None:
    """Further failures below the first change nothing, in whatever order the evidence comes."""
    found = [e for n, e in enumerate(FAILURES) if n == first or (n > first and e.check in later)]
    rng.shuffle(found)
    assert LADDER[first][2] in blame(kills(found, CLEAN)).parts


def test_wrong_blocks_explain_wrong_weights() -> None:
    """Weights decoded wrong are not a file read wrong."""
    assert blame([seen("file.weights"), seen("blocks.q4_k")]).parts == ("blocks",)


def test_a_setting_explains_nothing_that_a_stage_shows() -> None:
    """A wrong epsilon in the configuration and a wrong norm: the norm is blamed."""
    found = [seen("file.configuration", "norm_eps"), seen("stages.early", f"blk.0.attn_norm {WRONG}")]
    assert blame(found).parts == ("attn_norm",)


def test_early_positions_are_asked_before_late_ones() -> None:
    """The late positions are downstream of the early ones; alone, they decide."""
    late = seen("stages.late", f"blk.0.attn {WRONG}")
    assert blame([late, seen("stages.early", f"embed {WRONG}")]).parts == ("embed",)
    assert blame([late]).parts == ("attn",)


def test_a_trace_is_blamed_only_while_the_logits_are_right() -> None:
    """Shared buffers make every stage wrong, but not the tokens."""
    shared = [
        seen("stages.untouched", "embed and q share one buffer"),
        seen("stages.early", f"embed {WRONG}"),
    ]
    assert blame(shared).parts == ("trace",)
    assert blame([*shared, seen("tokens.teacher_forced")]).parts == ("embed",)


@pytest.mark.parametrize("check", ["tokens.greedy", "tokens.sampled"])
@pytest.mark.parametrize(("cause", "part"), CAUSES.items())
def test_a_text_blames_the_cause_of_its_first_wrong_token(check: str, cause: str, part: str) -> None:
    """What the comparison found out about a token decides, past what was excused before it."""
    texts = [{"cause": "near tie", "near_tie": True}, {"cause": cause, "near_tie": False}]
    assert blame([seen(check, divergences=texts)]).parts == (part,)


def test_a_batch_explains_a_text_and_a_sequence_alone_explains_a_batch() -> None:
    """Chunks go wrong without company; texts are written in it."""
    text = seen("tokens.sampled", divergences=[{"cause": "batch", "near_tie": False}])
    assert blame([text, seen("properties.batch")]).check == "properties.batch"
    assert blame([text, seen("properties.batch"), seen("properties.chunking")]).parts == ("state",)


def test_a_changed_file_is_blamed_and_not_the_harness() -> None:
    """The golden's check says which of the two it was."""
    assert blame([seen("tokens.golden_is_current", side="file")]).parts == ("file",)
    assert blame([seen("tokens.golden_is_current", side="golden")]).parts == ("harness",)


def test_stages_that_nobody_saw_are_blamed_before_the_first_wrong_one() -> None:
    """A branch that is left out shows no stage, and the sum behind it is what is seen to be wrong."""
    wrong = seen("stages.early", f"blk.0.out {WRONG}", unseen=["blk.0.act", "blk.0.down"])
    assert blame([wrong]).parts == ("act", "down", "out")


def test_every_cause_is_one_that_a_comparison_gives() -> None:
    """The causes are those of the divergences, and nothing a comparison finds is without one."""
    assert set(get_args(Part)) <= set(CAUSES)


def test_every_op_belongs_to_stages_that_exist() -> None:
    """What an op's failure blames are kinds of the stages that the models name, and prill names no others."""
    networks = [network(arch) for arch in ("llama", "gpt2")]
    networks += [described(arch, *FAMILIES[arch]) for arch in FAMILIES]
    kinds = {stage.kind for each in networks for stage in walks.stages(each).values()}
    assert kinds == {*KINDS, *OUTER}
    assert {kind for stages in OPS.values() for kind in stages} <= kinds
