"""The witness: a second reading of a file that shares no code with the oracle, and judges it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

import prill_fixtures
from prill_fixtures import sound, types
from prill_fixtures.config import SPECIAL
from prill_harness import open_engine
from prill_harness.engines.embedded import NumPy64
from prill_harness.faults.catalogue import catalogue, named
from prill_harness.numbers.compare import nmse
from prill_harness.planting import faults
from prill_harness.records.evidence import Evidence, Status
from prill_harness.records.ledger import read
from prill_harness.run.checks import CheckFailed, Observer
from prill_harness.tokens.golden import golden_for
from prill_harness.witness import naive as witness
from prill_harness.witness import reading, sensitivity, turning
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.run import model as engine
from prill_suites import witness as suite
from prill_suites.witness import SUMMED, limit, moved

from .commandline import child
from .sound_models import recipes
from .test_sound_models import PLAIN
from .test_split import split
from .tiny_gguf import tiny

Floats = NDArray[np.floating[Any]]
LLAMA = "fixture:llama-tiny"
IDS = [1, 5, 9, 200, 7, 7, 31, 300, 2, 77]


def oracle_and_witness(path: Path, ids: list[int]) -> tuple[Floats, Floats]:
    """Logits (id, vocabulary) of both."""
    with open_engine("numpy64", str(path)) as oracle:
        assert isinstance(oracle, NumPy64)
        return np.asarray(oracle.logits(ids)), witness.logits(witness.read(path), ids)


def test_the_witness_imports_nothing_of_prill() -> None:
    """Its only libraries are gguf, NumPy and Python's own, and it stays small enough to be read in one go."""
    libraries = {
        "__future__", "collections", "dataclasses", "functools", "importlib", "pathlib", "typing", "math",
        "gguf", "numpy",
    }  # fmt: skip
    for part in (reading, turning, witness):
        source = inspect.getsource(part)
        nodes = list(ast.walk(ast.parse(source)))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        own = {name for name in names if name.startswith("prill_harness.witness.")}
        assert own <= {reading.__name__, turning.__name__}
        assert {name.split(".")[0] for name in names - own} <= libraries
        assert len(source.splitlines()) <= 300


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in prill_fixtures.NAMES for k in ("f16", "q8_0", "q4_k", "q6_k") if k in types(n)],
)
def test_it_agrees_with_the_oracle_on_the_fixtures(name: str, kind: str) -> None:
    """Ten positions of each fixture, to float64's own rounding."""
    assert nmse(*oracle_and_witness(prill_fixtures.path(name, kind), IDS)) <= SUMMED


@settings(max_examples=15, deadline=None)
@given(recipe=recipes())
def test_every_change_to_a_sound_model_moves_both_alike(
    tmp_path_factory: pytest.TempPathFactory, recipe: sound.Recipe
) -> None:
    """As the file is, and with each thing changed that can be: oracle and witness give the same logits."""
    path = sound.build(recipe, tmp_path_factory.mktemp("sound") / "model.gguf")
    whole = witness.read(path)
    ids = [n % recipe.vocabulary.size for n in IDS][: recipe.context]
    base = sensitivity.shallow(whole)
    before = witness.logits(base, ids)
    varied = list(sensitivity.variations(base, len(ids)))
    assert len({variation.name for variation in varied}) == len(varied) > 4
    for variation in varied:
        expected = witness.logits(variation.reading, ids)
        got = sensitivity.oracle_logits(path, variation.reading, ids)
        error = nmse(expected, got)
        assert error <= limit(error, variation.reading, ids, expected), f"{variation.name} of {recipe}"
    error = nmse(before, sensitivity.oracle_logits(path, base, ids))
    assert error <= limit(error, base, ids, before)


