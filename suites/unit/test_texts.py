"""A command that takes a prompt and writes a text is judged on the text, and its mistake is named by it."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from prill_harness.engines.base import Capability
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import resolve_model
from prill_harness.faults.opening import open_engine
from prill_harness.numbers import lanes
from prill_harness.records.evidence import Status
from prill_harness.stages.subject import open_subject
from prill_harness.stages.written import Rewriter, explained
from prill_harness.tokens.golden import Golden, golden_for
from prill_harness.tokens.verify import Verification, verified
from prill_runtime.errors import EngineError, MissingCapability, UsageError

from .commandline import invoke

MODEL = "fixture:llama-window"
COMMAND = f"exec:{sys.executable} {Path(__file__).with_name('texting.py')} {{model}} {{prompt}} {{tokens}}"
AS_TEXT = ",adapter=text,arithmetic=float32"
COUNT = 12


@pytest.fixture(scope="module")
def golden() -> Golden:
    """The fixture's, with its two shortest prompts."""
    whole = golden_for(MODEL)
    return msgspec.structs.replace(whole, prompts=sorted(whole.prompts, key=lambda p: len(p.ids))[:2])


@pytest.fixture(scope="module")
def oracle() -> Iterator[Embedded]:
    with open_engine("numpy64", MODEL) as engine:
        assert isinstance(engine, Embedded)
        yield engine


def read(words: str, golden: Golden, oracle: Embedded, options: str = AS_TEXT) -> Verification:
    with open_engine(f"{COMMAND}{words}{options}", MODEL) as engine:
        return verified(engine, golden, oracle, COUNT)


@pytest.mark.parametrize(
    ("words", "options"),
    [(" echo", ""), (" banner", ",skip=2"), (" stdin", "")],
    ids=["echo", "banner", "stdin"],
)
def test_a_sound_command_is_right(words: str, options: str, golden: Golden, oracle: Embedded) -> None:
    """Its texts, behind the lines to skip and the prompt it repeats, are spelled as the oracle would; it
    tells no numbers, and nothing is left running."""
    before = set(psutil.Process().children(recursive=True))
    if "stdin" in words:
        spec = COMMAND.replace("{prompt}", "-") + words + AS_TEXT
        with open_engine(spec, MODEL) as engine:
            reading = verified(engine, golden, oracle, COUNT)
    else:
        reading = read(words, golden, oracle, AS_TEXT + options)
    found = reading.choices()
    assert (found.status, reading.respelled, reading.wrong_texts) == (Status.PASSED, 2, []), found.sentence
    assert reading.positions >= COUNT
    with pytest.raises(MissingCapability, match="tells no logprobs"):
        reading.numbers()
    assert set(psutil.Process().children(recursive=True)) <= before


def test_a_wrong_text_names_the_mistake(golden: Golden, oracle: Embedded) -> None:
    """Of a command that pairs the rotary dimensions otherwise: the clause that `prill bisect` finds by its
    numbers. A wrong text that no single mistake writes stays unexplained, and a right one is left alone."""
    found = read(" fault:rope_pairing", golden, oracle).choices()
    assert (found.status, len(found.detail["wrong_texts"])) == (Status.FAILED, 2)
    told = explained(found, oracle)
    assert told.detail["explained"][0] == "pairs (i, i+d/2) instead of (2i, 2i+1)"
    assert told.sentence.startswith(f"{found.sentence}; explained by: pairs (i, i+d/2) instead of (2i, 2i+1)")
    random = [{**each, "text": "The cat sat on a wall"} for each in found.detail["wrong_texts"]]
    strange = replace(found, detail={**found.detail, "wrong_texts": random})
    assert explained(strange, oracle) is strange
    right = Verification(oracle, lanes.EXACT, golden.floors["exact"], 512)
    right.read("a", golden.prompts[0].ids, oracle.generate(golden.prompts[0].ids, max_tokens=3), 3)
    assert explained(right.choices(), oracle).detail.get("explained") is None


