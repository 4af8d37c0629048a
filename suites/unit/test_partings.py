"""Where a text parts from the golden: at a tie, in a batch, by what was kept, or at a stale golden."""

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
from prill_harness.engines.embedded import Embedded, NumPy, NumPy64
from prill_harness.faults.catalogue import named
from prill_harness.planting import faults
from prill_harness.records.evidence import Status
from prill_harness.tokens.golden import Golden, record
from prill_harness.tokens.judge import StepResult, compare_greedy, compare_sampled, compare_teacher_forced

from .test_tokens import PROMPTS, Logits, Planted, swap
from .tiny_gguf import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("partings") / "model.gguf")


@pytest.fixture(scope="module")
def golden(model: Path) -> Golden:
    return record(model, PROMPTS, tokens=24)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Iterator[Embedded]:
    with open_engine("numpy64", str(model)) as engine:
        assert isinstance(engine, Embedded)
        yield engine


@pytest.fixture(scope="module")
def sound(model: Path) -> Iterator[Engine]:
    with open_engine("numpy", str(model)) as engine:
        yield engine


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Golden]:
    """A model whose ids 300 and 310 always have the very same logit, and win often."""

    def twin(tensors: dict[str, NDArray[np.float32]]) -> None:
        tensors["output.weight"][300] *= 4
        tensors["output.weight"][310] = tensors["output.weight"][300]

    path = tiny(tmp_path_factory.mktemp("tied") / "model.gguf", context=64, edit=twin)
    return path, record(path, PROMPTS, tokens=30)


def test_the_other_of_two_equal_rows_is_no_finding(tied: tuple[Path, Golden]) -> None:
    """Ids with the very same logits: whichever an engine writes, greedy or drawn, is right and is no near tie
    that a budget counts; a third id is wrong."""
    path, golden = tied
    # A penalty tells apart two ids of which one has been written.
    plain = [
        msgspec.structs.replace(p, sampled=[run for run in p.sampled if run.repetition_penalty == 1])
        for p in golden.prompts
    ]
    golden = msgspec.structs.replace(golden, prompts=plain)
    assert any(300 in prompt.tokens for prompt in golden.prompts)
    assert any(300 in run.tokens for prompt in golden.prompts for run in prompt.sampled)
    with open_engine("numpy", str(path)) as engine:
        assert compare_greedy(engine, golden).ok
        for step in (compare_greedy, compare_sampled):
            other = Planted(engine, generate=lambda ids: [310 if t == 300 else t for t in ids])
            finding = step(other, golden)
            assert finding.ok, finding.sentence
            assert finding.detail["ties"] > 0
            assert finding.detail["near_ties"] == 0
            assert "the oracle's logits of the two are equal" in finding.sentence
            third = Planted(engine, generate=lambda ids: [311 if t == 300 else t for t in ids])
            assert step(third, golden).status is Status.FAILED


def test_a_filter_keeps_any_of_equal_rows(tmp_path: Path) -> None:
    """Where all rows of the head are equal, the last bits of a summation order decide which of them top-k
    keeps: a golden of another machine is not stale, and an engine that draws others is right."""

    def equal(tensors: dict[str, NDArray[np.float32]]) -> None:
        tensors["output.weight"][:] = tensors["output.weight"][0]

    path = tiny(tmp_path / "model.gguf", context=64, edit=equal)
    golden = record(path, PROMPTS, tokens=12)
    assert any(run.top_k for prompt in golden.prompts for run in prompt.sampled)
    elsewhere = [
        msgspec.structs.replace(
            prompt,
            sampled=[
                msgspec.structs.replace(run, tokens=[100 + token % 100 for token in run.tokens])
                for run in prompt.sampled
                if run.repetition_penalty == 1
            ],
        )
        for prompt in golden.prompts
    ]
    with open_engine("numpy", str(path)) as engine:
        finding = compare_sampled(engine, msgspec.structs.replace(golden, prompts=elsewhere))
        assert finding.ok, finding.sentence
        assert finding.detail["ties"] > 0
        assert finding.detail["near_ties"] == 0


def test_equal_rows_that_round_apart_are_no_flips(tied: tuple[Path, Golden]) -> None:
    """An engine whose second of two equal rows always comes out a bit above the first flips no token."""
    path, golden = tied

    def above(logits: Logits) -> Logits:
        logits[:, 310] = np.nextafter(logits[:, 300], np.float32(np.inf))
        return logits

    with open_engine("numpy", str(path)) as engine:
        finding = compare_teacher_forced(Planted(engine, logits=above), golden)
    assert finding.ok, finding.sentence
    assert finding.detail["flips"] == 0


def in_company(change: Callable[[int, Generation], Generation], most: int = 1) -> type[NumPy]:
    """An engine whose texts change when more than `most` prompts are continued together."""

    class Company(NumPy):
        def generate_batch(self, prompts: Any, **given: Any) -> list[Generation]:
            made = super().generate_batch(prompts, **given)
            return [change(n, text) if len(prompts) > most else text for n, text in enumerate(made)]

    return Company


