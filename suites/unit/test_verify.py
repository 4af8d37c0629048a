"""What an engine wrote is judged at every position by one pass of the oracle over it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from prill_harness.engines.base import Capability, Engine, Generation
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.remote import Reply
from prill_harness.faults.opening import open_engine
from prill_harness.numbers import lanes
from prill_harness.records.evidence import Status
from prill_harness.tokens import judge, verify
from prill_harness.tokens.golden import Golden, golden_for
from prill_harness.tokens.golden_pack import Packed
from prill_harness.tokens.verify import Verification, compare_texts, verified
from prill_runtime.errors import EngineError, Inconclusive

from .served import ENDS_AT, WRONG_AT
from .serving import MODEL, Started, oracle, servers, started

__all__ = ["oracle", "servers", "started"]

COUNT = 10


@pytest.fixture(scope="module")
def golden() -> Golden:
    """The fixture's, with two prompts of its eight and a few tokens of each."""
    whole = golden_for(MODEL)
    prompts = [
        msgspec.structs.replace(
            prompt, tokens=prompt.tokens[:COUNT], sampled=[],
            top_ids=Packed.of(prompt.top_ids.array[:COUNT]),
            top_logprobs=Packed.of(prompt.top_logprobs.array[:COUNT]),
        )
        for prompt in whole.prompts[:2]
    ]  # fmt: skip
    return msgspec.structs.replace(whole, prompts=prompts)


def test_a_sound_server_is_clean(started: Started, golden: Golden, oracle: Embedded) -> None:
    """Tokens and logprobs of a float32 server are within the exact lane, and the unseen rest is said."""
    with open_engine(f"{started.url},arithmetic=float32", MODEL) as engine:
        reading = verified(engine, golden, oracle, COUNT)
    choices, numbers = reading.choices(), reading.numbers()
    assert (choices.status, numbers.status) == (Status.PASSED, Status.PASSED)
    assert (reading.positions, reading.flips, len(reading.told)) == (2 * COUNT, 0, 2 * COUNT)
    assert numbers.observed == 2 * COUNT * 20
    unseen = numbers.detail["unseen"]
    assert 0 < unseen < 1
    assert f"not seen: at most {unseen:.2g} of its probability" in numbers.sentence


@pytest.mark.parametrize(
    ("started", "defects", "part", "said"),
    [
        ("llama", "token", "choices", rf"prompt 0, token {WRONG_AT}: expected .* got .*the choice is wrong"),
        ("llama", "bos_twice", "numbers", r"are off in the exact lane: "),
        ("llama", "ends", "choices", rf"prompt 0, token {ENDS_AT}: expected .* the text ends at 2 "),
        ("llama", "ends past_end", "choices", rf"token {ENDS_AT} is the end of the text, and it went on"),
        ("openai", "short", "choices", rf"it wrote {COUNT - 1} tokens of {COUNT} and calls that length"),
        ("openai", "warm", "numbers", r"are off in the exact lane: .*KL max at least .*worst at prompt"),
        ("openai", "log10", "numbers", r"are off in the exact lane: "),
        ("openai", "sum", "numbers", r"are off in the exact lane: .*KL max at least inf"),
        ("openai", "ids_shifted", "numbers", r"are off in the exact lane: "),
        ("openai", "first_missing", "numbers", r"are off in the exact lane: .*\|Δ logprob\|"),
        ("openai", "plain text", "choices", r"token 0: expected .* the text goes on with '\?\?\?"),
        ("openai", "plain token", "choices", rf"prompt 0, token {WRONG_AT}: expected .* goes on with"),
    ],
    indirect=["started"],
)
def test_a_defect_is_found_at_its_place(
    defects: str, part: str, said: str, started: Started, golden: Golden, oracle: Embedded
) -> None:
    """Each defect of a server is found in the step that is about it, at the first token that shows it."""
    started.switch(defects)
    with open_engine(f"{started.url},arithmetic=float32", MODEL) as engine:
        reading = verified(engine, golden, oracle, COUNT)
    found = reading.choices() if part == "choices" else reading.numbers()
    assert found.status is Status.FAILED
    assert re.search(said, found.sentence)
    assert part == "choices" or reading.choices().status is Status.PASSED
    if defects == "token":
        assert reading.positions == 2 * COUNT, "it reads on behind what is wrong"


@pytest.mark.parametrize("started", ["openai"], indirect=True)
def test_a_text_without_ids_is_read_as_text(started: Started, golden: Golden, oracle: Embedded) -> None:
    """A server that tells a text alone is judged on it; its numbers are inconclusive."""
    started.switch("plain no_tokenize")
    with open_engine(f"{started.url},arithmetic=float32,timeout=300", MODEL) as engine:
        reading = verified(engine, golden, oracle, COUNT)
        choices = reading.choices()
        assert choices.status is Status.PASSED
        assert (reading.positions, reading.respelled) == (2 * COUNT, 2)
        assert "2 texts without ids" in choices.sentence
        with pytest.raises(Inconclusive, match="tells no logprobs"):
            reading.numbers()
        with pytest.raises(Inconclusive, match="characters replaced"):
            reading.read("a", [1, 5], Reply.of(finish_reason="length", text="a\ufffdb"), 3)


@pytest.mark.parametrize("fault", ["", "+fault:rope_pairing", "+fault:temperature_zero_sampled"])
def test_planted_faults_are_killed(fault: str, golden: Golden, oracle: Embedded) -> None:
    """An engine of prill's own is read in the same way: clean without, found with a planted fault."""
    with open_engine(f"numpy{fault}", MODEL) as engine:
        found = verified(engine, golden, oracle, COUNT).choices()
    assert found.status is (Status.FAILED if fault else Status.PASSED)


