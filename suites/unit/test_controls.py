"""Controls and equality in suites: the oracle alone may excuse a control, and noise is what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prill_fixtures import NAMES, TYPES, sound
from prill_fixtures.sound_vocab import SoundVocabulary
from prill_harness.engines.base import Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.faults.catalogue import named
from prill_harness.faults.opening import open_engine
from prill_harness.numbers import lanes
from prill_harness.numbers.compare import squares, ulp
from prill_harness.planting import faults
from prill_harness.run.checks import CheckFailed, Observer
from prill_harness.tokens.golden import golden_for
from prill_harness.tokens.judge import StepResult, compare_teacher_forced
from prill_suites.common import SAME
from prill_suites.controls import Pair, Texts, Trial, distance
from prill_suites.stages_noise import Noise

from .test_sound_models import GPT2, PLAIN


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trial]:
    """A trial of the NumPy engine on a small random Llama."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    with trial_on(sound.build(replace(PLAIN, context=16), tmp_path / "model.gguf")) as made:
        yield made


@contextmanager
def trial_on(file: Path) -> Iterator[Trial]:
    with ExitStack() as stack:
        engine, oracle = (stack.enter_context(open_engine(spec, str(file))) for spec in ("numpy", "numpy64"))
        assert isinstance(oracle, Embedded)
        yield Trial(Observer(), engine, oracle, golden_for(str(file)))


def results(engines: float, oracles: float, trial: Trial) -> Pair:
    """A run in which the control moves the engine's result by one NMSE and the oracle's by another."""

    def run(engine: Engine) -> Pair:
        return np.ones(4), np.ones(4) + np.sqrt(oracles if engine is trial.oracle else engines)

    return run  # type: ignore[return-value]


def test_a_control_that_differs_is_a_figure(trial: Trial) -> None:
    """The engine's own difference is enough; the oracle is not asked."""
    assert trial.control("moved", results(0.5, float("nan"), trial)) == "NMSE 0.5"  # type: ignore[arg-type]
    assert trial.observe.detail == {}
    assert [metric.name for metric in trial.observe.metrics] == ["control moved NMSE"]


def test_only_the_oracle_excuses_a_control(trial: Trial) -> None:
    """An engine that does not differ where the oracle does fails; where neither does, that is said."""
    with pytest.raises(
        CheckFailed, match=r"the control did not differ \(moved\): NMSE 0, .* oracle's is 0.5"
    ):
        trial.control("moved", results(0.0, 0.5, trial))  # type: ignore[arg-type]
    clause = trial.control("moved", results(0.0, 1e-6, trial))  # type: ignore[arg-type]
    assert clause == "not to be told on this model (the oracle's own difference: NMSE 1e-06)"
    assert trial.observe.detail == {"not_applicable": ["moved"]}
    assert trial.observe.observed == 4


def test_the_oracles_control_is_free_of_faults(trial: Trial) -> None:
    """A fault that is active in the process makes no control of the oracle equal."""
    seen: list[bool] = []

    def run(engine: Engine) -> Pair:
        seen.append(Embedded.tokenize is plain)
        return np.ones(2), np.ones(2)

    plain = Embedded.tokenize
    faults.ambient(named(["bos_missing"]))
    try:
        trial.control("nothing", run)
    finally:
        faults.ambient(())
    assert len(seen) == 2


def test_texts_that_part_at_a_tie_are_no_control(trial: Trial) -> None:
    """Two texts of the oracle that only the last bits of equal logits tell apart excuse the engine's one."""
    row = trial.oracle.logits([1])[-1]
    best, worst = int(row.argmax()), int(row.argmin())

    def write(other: int) -> Texts:
        return lambda engine: ([best], [other if engine is trial.oracle else best])  # type: ignore[return-value]

    with pytest.raises(CheckFailed, match="the control did not differ: texts"):
        trial.two_texts("texts", [[1]], write(worst))  # type: ignore[arg-type]
    trial.tau = lambda logits: 1e9  # type: ignore[method-assign]
    assert "not to be told" in trial.two_texts("texts", [[1]], write(worst))  # type: ignore[arg-type]