SHOWN = {
    "llama-window": {"head count"}, "llama-long": {"head count"},
    "gpt-oss-tiny": {"blk.0.attn_sinks.weight", "expert_used_count", "blk.0.ffn_gate_inp.bias",
                     "blk.0.ffn_gate_exps.bias", "blk.0.ffn_up_exps.bias", "blk.0.ffn_down_exps.bias"},
    "gemma3-tiny": {"rope.freq_base_swa", "attn_logit_softcapping", "final_logit_softcapping",
                    "blk.0.attn_q_norm.weight", "blk.0.post_ffw_norm.weight"},
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_everything_that_a_special_fixture_says_shows(name: str) -> None:
    """Window, eps, base, scaling, divisors, head count, head and each bias, and what it alone has: changed in
    the reading, each moves the witness; on these models there is nothing that cannot be told."""
    base = witness.read(prill_fixtures.path(name))
    before = witness.logits(base, IDS)
    varied = {v.name: v.reading for v in sensitivity.variations(base, len(IDS))}
    assert {"eps", "rope base", "rope scaling factor", "window", "tie"} | SHOWN[name] < set(varied)
    assert {"rope dimension", "rope_freqs.weight", "blk.0.attn_output.bias", "blk.0.attn_q.bias"} < set(
        varied
    )
    for what, other in varied.items():
        assert moved(before, witness.logits(other, IDS)), what


def test_it_reads_all_parts_of_a_split_model(tmp_path: Path) -> None:
    """The parts, opened by the first, give the logits of the whole."""
    expected = witness.logits(witness.read(tiny(tmp_path / "whole.gguf")), IDS[:6])
    assert np.array_equal(expected, witness.logits(witness.read(split(tmp_path)), IDS[:6]))


def test_a_change_is_seen_by_its_size() -> None:
    """What moves nothing is told from what does: a window as wide as the prompt, and a shorter one."""
    reading = sensitivity.shallow(witness.read(prill_fixtures.path("llama-tiny")))
    before = witness.logits(reading, IDS)
    wide, narrow = (reading.with_keys(attention__sliding_window=n) for n in (len(IDS), len(IDS) - 1))
    assert not moved(before, witness.logits(wide, IDS))
    assert moved(before, witness.logits(narrow, IDS))


@pytest.mark.parametrize("fault", ["common_rope_pairing", "common_residual_of_norm", "common_window_ignored"])
def test_only_the_witness_sees_what_engine_and_oracle_share(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a user's file the shared mistake is in the golden too: every stage and token agrees, and the witness
    alone says that the oracle is wrong."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    mine, out = sound.build(PLAIN, tmp_path / "mine.gguf"), tmp_path / "out"
    record = (
        "from prill_harness.faults.catalogue import named; from prill_harness.planting import faults\n"
        "from prill_harness.tokens import golden\n"
        f"faults.ambient(named([{fault!r}]))\ngolden.golden_for({str(mine)!r})\n"
    )
    subprocess.run([sys.executable, "-c", record], check=True, timeout=60)
    checks = ("witness", "stages.early", "tokens.greedy")
    child("run", "--engine", f"numpy+fault:{fault}", "--model", str(mine), "--out", str(out), *checks)
    found = {e.check: e for e in read(out / "ledger.jsonl") if isinstance(e, Evidence)}
    assert found["stages.early"].status is Status.PASSED
    assert found["tokens.greedy"].status is Status.PASSED
    red = [e for name, e in found.items() if name.startswith("witness.") and e.status is Status.FAILED]
    assert any("the oracle is wrong" in e.sentence or "is not read" in e.sentence for e in red)


def printed(code: str) -> float:
    """The number that a Python program of its own prints."""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    return float(done.stdout)


def test_a_fault_of_both_is_in_the_oracle_too() -> None:
    """Planted for a process, a common fault stays where an engine's own is suspended."""
    common = [name for name, fault in catalogue().items() if fault.area == "common"]
    assert len(common) > 20
    code = (
        "from prill_harness.faults.catalogue import named; from prill_harness.planting import faults\n"
        "from prill_harness import open_engine\n"
        "faults.ambient(named([{!r}]))\n"
        "with open_engine('numpy64', 'fixture:llama-tiny') as e: print(float(e.logits([1, 5, 9])[-1, 0]))\n"
    )
    said = {name: printed(code.format(name)) for name in ("rope_pairing", "common_rope_pairing")}
    with open_engine("numpy64", LLAMA) as engine:
        right = float(engine.logits([1, 5, 9])[-1, 0])
    assert said["rope_pairing"] == right
    assert said["common_rope_pairing"] != right


def test_a_wrong_reading_is_not_excused_by_rounding(tmp_path: Path) -> None:
    """Asked how far other roundings move it, the witness excuses next to nothing on a model with contents."""
    reading = witness.read(sound.build(PLAIN, tmp_path / "model.gguf"))
    expected = witness.logits(reading, IDS[:6])
    assert 0 < nmse(expected, witness.logits(reading.rounded(), IDS[:6])) < SUMMED
    assert limit(0.0, reading, IDS[:6], expected) == SUMMED
    assert limit(1.0, reading, IDS[:6], expected) < 1e-24


def test_wrong_arithmetic_cannot_widen_its_own_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A golden that a float32 pass with too few bits recorded is found out on a file nobody else judges."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    path = sound.build(replace(PLAIN, context=64), tmp_path / "model.gguf")
    suite.test_floors(Observer(), golden_for(str(path)), path)

    class Coarse(NumpyBackend):
        """Float32 whose products are kept in half precision."""

        def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
            y = super().linear(x, weight, bias)
            return y.astype(np.float16).astype(y.dtype) if y.dtype == np.float32 else y

    monkeypatch.setattr(engine, "NumpyBackend", Coarse)
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "another"))
    with pytest.raises(CheckFailed, match=r"the noise floor of the lane exact is NMSE .* rounding leaves"):
        suite.test_floors(Observer(), golden_for(str(path)), path)


def test_a_fault_of_the_engine_is_none_of_the_oracle() -> None:
    """In a process whose engine is faulty the oracle reads changed files as ever; a fault of both stays."""
    path, own, both = prill_fixtures.path("llama-tiny"), "gqa_interleaved", "common_gqa_interleaved"
    found = {}
    for name in ("", own, both):
        faults.ambient(named([name] if name else ()))
        try:
            found[name] = sensitivity.oracle_logits(path, sensitivity.shallow(witness.read(path)), IDS)
        finally:
            faults.ambient(())
    assert np.array_equal(found[""], found[own])
    assert not np.allclose(found[""], found[both])
