"""Hypotheses of what only some families have: each mistake is made on a random file of one, and named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import gguf
import numpy as np
import pytest

from prill_harness.faults.opening import open_engine
from prill_harness.numbers.compare import nmse
from prill_harness.stages.hypotheses.case import Case, explain, guesses
from prill_harness.stages.subject import open_subject
from prill_harness.stages.trace import capture

from .families import VOCAB, write
from .test_hypotheses import FLOOR, clean_cases, every_mistake_named

POSITIONS = 30  # past the original lengths, where divisors and factors change
# Families that have between them every option, and the kinds of stages that the options change.
SOME = ("qwen3moe", "phi3", "gemma2", "gemma3", "gptneox", "mistral3", "gpt-oss")
KINDS = {"embed", "q_norm", "q_rope", "attn", "ffn_norm", "act", "router", "routed", "expert_gate",
         "expert_act", "expert_down", "experts", "out", "logits"}  # fmt: skip
STATED = "where the oracle's differ"
Cases = dict[str, Case]


@pytest.fixture(scope="module", params=SOME)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    """A clean case for every kind of stage of one family, in the last layer that has it."""
    path = tmp_path_factory.mktemp("family") / "made.gguf"
    write(request.param, path, experts=gguf.GGMLQuantizationType.MXFP4)
    with open_engine("numpy64", path) as oracle, open_subject(path) as subject:
        ids = np.random.default_rng(11).integers(0, VOCAB, POSITIONS).tolist()
        stages = capture(oracle, ids).stages
        made = clean_cases(subject, stages, ids)
        yield {kind: replace(case, values=stages) for kind, case in made.items() if kind in KINDS}


def test_every_mistake_of_a_family_is_named(family: Cases) -> None:
    """As on the packaged models: each guess is explained by its own clause or by an equal one."""
    assert every_mistake_named(family) > 90


def test_a_sound_stage_of_a_family_needs_no_explanation(family: Cases) -> None:
    """Right numbers and random errors have none; and what the file states is what the oracle has."""
    random, stated = np.random.default_rng(3), 0
    for kind, case in family.items():
        assert explain(case, FLOOR) is None
        got = case.want * (1 + 1e-3 * random.standard_normal(case.want.shape))
        assert explain(replace(case, got=got), FLOOR) is None, kind
        with np.errstate(all="ignore"):
            for clause, array in guesses(case):
                if STATED in clause:
                    assert nmse(case.want, array) < FLOOR, f"{kind}: {clause}"
                    stated += 1
    assert stated >= 3
