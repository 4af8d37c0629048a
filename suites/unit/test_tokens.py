"""The token comparison finds each planted fault, at its own step, with the right sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness import Capability, Engine, EngineInfo, Generation, open_engine
from prill_harness.engines.embedded import Embedded
from prill_harness.records.evidence import Status
from prill_harness.tokens.golden import Golden, record
from prill_harness.tokens.golden_pack import Packed
from prill_harness.tokens.judge import (
    StepResult,
    compare,
    compare_config,
    compare_greedy,
    compare_prompt_ids,
    compare_sampled,
    compare_teacher_forced,
)
from prill_harness.witness.declared import declared, same
from prill_runtime.errors import NotANumber
from prill_runtime.gguf.file import open_gguf

from .tiny_gguf import tiny

PROMPTS = ["the ab cd", "de the"]
Logits = NDArray[np.float32]
Plant = dict[str, Callable[..., Any]]


class Planted(Engine):
    """A sound engine, except for what a test plants: functions over what the sound one returned."""

    def __init__(self, inner: Engine, **plants: Callable[..., Any]) -> None:
        self.inner = inner
        self.plants = plants

    def _planted(self, name: str, value: Any, *given: Any) -> Any:
        return self.plants[name](value, *given) if name in self.plants else value

    @property
    def info(self) -> EngineInfo:
        info: EngineInfo = self._planted("info", self.inner.info)
        return info

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        ids: list[int] = self._planted("tokenize", self.inner.tokenize(text, add_special))
        return ids

    def logits(self, ids: Sequence[int]) -> Logits:
        logits: Logits = self._planted("logits", self.inner.logits(ids))
        return logits

    def generate(self, ids: Sequence[int], **given: Any) -> Generation:
        if "given" in self.plants:
            given = self.plants["given"](given)
        made = self.inner.generate(ids, **given)
        return replace(made, ids=tuple(self._planted("generate", list(made.ids))))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("tokens") / "model.gguf", context=320)


@pytest.fixture(scope="module")
def golden(model: Path) -> Golden:
    return record(model, PROMPTS, tokens=270)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Iterator[Embedded]:
    with open_engine("numpy64", str(model)) as engine:
        assert isinstance(engine, Embedded)
        yield engine


@pytest.fixture(scope="module")
def sound(model: Path) -> Iterator[Engine]:
    with open_engine("numpy", str(model)) as engine:
        yield engine


@pytest.mark.parametrize("spec", ["numpy", "numpy64"])
def test_clean_engines_pass_all_five_steps(model: Path, golden: Golden, spec: str) -> None:
    """Five findings, all ok, each with something observed."""
    with open_engine(spec, str(model)) as engine:
        findings = compare(engine, golden)
    assert [finding.step for finding in findings] == ["tokenizer", "config", "logits", "greedy", "sampled"]
    assert all(finding.ok and finding.observed > 0 for finding in findings), findings
    assert findings[2].observed == sum(len(p.sequence) for p in golden.prompts) * 320
    assert set(findings[2].figures.buckets) == {"1-16", "17-64", "65-256", "257+"}  # type: ignore[union-attr]


def test_a_finding_that_saw_nothing_cannot_be_ok() -> None:
    """ok needs a count above zero, and never goes with inconclusive."""
    with pytest.raises(ValueError, match="cannot be ok"):
        StepResult("logits", True, "nothing", 0)
    with pytest.raises(ValueError, match="cannot be ok"):
        StepResult("logits", True, "half", 3, inconclusive=True)


def test_a_lost_bos_is_a_tokenizer_verdict_and_stops_the_rest(
    sound: Engine, golden: Golden, oracle: Embedded
) -> None:
    """Prompt ids without BOS fail the first step, name both ids, and nothing else runs."""
    findings = compare(Planted(sound, tokenize=lambda ids: ids[1:]), golden, oracle)
    assert [f.step for f in findings] == ["tokenizer"]
    assert findings[0].status is Status.FAILED
    assert "prompt 0 differs at id 0: expected 1 " in findings[0].sentence


def test_a_missing_last_id_is_found(sound: Engine, golden: Golden, oracle: Embedded) -> None:
    """Ids that merely end early are no shorter comparison."""
    finding = compare_prompt_ids(Planted(sound, tokenize=lambda ids: ids[:-1]), golden, oracle)
    assert finding.status is Status.FAILED
    assert "got nothing" in finding.sentence


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_eps", 1e-6),
        ("rope_base", 500000.0),
        ("n_kv_heads", 4),
        ("tied_head", True),
        ("rope_scaling", "linear"),
        ("window", 128),
    ],
)
def test_a_changed_configuration_names_the_key(
    sound: Engine, golden: Golden, oracle: Embedded, key: str, value: float | str | bool
) -> None:
    """Any single value that is not the file's fails, with the file's value and the engine's."""
    changed = Planted(sound, info=lambda info: replace(info, config={**info.config, key: value}))
    finding = compare_config(changed, golden, oracle)
    assert finding.status is Status.FAILED
    assert f"{key}: the file says" in finding.sentence
    assert str(value) in finding.sentence


