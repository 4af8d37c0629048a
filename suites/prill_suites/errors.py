"""Is bad input answered with one sentence, and does the next request work? Every refusal, provoked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from prill_fixtures import path as fixture_path
from prill_harness.engines.base import Capability, Engine
from prill_harness.run.checks import Observer, check
from prill_harness.tokens.golden import Golden
from prill_suites.common import refusal
from prill_suites.sequences import context_of

USAGE, ENGINE = 4, 1
OpenModel = Callable[[str, str], Engine]


def still_right(observe: Observer, engine: Engine, ids: list[int], before: NDArray[Any]) -> None:
    """The request after an error gives the bits it gave before it."""
    after = engine.logits(ids)
    observe.saw(after.size, oracle="the same request before the error")
    observe.expect(bool(np.array_equal(before, after)), "after the error the same request gives other logits")


@pytest.fixture
def ids(golden: Golden) -> list[int]:
    return golden.prompts[0].ids[: min(12, context_of(golden) // 2)]


@check(
    "errors.empty_prompt",
    kills=("empty_prompt_accepted",),
    needs=(Capability.LOGITS, Capability.GENERATE),
)
def test_empty_prompt(observe: Observer, engine: Engine, ids: list[int]) -> None:
    """An empty prompt is refused by logits and by generate."""
    before = engine.logits(ids)
    refusal(observe, "logits of no ids", lambda: engine.logits([]), USAGE, "ids")
    sentence = refusal(
        observe, "generate from no ids", lambda: engine.generate([], max_tokens=1), USAGE, "ids"
    )
    still_right(observe, engine, ids, before)
    observe.say(f"refused with: {sentence}")


@check(
    "errors.id_out_of_vocabulary",
    kills=("id_range_unchecked", "negative_id_accepted", "stale_position_after_error"),
    needs=(Capability.LOGITS, Capability.GENERATE),
)
def test_id_out_of_vocabulary(observe: Observer, engine: Engine, ids: list[int]) -> None:
    """An id below 0 or past the vocabulary is refused and named; NumPy's negative indexing never leaks in."""
    vocab = int(engine.info.config["vocab_size"])
    before, sentence = engine.logits(ids), ""
    for bad in (vocab, -1, 2**31):
        calls: tuple[Callable[[], object], ...] = (
            lambda bad=bad: engine.logits([*ids, bad]),  # type: ignore[misc]
            lambda bad=bad: engine.generate([*ids, bad], max_tokens=1),  # type: ignore[misc]
        )
        for call in calls:
            sentence = refusal(observe, f"id {bad}", call, USAGE, str(bad), str(vocab - 1))
    still_right(observe, engine, ids, before)
    observe.say(f"3 bad ids refused twice each, the last with: {sentence}")


@check(
    "errors.too_long",
    kills=("context_unchecked", "context_full_off_by_one"),
    needs=(Capability.LOGITS,),
)
def test_too_long(observe: Observer, engine: Engine, ids: list[int]) -> None:
    """A prompt one longer than the context is refused with both lengths."""
    context = int(engine.info.config["context_length"])
    before = engine.logits(ids)
    long = (ids * (context // len(ids) + 1))[: context + 1]
    sentence = refusal(
        observe, "context + 1 ids", lambda: engine.logits(long), ENGINE, str(context), str(context + 1)
    )
    still_right(observe, engine, ids, before)
    observe.say(f"refused with: {sentence}")


BAD_SAMPLING = (
    ("temperature", -0.5),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", -1),
    ("top_p", -0.1),
    ("top_p", 1.5),
    ("top_p", float("nan")),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("max_tokens", -1),
)


@check("errors.sampling_parameters", kills=("sampling_range_unchecked",), needs=(Capability.GENERATE,))
def test_sampling_parameters(observe: Observer, engine: Engine, ids: list[int]) -> None:
    """Every sampling parameter out of its range is refused by its name."""
    before, sentence = engine.logits(ids), ""
    for name, value in BAD_SAMPLING:
        arguments = {"max_tokens": 1, name: value}
        sentence = refusal(
            observe,
            f"{name}={value}",
            lambda arguments=arguments: engine.generate(ids, **arguments),  # type: ignore[misc]
            USAGE,
            name,
        )
    still_right(observe, engine, ids, before)
    observe.say(f"{len(BAD_SAMPLING)} values refused by name, the last with: {sentence}")


# Key, value type 8 (string), length 5, value.
ARCHITECTURE = b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0%b"


@check("errors.model_file", kills=("truncation_unchecked", "unknown_architecture_guessed"))
def test_model_file(
    observe: Observer,
    engine: Engine,
    open_model: OpenModel,
    pytestconfig: pytest.Config,
    tmp_path: Path,
    ids: list[int],
) -> None:
    """A missing file, a folder, another format, a cut file, an unknown architecture: each one sentence."""
    spec, whole = pytestconfig.getoption("prill_engine"), fixture_path("llama-tiny").read_bytes()
    before = engine.logits(ids)
    unknown = whole.replace(ARCHITECTURE % b"llama", ARCHITECTURE % b"lemma", 1)
    observe.expect(unknown != whole, "the control failed: the packaged fixture names no architecture llama")
    files = {
        "cut.gguf": (whole[: len(whole) // 2], "cut.gguf"),
        "empty.gguf": (b"", "empty.gguf"),
        "text.gguf": (b"this is not a model\n" * 100, "text.gguf"),
        "unknown.gguf": (unknown, "lemma"),
    }
    for name, (data, says) in files.items():
        bad = tmp_path / name
        bad.write_bytes(data)
        refusal(observe, name, lambda bad=bad: open_model(spec, str(bad)), USAGE, says)  # type: ignore[misc]
    refusal(observe, "a folder", lambda: open_model(spec, str(tmp_path)), USAGE, str(tmp_path))
    missing = str(tmp_path / "missing.gguf")
    sentence = refusal(observe, "a missing file", lambda: open_model(spec, missing), USAGE, "missing.gguf")
    still_right(observe, engine, ids, before)
    observe.say(f"{observe.observed} refusals, the last with: {sentence}")