def off_by_one(at: int) -> Callable[[int, Generation], Generation]:
    return lambda n, text: replace(text, ids=tuple((t + (i == at)) % 320 for i, t in enumerate(text.ids)))


@pytest.mark.parametrize("step", [compare_greedy, compare_sampled])
@pytest.mark.parametrize("blind", [False, True])
def test_what_goes_wrong_in_a_batch_alone_is_not_the_samplers(
    model: Path, golden: Golden, oracle: Embedded, step: Callable[..., StepResult], blind: bool
) -> None:
    """Right logits, right texts alone, other tokens in company: the batch, of a black box too."""
    with in_company(off_by_one(9)).open("", str(model)) as engine:
        hidden = frozenset({Capability.GENERATE, Capability.BATCH})
        if blind:
            engine._info = replace(engine.info, capabilities=hidden)  # type: ignore[attr-defined]
        finding = step(engine, golden, oracle)
    assert finding.status is Status.FAILED
    assert finding.detail["divergences"][0]["cause"] == "batch"
    assert "alone, its prompt gives the expected token: the batch" in finding.sentence
    assert "the sampler" not in finding.sentence


@pytest.mark.parametrize("step", [compare_greedy, compare_sampled])
def test_what_goes_wrong_after_some_tokens_is_not_the_samplers(
    sound: Engine, golden: Golden, oracle: Embedded, step: Callable[..., StepResult]
) -> None:
    """A text that goes wrong at its tenth token, and right when begun anew there: what the engine kept."""
    plant = lambda ids: [*ids[:9], (ids[9] + 1) % 320, *ids[10:]] if len(ids) > 9 else ids  # noqa: E731
    finding = step(Planted(sound, generate=plant), golden, oracle)
    assert finding.status is Status.FAILED
    assert finding.detail["divergences"][0]["cause"] == "cache"
    assert "begun anew at that token" in finding.sentence


def test_a_token_that_does_not_come_again_is_not_the_batchs(
    sound: Engine, golden: Golden, oracle: Embedded
) -> None:
    """An engine that takes one prompt at a time and goes wrong once does not reproduce itself."""
    wrong = iter([off_by_one(9)])

    class Once(Planted):
        @property
        def info(self) -> EngineInfo:
            return replace(self.inner.info, capabilities=self.inner.info.capabilities - {Capability.BATCH})

        def generate(self, ids: Sequence[int], **given: Any) -> Generation:
            return next(wrong, lambda n, text: text)(0, super().generate(ids, **given))

    finding = compare_greedy(Once(sound), golden, oracle)
    assert finding.status is Status.FAILED
    assert "it does not reproduce itself" in finding.sentence
    assert "the batch" not in finding.sentence


@pytest.mark.parametrize("fault", ["seed_reused", "temperature_twice", "philox_rounds"])
def test_a_fault_that_holds_in_the_whole_process_does_not_judge(
    model: Path, golden: Golden, fault: str
) -> None:
    """The judge draws by the sound sampler: the engine's is convicted, golden and oracle are not doubted."""
    faults.ambient(named([fault]))
    try:
        with open_engine(f"numpy+fault:{fault}", str(model)) as engine:
            finding = compare_sampled(engine, golden)
    finally:
        faults.ambient(())
    assert finding.status is Status.FAILED
    assert finding.detail["divergences"][0]["cause"] == "sampler", finding.sentence


def test_a_stale_draw_is_not_blamed_on_the_engine(sound: Engine, golden: Golden, oracle: Embedded) -> None:
    """A golden text whose token today's oracle does not draw is stale, whatever the engine drew."""
    run = golden.prompts[0].sampled[0]
    other = msgspec.structs.replace(run, tokens=[*run.tokens[:5], (run.tokens[5] + 1) % 320, *run.tokens[6:]])
    prompt = msgspec.structs.replace(golden.prompts[0], sampled=[other])
    finding = compare_sampled(sound, msgspec.structs.replace(golden, prompts=[prompt]), oracle)
    assert finding.status is Status.FAILED
    assert (
        "the golden is stale: today's oracle draws another token, so does the candidate" in finding.sentence
    )
    assert finding.detail["divergences"][0]["cause"] == "golden"


def test_an_oracle_that_draws_two_tokens_decides_nothing(sound: Engine, golden: Golden, model: Path) -> None:
    """Token by token it draws the golden's, in one pass another: neither golden nor engine is wrong."""

    class TwoWays(NumPy64):
        def logits(self, ids: Sequence[int]) -> NDArray[np.floating]:
            return super().logits(ids)[:, ::-1]

    with TwoWays.open("", str(model)) as oracle:
        finding = compare_sampled(Planted(sound, generate=swap(5, 7)), golden, oracle)
    assert finding.status is Status.INCONCLUSIVE, finding.sentence
    assert "today's oracle contradicts itself" in finding.sentence