def test_an_unreported_key_is_inconclusive_and_said(sound: Engine, golden: Golden, oracle: Embedded) -> None:
    """What the engine keeps to itself is not passed; the later steps still run."""

    def hide(info: EngineInfo) -> EngineInfo:
        return replace(info, config={k: v for k, v in info.config.items() if k != "rope_base"})

    findings = compare(Planted(sound, info=hide), golden, oracle)
    assert findings[1].status is Status.INCONCLUSIVE
    assert "does not report rope_base" in findings[1].sentence
    assert len(findings) == 5


def test_the_files_configuration_is_read_without_the_adapter(model: Path, sound: Engine) -> None:
    """The harness's own table and the adapter agree on every key of a sound file."""
    with open_gguf(model) as file:
        facts = declared(file)
    assert len(facts) == 14
    assert all(same(value, sound.info.config[key]) for key, value in facts.items())
    assert not same(1, True)
    assert not same(1e-5, 1e-6)


def late_noise(size: float) -> Callable[[Logits], Logits]:
    def plant(logits: Logits) -> Logits:
        noisy = logits.copy()
        if len(noisy) > 260:
            noisy[260] += size * np.random.default_rng(0).normal(size=noisy.shape[1]).astype(np.float32)
        return noisy

    return plant


def test_noise_at_one_late_position_is_caught_by_its_bucket(
    sound: Engine, golden: Golden, oracle: Embedded
) -> None:
    """One position of 540 is noisy: the mean stays under its bound, the last bucket does not."""
    finding = compare_teacher_forced(Planted(sound, logits=late_noise(5e-5)), golden, oracle)
    assert finding.figures is not None
    assert finding.bounds is not None
    assert finding.figures.kl_mean < finding.bounds.kl_mean
    assert finding.figures.kl_p99 < finding.bounds.kl_p99
    assert finding.status is Status.FAILED
    assert "kl_max[257+]" in finding.sentence
    assert "kl_max[65-256]" not in finding.sentence
    assert "position 261" in finding.sentence


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_fails(
    sound: Engine, golden: Golden, oracle: Embedded, bad: float
) -> None:
    """One NaN in 80,000 logits is enough."""

    def plant(logits: Logits) -> Logits:
        broken = logits.copy()
        broken[3, 5] = bad
        return broken

    assert compare_teacher_forced(Planted(sound, logits=plant), golden, oracle).status is Status.FAILED


def test_truncated_logits_fail(sound: Engine, golden: Golden, oracle: Embedded) -> None:
    """One row less is an error of the engine, not a shorter zip."""
    finding = compare_teacher_forced(Planted(sound, logits=lambda z: z[:-1]), golden, oracle)
    assert finding.status is Status.FAILED
    assert "another shape" in finding.sentence


def test_an_engine_that_stops_is_a_failure(sound: Engine, golden: Golden, oracle: Embedded) -> None:
    """An error out of the engine becomes the step's sentence."""

    def plant(logits: Logits) -> Logits:
        raise NotANumber("12 values are not finite", where="blk.0.q")

    finding = compare_teacher_forced(Planted(sound, logits=plant), golden, oracle)
    assert finding.status is Status.FAILED
    assert "blk.0.q" in finding.sentence


def test_a_missing_capability_is_inconclusive(golden: Golden, oracle: Embedded, sound: Engine) -> None:
    """An engine without logits is not passed on them."""

    class Mute(Engine):
        @property
        def info(self) -> EngineInfo:
            return replace(sound.info, capabilities=frozenset({Capability.GENERATE}))

    finding = compare_teacher_forced(Mute(), golden, oracle)
    assert finding.status is Status.INCONCLUSIVE
    assert "does not offer logits" in finding.sentence


def test_a_half_engine_is_held_to_its_own_lane(sound: Engine, golden: Golden, oracle: Embedded) -> None:
    """Noise that the exact lane refuses passes in the lane of an engine that says it computes in halves."""
    half = Planted(sound, logits=late_noise(3e-4), info=lambda info: replace(info, arithmetic="half"))
    finding = compare_teacher_forced(half, golden, oracle)
    assert finding.ok, finding.sentence
    assert "f16 lane" in finding.sentence


def swap(at: int, token: int) -> Callable[[list[int]], list[int]]:
    return lambda ids: [*ids[:at], token, *ids[at + 1 :]]


def test_another_token_is_wrong_numbers_or_a_wrong_choice(
    sound: Engine, golden: Golden, oracle: Embedded
) -> None:
    """A planted id at token 27 is named with its text, and the engine's own logits convict the choice."""
    right = golden.prompts[0].tokens[27]
    wrong = (right + 1) % 320
    finding = compare_greedy(Planted(sound, generate=swap(27, wrong)), golden, oracle)
    assert finding.status is Status.FAILED
    assert (
        f"prompt 0: first divergence at token 27: expected {golden.prompts[0].tokens[27]} "
        in finding.sentence
    )
    assert "the choice is wrong" in finding.sentence
    first = finding.detail["divergences"][0]
    assert len(first["expected"]) == 17
    assert first["expected"][8] != first["got"][8]
    assert first["margin"] > first["tau"]
    assert first["oracle_top"][0][0] == right