def test_equality_is_as_tight_as_it_was_on_the_fixtures() -> None:
    """The bound of the exact lane lies below the arithmetic's on every packaged model, so it widens none."""
    for name in ("llama-tiny", "gpt2-tiny"):
        for type in TYPES:
            floor = golden_for(f"fixture:{name}:{type}").floors["exact"]
            assert lanes.bounds(lanes.EXACT, floor).nmse < SAME["float32"]
            assert math.sqrt(2) * floor.dlogprob_max < 1e-4


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt-oss-tiny"])
def test_what_logits_lose_when_they_are_stored_widens_no_bound_of_the_fixtures(name: str) -> None:
    """The logits of packaged models are rounded to float32 by less than the noise of their lanes.

    Those of gpt-oss are not, behind the ids that every turn begins with, of which it is too certain.
    """
    golden = golden_for(f"fixture:{name}")
    with open_engine("numpy64", f"fixture:{name}") as oracle:
        most = max(float(np.abs(oracle.logits(p.sequence)).max()) for p in golden.prompts[:2])
    assert 10 < most < 100
    for floor in golden.floors.values():
        assert lanes.stored(floor, most) == floor


def test_equal_rows_of_a_head_may_differ_in_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal logits leave a floor of next to nothing, and a unit in the last place of them is no regression;
    a hundred are one."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    recipe = replace(PLAIN, head="equal", context=16, width=21, vocabulary=SoundVocabulary("spm", 61))
    with trial_on(sound.build(recipe, tmp_path / "model.gguf")) as trial:
        plain, most = (
            trial.engine.logits,
            max(float(np.abs(trial.oracle.logits(prompt.sequence)).max()) for prompt in trial.golden.prompts),
        )

        def moved(units: int) -> StepResult:
            by = units * ulp(most, "float32") * (np.arange(61) % 2)
            monkeypatch.setattr(trial.engine, "logits", lambda ids: plain(ids) + by.astype(np.float32))
            return compare_teacher_forced(trial.engine, trial.golden, trial.oracle)

        assert moved(1).ok
        worse = moved(100)
        assert not worse.ok
        assert "kl_max" in worse.sentence


def test_distance_from_zeros_is_finite_and_from_a_nan_is_not() -> None:
    """Against zeros an error is the largest figure, so that a floor of zeros can bound it; a NaN is none."""
    zeros, ones = np.zeros(3), np.ones(3)
    assert distance(zeros, zeros) == 0.0
    assert distance(zeros, ones) == lanes.AGAINST_ZEROS
    assert distance(ones, np.array([1.0, 1.0, np.nan])) == np.inf


def usual_error(noise: Noise, stage: str, right: NDArray[np.float64]) -> float:
    """The root of the mean square by which the draws of a noise leave the numbers of a stage."""
    errors = [noise.stages(draw)[stage][: len(right)] - right for draw in range(noise.draws)]
    return float(np.sqrt(np.mean(np.square(errors))))


