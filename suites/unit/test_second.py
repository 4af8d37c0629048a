"""transformers as a second reading of a user's file: it judges the oracle, and outvotes the witness."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prill_fixtures import sound
from prill_harness import open_engine
from prill_harness.engines.embedded import NumPy64
from prill_harness.engines.models import resolve_model
from prill_harness.numbers.compare import nmse
from prill_harness.run.checks import CheckFailed, Observer
from prill_harness.tokens.golden import golden_for
from prill_harness.witness import naive as witness
from prill_harness.witness import second
from prill_runtime.errors import Inconclusive, UsageError
from prill_suites import witness as suite

from .converted import FILE
from .families import FAMILIES, VOCAB, write
from .test_sound_models import GPT2, PLAIN

Judge = Callable[[], Observer]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(second.SECOND_VARIABLE, "hf")


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    """Runs the check witness.logits on a small sound model and gives what it observed."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    path = sound.build(replace(PLAIN, context=32), tmp_path / "model.gguf")
    golden, reading = golden_for(str(path)), witness.read(path)
    with open_engine("numpy64", str(path)) as oracle:
        assert isinstance(oracle, NumPy64)

        def run() -> Observer:
            observer = Observer()
            suite.test_logits(observer, oracle, golden, reading, path)
            return observer

        yield run


def others(monkeypatch: pytest.MonkeyPatch, wrong_witness: bool, wrong_second: bool) -> None:
    """Let the two readings be right or wrong; both are the witness's own numbers, so no package is needed."""
    right = witness.logits
    if wrong_witness:
        monkeypatch.setattr(
            witness, "logits", lambda reading, ids: right(reading, ids) + 0.1 * np.arange(len(ids))[:, None]
        )
    monkeypatch.setattr(
        second, "logits", lambda reading, ids: right(reading, ids) * (1.1 if wrong_second else 1.0)
    )


