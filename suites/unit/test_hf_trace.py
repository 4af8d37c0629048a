"""Arrays that hooks take from transformers' modules, under the modules' own names, go through `bisect`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prill_harness.engines.others.hf import hooked
from prill_harness.faults.opening import open_engine
from prill_harness.numbers import lanes
from prill_harness.stages import trace
from prill_harness.stages.bisect import Report, bisect
from prill_harness.stages.bounds import stage_bounds
from prill_harness.stages.subject import open_subject

torch = pytest.importorskip("torch", reason="needs the extra hf")
pytest.importorskip("transformers", reason="needs the extra hf")

from .hf_models import VOCAB, gpt2, llama, truly_float64  # noqa: E402

__all__ = ["truly_float64"]
pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("truly_float64")]

IDS = np.random.default_rng(11).integers(0, VOCAB, 24).tolist()
MODELS: dict[str, Callable[[Path], tuple[Any, Path]]] = {
    "llama-gqa": lambda folder: llama("gqa", folder),
    "llama-tied-biases": lambda folder: llama("tied_biases", folder),
    "gpt2": lambda folder: gpt2(3, folder),
}


def traced(model: Any) -> trace.Trace:
    """The stages of one pass, as hooks on its modules show them."""
    with hooked(model) as shown, torch.no_grad():
        model.double().eval()(torch.tensor(IDS)[None], use_cache=False)
    return trace.collect(IDS, shown)


def judged(shown: trace.Trace, path: Path) -> Report:
    with open_engine("numpy64", path) as oracle, open_subject(path) as subject:
        truth = trace.capture(oracle, IDS)
        limits = stage_bounds(path, lanes.EXACT, IDS, truth.stages)
        return bisect(shown, oracle, IDS, subject, limits)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_stages_agree(name: str, tmp_path: Path) -> None:
    """Every stage that the hooks of a real model show is found by its name and is right."""
    model, path = MODELS[name](tmp_path)
    report = judged(traced(model), path)
    assert report.ok, report.sentence
    kinds = {stage.stage.rpartition(".")[2] for stage in report.stages}
    shown = {
        "embed",
        "attn_norm",
        "q",
        "k",
        "v",
        "attn",
        "attn_out",
        "ffn_norm",
        "up",
        "down",
        "out",
        "logits",
    }
    assert shown <= kinds | {"ffn_in"}, f"not shown: {sorted(shown - kinds)}"
    assert {s.stage for s in report.stages if s.stage.endswith(".out")} == {f"blk.{n}.out" for n in range(3)}


@pytest.mark.parametrize(
    ("name", "module", "stage"),
    [
        ("llama-gqa", "model.layers.1.mlp.up_proj", "blk.1.up"),
        ("llama-gqa", "model.layers.2.self_attn.o_proj", "blk.2.attn_out"),
        ("gpt2", "transformer.h.1.mlp.c_proj", "blk.1.down"),
    ],
)
def test_one_wrong_module_is_found(name: str, module: str, stage: str, tmp_path: Path) -> None:
    """One weight of one module that is not the file's is the first wrong stage, by prill's name for it."""
    model, path = MODELS[name](tmp_path)
    with torch.no_grad():
        model.get_submodule(module).weight[3, 5] += 0.25
    report = judged(traced(model), path)
    assert report.sentence.startswith(f"{stage} is the first wrong stage"), report.sentence
    assert [finding.stages for finding in report.findings] == [(stage,)]
