"""Bisect on sound models, some of whose stages are zeros: rounding is no finding, and a mistake is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prill_fixtures import sound
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.lanes import EXACT
from prill_harness.stages.bisect import Report, bisect
from prill_harness.stages.bounds import stage_bounds
from prill_harness.stages.subject import open_subject
from prill_harness.stages.trace import Trace, capture

from .test_sound_models import GPT2, PLAIN

IDS = list(range(1, 17))
ODD = {
    "an odd head": replace(GPT2, width=63, head_dim=63, heads=1, kv_heads=1),
    "one pair": replace(PLAIN, head_dim=5, rope_dim=2),
    "three pairs": replace(PLAIN, head_dim=7, rope_dim=6, weights="tiny"),
}


def constant(folder: Path, width: int) -> Path:
    """A GPT-2 whose norms are of equal values, and zeros."""
    one = {"width": width, "head_dim": width, "heads": 1, "kv_heads": 1, "biases": False, "context": 16}
    return sound.build(replace(GPT2, weights="constant", **one), folder / "model.gguf")  # type: ignore[arg-type]


def walked(path: Path, stage: str = "", size: float = 1.0) -> Report:
    """The NumPy engine's trace, one stage of it replaced by random numbers, against the oracle."""
    with open_engine("numpy", path) as engine, open_engine("numpy64", path) as oracle:
        bounds = stage_bounds(path, EXACT, IDS, capture(oracle, IDS).stages)
        shown = capture(engine, IDS).stages
        if stage:
            drawn = np.random.default_rng(0).standard_normal(shown[stage].shape)
            shown = {**shown, stage: size * drawn}
        with open_subject(path) as subject:
            assert bisect(engine, oracle, IDS, subject, bounds).ok
            return bisect(Trace(tuple(IDS), shown), oracle, IDS, subject, bounds)


@pytest.mark.parametrize("width", [21, 32, 63])
def test_zeros_that_rounding_moves_are_no_finding(tmp_path: Path, width: int) -> None:
    """A norm of equal values is zeros in the oracle and what rounding makes of them in an engine."""
    report = walked(constant(tmp_path, width))
    assert report.ok
    assert report.observed > 27 * len(IDS) * width  # q, k, v and the others of two layers


def test_zeros_that_a_mistake_moves_are_a_finding(tmp_path: Path) -> None:
    """A thousandth is no rounding of such a norm, and where rounding leaves zeros anything is wrong; no guess
    fits it because there is nothing to compare with."""
    path = constant(tmp_path, 63)
    for stage in ("blk.0.ffn_norm", "blk.0.q", "logits"):
        first = walked(path, stage, 1e-3).findings[0]
        assert (first.stages[0], first.explanation) == (stage, None)


@pytest.mark.parametrize("name", ODD)
def test_every_stage_of_an_odd_model_can_be_wrong(tmp_path: Path, name: str) -> None:
    """Whatever is asked for an explanation, heads without pairs and a single pair are no error of its own."""
    path = sound.build(ODD[name], tmp_path / "model.gguf")
    rotated = ["blk.1.q_rope", "blk.1.k_rope"] if name != "an odd head" else []
    for stage in ("embed", "blk.1.attn_norm", "blk.1.q", "blk.1.attn", *rotated, "logits"):
        assert walked(path, stage).findings[0].stages[0] == stage