@pytest.mark.parametrize("norms", ["random", "zero"])
def test_a_stage_is_excused_by_its_own_noise_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norms: str
) -> None:
    """Beyond the logits' bound a stage may be as far off as the lane there times its ratio; more, or where
    the lane leaves nothing anything at all, is wrong."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    file = sound.build(replace(PLAIN, context=16, norms=norms), tmp_path / "model.gguf")
    with trial_on(file) as trial:
        ids = trial.texts[0][:8]
        noise = Noise(trial.engine, trial.golden, ids, 2)
        truth = {name: np.asarray(a, np.float64).reshape(8, -1)[2:] for name, a in trial.oracle.trace(ids)}
        if norms == "zero":  # whatever enters, what leaves such a norm is zeros, in every rounding
            zeros = truth["blk.1.ffn_norm"]
            assert not zeros.any()
            assert np.array_equal(noise.stages()["blk.1.ffn_norm"], zeros)
            assert not noise.explains("blk.1.ffn_norm", zeros, zeros + 1e-12)
            return
        right, usual = truth["blk.1.out"], usual_error(noise, "blk.1.out", truth["blk.1.out"])
        assert usual > 0
        assert noise.explains("blk.1.out", right, right + 9 * usual)
        assert not noise.explains("blk.1.out", right, right + 11 * usual)
        assert not noise.explains("no.such.stage", right, right)


@pytest.mark.parametrize("weights", ["constant", "tiny"])
def test_sums_of_equal_terms_err_one_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """Where all terms of a sum are equal, float32 errs the same way at every step: a float64 pass whose sums
    were taken one term after another is as far off as the engine, one that was rounded at random is not."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    recipe = replace(PLAIN, context=256, weights=weights)
    file = sound.build(recipe, tmp_path / "model.gguf")
    with trial_on(file) as trial:
        ids = (trial.texts[0] * 256)[:256]
        noise = Noise(trial.engine, trial.golden, ids, 128)
        truth, got = (
            {n: np.asarray(a, np.float64).reshape(256, -1)[128:] for n, a in e.trace(ids)}
            for e in (trial.oracle, trial.engine)
        )
        for name, right in truth.items():
            error, _ = squares(right, got[name])
            own, energy = squares(right, noise.stages()[name])
            assert error <= lanes.TYPE_RATIO * own or error <= 1e-13 * energy, name


def test_noise_of_a_single_number_is_not_judged_by_one_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all logits of a row are one number, a draw is now and then next to nothing: the usual size of the
    noise decides, nine times of which is rounding and eleven are not."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    recipe = replace(PLAIN, head="equal", context=64)
    with trial_on(sound.build(recipe, tmp_path / "model.gguf")) as trial:
        ids = (trial.texts[0] * 64)[:64]
        noise, truth = Noise(trial.engine, trial.golden, ids, 0), np.asarray(trial.oracle.logits(ids))
        unlucky = 0
        for at in range(64):
            row, right = slice(at, at + 1), truth[at : at + 1]
            drawn = [noise.stages(draw)["logits"][row] - right for draw in range(noise.draws)]
            usual = float(np.sqrt(np.mean(np.square(drawn))))
            unlucky += sum(np.abs(one).max() < usual / 10 for one in drawn)
            assert noise.explains("logits", right, right + 9 * usual, row)
            assert not noise.explains("logits", right, right + 11 * usual, row)
        assert unlucky  # by such a draw alone a usual error would be no rounding


@pytest.mark.parametrize(("width", "context"), [(21, 16), (31, 64), (13, 256)])
def test_a_mean_of_equal_rows_keeps_their_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, context: int
) -> None:
    """What an engine makes of a constant GPT-2, whose norms are of equal values, is within the noise of every
    stage, attention too: rows that are equal err alike, and their mean by as much."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    one = {"width": width, "head_dim": width, "heads": 1, "kv_heads": 1, "biases": False}
    file = sound.build(replace(GPT2, weights="constant", context=context, **one), tmp_path / "model.gguf")  # type: ignore[arg-type]
    with trial_on(file) as trial:
        ids, late = (trial.texts[0] * context)[:context], context // 2
        noise = Noise(trial.engine, trial.golden, ids, late)
        truth, got = (
            {n: np.asarray(a, np.float64).reshape(context, -1)[late:] for n, a in e.trace(ids)}
            for e in (trial.oracle, trial.engine)
        )
        assert not any(truth[f"blk.{layer}.attn"].any() for layer in (0, 1))
        assert any(got[f"blk.{layer}.attn"].any() for layer in (0, 1))
        for name, right in truth.items():
            assert noise.explains(name, right, got[name]), name
            if name.endswith("attn"):
                usual = usual_error(noise, name, right)
                assert not noise.explains(name, right, right + 11 * usual), name