class Textual(Engine):
    """An engine that shows no logits."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.generate = engine.generate  # type: ignore[method-assign]
        self.tokenize = engine.tokenize  # type: ignore[method-assign]
        offered = engine.info.capabilities - {Capability.LOGITS}
        self._info = replace(engine.info, capabilities=offered, draws="own")

    @property
    def info(self):  # type: ignore[no-untyped-def]
        return self._info


def test_it_stands_where_logits_are_not_shown(
    golden: Golden, oracle: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with a golden reads the texts of an engine without logits; a fault ends it there."""
    monkeypatch.setattr(verify, "TOKENS", COUNT)
    with open_engine("numpy", MODEL) as engine:
        found = judge.compare(Textual(engine), golden, oracle)
    steps = {each.step: each.status.value for each in found}
    assert list(steps) == ["tokenizer", "config", "logits", "verified", "told", "greedy", "sampled"]
    assert [steps[name] for name in ("logits", "verified", "told", "greedy", "sampled")] == [
        "inconclusive", "passed", "passed", "passed", "inconclusive",
    ]  # fmt: skip
    with open_engine("numpy+fault:rope_pairing", MODEL) as engine:
        found = judge.compare(Textual(engine), golden, oracle)
    assert [each.step for each in found] == ["tokenizer", "config", "logits", "verified", "told"]
    assert found[-2].status is Status.FAILED


def test_a_context_that_is_too_small_is_no_fault(golden: Golden, oracle: Embedded) -> None:
    """An engine started with fewer positions than a golden fills is not blamed for texts that end early."""
    with open_engine("numpy", MODEL) as engine:
        small = Textual(engine)
        small._info = replace(small.info, config={"served_context": 40})
        found = judge.compare_greedy(small, golden, oracle)
        assert verified(small, golden, oracle, COUNT).positions == 0
    assert found.status is Status.INCONCLUSIVE
    assert "the engine was started with 40" in found.sentence


def reader(golden: Golden, oracle: Embedded) -> Verification:
    """In the lane of F16, whose noise is large enough for near ties to be found."""
    return Verification(oracle, lanes.type_lane("f16"), golden.floors["f16"], oracle.model.context_length)


def seconds(low: float, high: float) -> Iterator[tuple[list[int], int]]:
    """Places of the fixture's golden at which the second best token is between so far below the best: what
    stands before it, and the token."""
    for prompt in golden_for(MODEL).prompts:
        for at in np.flatnonzero((prompt.margins > low) & (prompt.margins < high)):
            yield [*prompt.ids, *prompt.tokens[:at]], int(prompt.top_ids.array[at, 1])


def read_second(reading: Verification, place: tuple[list[int], int]) -> None:
    ids, token = place
    reading.read("second", ids, Reply.of(ids=(token,), finish_reason="length", top=()), 1)


def test_a_token_within_noise_is_a_near_tie_and_beyond_it_is_wrong(golden: Golden, oracle: Embedded) -> None:
    """The second best token is right exactly if the oracle's margin over it is within the lane's tau."""
    tau = lanes.tau(reader(golden, oracle).lane, golden.floors["f16"], 0.0)
    for near, (low, high) in ((True, (0.0, 0.95 * tau)), (False, (1.05 * tau, 2 * tau))):
        places = sorted(seconds(low, high), key=lambda place: len(place[0]))[:4]
        assert len(places) == 4
        for place in places:
            reading = reader(golden, oracle)
            read_second(reading, place)
            assert (reading.flips, len(reading.wrong)) == (1, 0 if near else 1)
            found = reading.choices().sentence
            assert ("is no near tie" in found) is not near


def test_more_near_ties_than_noise_explains_are_too_many(golden: Golden, oracle: Embedded) -> None:
    """Tokens each within noise, but far enough from a tie that noise would flip few of them."""
    reading = reader(golden, oracle)
    tau = lanes.tau(reading.lane, reading.floor, 0.0)
    for place in sorted(seconds(0.5 * tau, 0.95 * tau), key=lambda place: len(place[0]))[:6]:
        read_second(reading, place)
    found = reading.choices()
    assert (reading.wrong, found.status) == ([], Status.FAILED)
    assert "6 of 6 tokens are not the oracle's best, though each is near it" in found.sentence


def test_what_cannot_be_read_is_wrong_or_inconclusive(golden: Golden, oracle: Embedded) -> None:
    """An id outside the vocabulary is wrong; no token at all leaves nothing to say."""
    reading, prompt = reader(golden, oracle), golden.prompts[0]
    read = (*prompt.tokens[:2], 10**6)
    reading.read("odd", prompt.ids, Reply.of(ids=read, finish_reason="length", top=()), 3)
    assert "odd: token 2 is 1000000 (outside the vocabulary)" in reading.choices().sentence
    with pytest.raises(Inconclusive, match="no token was written"):
        reader(golden, oracle).choices()
    silent = reader(golden, oracle)
    silent.read("silent", prompt.ids, Reply.of(ids=(), finish_reason="length", top=()), 3)
    assert "it wrote 0 tokens of 3" in silent.choices().sentence


def test_a_failing_engine_stops_the_reading(golden: Golden, oracle: Embedded) -> None:
    """What an engine raises is the step's result, and the second step is not claimed."""

    class Failing(Textual):
        def __init__(self, engine: Engine) -> None:
            super().__init__(engine)
            self.generate = self.fails  # type: ignore[method-assign,assignment]

        def fails(self, *_: object, **__: object) -> Generation:
            raise EngineError("out of memory")

    with open_engine("numpy", MODEL) as engine:
        (found,) = compare_texts(Failing(engine), golden, oracle)
    assert (found.step, found.status) == ("verified", Status.FAILED)
    assert "the engine stopped: engine failed: out of memory" in found.sentence