def test_nobody_is_asked_unless_somebody_says_so(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --second the witness judges alone."""
    monkeypatch.delenv(second.SECOND_VARIABLE, raising=False)
    others(monkeypatch, wrong_witness=False, wrong_second=True)
    assert "transformers" not in judge().sentence


@pytest.mark.usefixtures("asked")
def test_an_oracle_that_transformers_contradicts_is_wrong(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the witness agrees with it: both were written here."""
    others(monkeypatch, wrong_witness=False, wrong_second=True)
    with pytest.raises(CheckFailed, match=r"the oracle is wrong on this file: NMSE .* transformers"):
        judge()


@pytest.mark.usefixtures("asked")
def test_transformers_outvotes_the_witness(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A witness alone against both is what is wrong, and the sentence says so; against one it is right."""
    others(monkeypatch, wrong_witness=True, wrong_second=False)
    seen = judge()
    assert "the witness is outvoted" in seen.sentence
    assert seen.observed > 0
    monkeypatch.delenv(second.SECOND_VARIABLE)
    with pytest.raises(CheckFailed, match="to the witness"):
        judge()


@pytest.mark.usefixtures("asked")
def test_an_architecture_without_a_witness_is_judged_by_transformers(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the witness cannot read is proven by the other reading, and by nothing when it is wrong."""
    others(monkeypatch, wrong_witness=False, wrong_second=False)
    monkeypatch.setattr(witness, "knows", lambda reading: False)
    monkeypatch.setattr(witness, "logits", None)
    assert "the witness does not know the architecture" in judge().sentence


def test_a_reading_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another name, or packages that are not installed: one sentence before anything runs."""
    monkeypatch.delenv(second.SECOND_VARIABLE, raising=False)
    with pytest.raises(UsageError, match="no such second reading"):
        second.ask("vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"expected torch and transformers, got no torch and no transformers"
    ):
        second.ask("hf")
    assert second.SECOND_VARIABLE not in os.environ


def test_what_would_not_fit_into_memory_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts make even two layers large: inconclusive with both counts, before anything is loaded."""
    reading = witness.read(write("gpt-oss", tmp_path / "model.gguf"))
    whole, one = second.parameters(reading), second.parameters(reading.with_keys(block_count=1))
    assert one < whole
    monkeypatch.setattr(second, "MOST_BUILT", one)
    with pytest.raises(Inconclusive, match=rf"too large .* expected at most {one} parameters, got {whole}"):
        second.logits(reading, [1, 2, 3])


RECIPES = {
    "plain": PLAIN,
    "window": replace(PLAIN, context=64, window=5),
    "biases": replace(PLAIN, context=64, biases=True),
    "scaled": replace(PLAIN, context=64, rope_factor=4.0),
    "tied": replace(PLAIN, context=64, tied=True),
    "gpt2": replace(GPT2, context=64),
}


@pytest.mark.hf
@pytest.mark.parametrize("name", RECIPES)
def test_transformers_reads_what_the_witness_reads(name: str, tmp_path: Path) -> None:
    """Window, biases, scaling, tied heads too, to what its float32 norms leave; and another eps shows."""
    pytest.importorskip("torch")
    reading = witness.read(sound.build(RECIPES[name], tmp_path / "model.gguf"))
    ids = [int(i) for i in np.random.default_rng(1).integers(0, reading.count("token_embd.weight"), 24)]
    right = witness.logits(reading, ids)
    assert nmse(right, second.logits(reading, ids)) < 1e-11
    kind = "" if name == "gpt2" else "rms_"
    other = reading.with_keys(**{f"attention__layer_norm_{kind}epsilon": 0.1})
    assert nmse(right, second.logits(other, ids)) > 1e-8


@pytest.mark.hf
@pytest.mark.parametrize("arch", FAMILIES)
def test_transformers_reads_every_family(arch: str, tmp_path: Path) -> None:
    """All keys and tensors of each: what the witness says, to what its float32 leaves; another eps shows."""
    pytest.importorskip("torch")
    reading = witness.read(write(arch, tmp_path / "model.gguf"))
    ids = [int(i) for i in np.random.default_rng(1).integers(0, VOCAB, 28)]
    right = witness.logits(reading, ids)
    assert nmse(right, second.logits(reading, ids)) < 1e-11
    kind = "" if arch == "gptneox" else "rms_"
    other = reading.with_keys(**{f"attention__layer_norm_{kind}epsilon": 0.1})
    assert nmse(right, second.logits(other, ids)) > 1e-8


@pytest.mark.hf
@pytest.mark.parametrize("file", ["gemma3-tiny", "gpt-oss-tiny", "gpt-oss-converted"])
def test_transformers_reads_what_is_packaged(file: str) -> None:
    """Caps, biases, experts in MXFP4 beside bfloat16: as dequantised by gguf."""
    pytest.importorskip("torch")
    reading = witness.read(FILE if file == FILE.stem else resolve_model(f"fixture:{file}"))
    ids = [int(i) for i in np.random.default_rng(1).integers(0, reading.count("token_embd.weight"), 40)]
    assert nmse(witness.logits(reading, ids), second.logits(reading, ids)) < 1e-11


@pytest.mark.hf
def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    """A bias that transformers' Qwen 3 has no room for is not dropped: inconclusive, with its name."""
    pytest.importorskip("torch")
    reading = witness.read(write("qwen3", tmp_path / "model.gguf"))
    tensors = {**reading.tensors, "blk.1.ffn_down.bias": reading.tensors["output_norm.weight"]}
    with pytest.raises(Inconclusive, match=r"other tensors than the file: got blk\.1\.ffn_down\.bias"):
        second.logits(replace(reading, tensors=tensors), [1, 2, 3])


@pytest.mark.hf
def test_what_its_models_lack_is_refused_by_name(tmp_path: Path) -> None:
    """Half a head rotated is nothing that its Llama has: inconclusive, and never the oracle's fault."""
    pytest.importorskip("torch")
    reading = witness.read(sound.build(replace(PLAIN, head_dim=16, rope_dim=8), tmp_path / "model.gguf"))
    with pytest.raises(Inconclusive, match="rotates whole heads"):
        second.logits(reading, [1, 2, 3])