def test_without_logits_another_token_is_wrong_numbers(
    sound: Engine, golden: Golden, oracle: Embedded
) -> None:
    """A black box is judged by the oracle's margin alone."""
    blind = frozenset({Capability.GENERATE})
    engine = Planted(sound, generate=swap(27, 5), info=lambda info: replace(info, capabilities=blind))
    finding = compare_greedy(engine, golden, oracle)
    assert "is no near tie" in finding.sentence
    assert "wrong numbers" in finding.sentence


@pytest.mark.parametrize("step", [compare_greedy, compare_sampled])
def test_truncated_output_fails(
    sound: Engine, golden: Golden, oracle: Embedded, step: Callable[..., StepResult]
) -> None:
    """Fewer tokens than asked for fail even when all of them are right; so do more."""
    for plant in (lambda ids: ids[:-1], lambda ids: [*ids, 1]):
        finding = step(Planted(sound, generate=plant), golden, oracle)
        assert finding.status is Status.FAILED
        assert "tokens, equal up to there" in finding.sentence


def test_an_id_outside_the_vocabulary_fails(sound: Engine, golden: Golden, oracle: Embedded) -> None:
    """A wild id is named as such and crashes nothing."""
    finding = compare_greedy(Planted(sound, generate=swap(3, 99999)), golden, oracle)
    assert finding.status is Status.FAILED
    assert "outside the vocabulary" in finding.sentence


def close_pair(tmp_path: Path, gap: float) -> tuple[Path, Golden]:
    """A model in which ids 300 and 310 differ by a relative `gap` in one weight row, and win often."""

    def twin(tensors: dict[str, NDArray[np.float32]]) -> None:
        tensors["output.weight"][300] *= 4
        tensors["output.weight"][310] = tensors["output.weight"][300] * np.float32(1 - gap)

    path = tiny(tmp_path / "model.gguf", context=64, edit=twin)
    return path, record(path, PROMPTS, tokens=30)


def test_near_ties_are_excused_within_their_budget_only(tmp_path: Path) -> None:
    """A flip the profile predicts is said and passes; with a profile that predicts none it fails."""
    path, golden = close_pair(tmp_path, 2.0**-21)
    blind = frozenset({Capability.GENERATE})
    with open_engine("numpy", str(path)) as engine:
        flipped = Planted(
            engine,
            generate=lambda ids: [310 if t == 300 else t for t in ids],
            info=lambda info: replace(info, capabilities=blind),
        )
        finding = compare_greedy(flipped, golden)
        assert finding.ok, finding.sentence
        assert "near tie, tau" in finding.sentence
        wide = [
            msgspec.structs.replace(
                prompt, top_logprobs=Packed.of(prompt.top_logprobs.array - np.arange(20, dtype=np.float32))
            )
            for prompt in golden.prompts
        ]
        finding = compare_greedy(flipped, msgspec.structs.replace(golden, prompts=wide))
    assert finding.status is Status.FAILED
    assert "part at near ties, at most 0 predicted" in finding.sentence


@pytest.mark.parametrize(
    "change",
    [
        lambda given: {**given, "seed": given.get("seed", 0) + 1},
        lambda given: {**given, "temperature": given.get("temperature", 0) ** 2},
    ],
    ids=["other seed", "temperature applied twice"],
)
def test_a_sampler_that_differs_is_convicted_by_its_own_logits(
    sound: Engine, golden: Golden, oracle: Embedded, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Sound logits, other draws: the sentence says that it is the sampler."""
    finding = compare_sampled(Planted(sound, given=change), golden, oracle)
    assert finding.status is Status.FAILED
    assert "its own logits give the expected token: the sampler" in finding.sentence
    assert "u = 0." in finding.sentence


def shifted(golden: Golden, size: float) -> Golden:
    """The golden as an oracle would have recorded it whose logprobs were off at one step."""
    logprobs = golden.prompts[0].top_logprobs.array.copy()
    logprobs[50, 2:] -= np.float32(size)
    prompt = msgspec.structs.replace(golden.prompts[0], top_logprobs=Packed.of(logprobs))
    return msgspec.structs.replace(golden, prompts=[prompt, *golden.prompts[1:]])


def test_a_stale_golden_is_not_blamed_on_the_engine(sound: Engine, golden: Golden, oracle: Embedded) -> None:
    """When today's oracle disagrees with the golden, the verdict is stale, and says whom to believe."""
    finding = compare_teacher_forced(sound, shifted(golden, 0.1), oracle)
    assert finding.status is Status.FAILED
    assert "the golden is stale" in finding.sentence
    assert "prompt 0, token 50" in finding.sentence
    assert "agrees with today's oracle" in finding.sentence


def test_a_regression_is_not_blamed_on_the_golden(sound: Engine, golden: Golden, oracle: Embedded) -> None:
    """When oracle and golden agree, the engine regressed."""
    finding = compare_teacher_forced(Planted(sound, logits=lambda z: z * np.float32(1.001)), golden, oracle)
    assert "regressed in the exact lane" in finding.sentence
    assert "stale" not in finding.sentence