def test_a_mistake_is_made_where_its_stage_is(oracle: Embedded) -> None:
    """Without a mistake a writer's logits are the oracle's; a mistake changes them in its kinds of stages
    alone, as the planted fault of the same kind does."""
    ids = golden_for(MODEL).prompts[0].ids[:20]
    with open_subject(resolve_model(MODEL)) as subject:
        writer = Rewriter(oracle, subject)
        assert np.array_equal(writer.rows(ids, lambda case: None), oracle.logits(ids))
        mistakes = list(writer.mistakes(ids))
        assert len(mistakes) > 300
        paired = [each for each in mistakes if each.clause == "pairs (i, i+d/2) instead of (2i, 2i+1)"]
        assert [sorted(each.kinds) for each in paired] == [["k_rope", "q_rope"], ["q_rope"], ["k_rope"]]
        got = writer.rows(ids, paired[0].made)
        half = writer.rows(ids, paired[1].made)
    with open_engine("numpy64+fault:rope_pairing", MODEL) as engine:
        want = engine.logits(ids)
    assert np.allclose(got, want, rtol=0, atol=1e-9)
    assert np.abs(half - want).max() > 1e-3


@pytest.mark.parametrize(
    ("words", "options", "error", "said"),
    [
        (" die", "", EngineError, "ended with exit status 1; it wrote: there is no such model"),
        (" hang", ",timeout=2", EngineError, "no text: expected one within 2 s"),
        (" flood", "", EngineError, "a text without an end"),
        ("", ",skip=99", EngineError, "the output ends before the text"),
    ],
)
def test_a_broken_command_is_an_error_of_the_engine(
    words: str, options: str, error: type[Exception], said: str
) -> None:
    """It dies, hangs, floods or writes too little: one sentence in time, and nothing left running."""
    before, began = set(psutil.Process().children(recursive=True)), time.monotonic()
    with open_engine(f"{COMMAND}{words}{AS_TEXT}{options}", MODEL) as engine:
        ids = golden_for(MODEL).prompts[0].ids
        with pytest.raises(error, match=said):
            engine.generate(ids, max_tokens=2)
    assert time.monotonic() - began < 60
    assert set(psutil.Process().children(recursive=True)) <= before


def test_what_a_command_does_not_take_is_inconclusive_by_name() -> None:
    """Sampling, stops, streams and ids that no text has are missing; nothing is started for them."""
    ids = golden_for(MODEL).prompts[0].ids
    with open_engine(f"exec:{shutil.which('false')} {{model}} {{prompt}},adapter=text", MODEL) as engine:
        assert engine.info.capabilities == {Capability.GENERATE}
        for asked, name in (
            ({"temperature": 0.5}, "temperature, seed"), ({"top_k": 3}, "top_k"), ({"stop": ["a"]}, "stop"),
            ({"ignore_eos": True}, "ignore_eos"),
        ):  # fmt: skip
            with pytest.raises(MissingCapability, match=f"does not take {name}"):
                engine.generate(ids, max_tokens=2, **asked)  # type: ignore[arg-type]
        with pytest.raises(MissingCapability, match="none has these ids"):
            engine.generate([ids[0], ids[0], 5], max_tokens=2)
        with pytest.raises(MissingCapability, match="as it writes them"):
            engine.generate(ids, max_tokens=2, on_token=lambda token, logprob: None)
        with pytest.raises(EngineError, match="ended with exit status 1"):
            engine.generate(ids, max_tokens=2)


def test_what_was_asked_stands_in_its_place(tmp_path: Path) -> None:
    """Each place of the command is filled once, whatever the prompt contains."""
    script = tmp_path / "show.sh"
    script.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    script.chmod(0o755)
    with open_engine("numpy", MODEL) as engine:
        ids = engine.tokenize("a {tokens} {model}")
    places = "{tokens} {prompt} t={temperature} s={seed}"
    with open_engine(f"exec:{script} {places},adapter=text", MODEL) as engine:
        made = engine.generate(ids, max_tokens=7, temperature=0.5, seed=3)
    assert made.text == "7|a {tokens} {model}|t=0.5|s=3|"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (",adapter=voice", "bad adapter"),
        (",skip=2", "skip goes with adapter=text alone"),
        (",adapter=text,skip=few", "bad skip"),
    ],
)
def test_options_that_cannot_be_are_refused(options: str, said: str) -> None:
    """Exit code 4 and one sentence."""
    result = invoke("golden", "compare", "--model", MODEL, "--engine", f"{COMMAND}{options}")
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.output
    assert said in result.stderr
    with pytest.raises(UsageError):
        open_engine(f"{COMMAND}{options}", MODEL)
