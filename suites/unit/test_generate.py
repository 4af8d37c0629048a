"""A generation is sampling from the whole sequence, alone or in a batch, and ends for the right reason."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_runtime.errors import ContextLengthExceeded, InvalidParameter
from prill_runtime.ops.protocol import Array
from prill_runtime.run.generate import StopStrings
from prill_runtime.run.model import Generation, Model, generate, generate_batch
from prill_runtime.sampling.sampler import SamplingParams, sample

from .tiny_gguf import tiny

IDS = [1, 40, 300, 7, 261, 9, 262, 319, 0, 55, 56, 57]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path: Path = tiny(tmp_path_factory.mktemp("models") / f"{request.param}.gguf", request.param)
    with Model.load(path, dtype="float64") as opened:
        yield opened


def alone(model: Model, ids: list[int]) -> Array:
    return model.forward([(model.new_cache(), ids)])[0]


def naive(model: Model, ids: list[int], n: int, params: SamplingParams) -> list[int]:
    """Generation without a cache: the whole sequence again for every id."""
    for _ in range(n):
        ids = [*ids, sample(alone(model, ids)[-1], params, len(ids), ids)]
    return ids[-n:]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7),
        SamplingParams(temperature=1.5, min_p=0.02, repetition_penalty=1.3, seed=7),
    ],
)
def test_generation_is_sampling_from_the_whole_sequence(model: Model, params: SamplingParams) -> None:
    """Ids are drawn at their position, penalised for prompt and text; logprobs are of the raw logits."""
    got = generate(model, IDS, max_tokens=20, params=params, ignore_eos=True)
    assert list(got.ids) == naive(model, IDS, 20, params)
    assert got.finish_reason == "length"
    logits = alone(model, [*IDS, *got.ids])[len(IDS) - 1 : -1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(got.logprobs, logprobs[np.arange(20), got.ids], atol=1e-10)


def test_the_seed_decides(model: Model) -> None:
    """Two runs of one seed are equal, another seed differs."""

    def run(seed: int) -> Generation:
        return generate(model, IDS, max_tokens=20, params=SamplingParams(temperature=2.0, seed=seed))

    assert run(1) == run(1)
    assert run(1).ids != run(2).ids


def test_it_ends_at_an_end_of_generation_id(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id is not part of the text; with ignore_eos it is, and the text goes on."""
    params = SamplingParams(temperature=1.5, seed=4)
    free = generate(model, IDS, max_tokens=12, params=params, ignore_eos=True)
    at = next(i for i, token in enumerate(free.ids) if token not in free.ids[:i] and i > 2)
    monkeypatch.setattr(model.tokenizer, "eog_ids", frozenset([free.ids[at]]))
    ended = generate(model, IDS, max_tokens=12, params=params)
    assert ended == Generation(free.ids[:at], free.logprobs[:at], "eos", free.ids[at])
    assert free.end_id is None
    assert generate(model, IDS, max_tokens=12, params=params, ignore_eos=True) == free


def test_it_ends_at_max_tokens(model: Model) -> None:
    """Exactly that many; none for 0; a negative or fractional number is refused."""
    for n in (0, 1, 5):
        got = generate(model, IDS, max_tokens=n, ignore_eos=True)
        assert (len(got.ids), len(got.logprobs), got.finish_reason) == (n, n, "length")
    for wrong in (-1, 1.5, True):
        with pytest.raises(InvalidParameter, match="max_tokens"):
            generate(model, IDS, max_tokens=wrong)  # type: ignore[arg-type]


def test_it_ends_when_the_context_is_full(model: Model) -> None:
    """A prompt that fills the context gives one id; one shorter gives two; one longer is refused."""
    n = model.context_length
    for length, expected in ((n, 1), (n - 1, 2), (n - 5, 6)):
        got = generate(model, [3] * length, max_tokens=50, ignore_eos=True)
        assert (len(got.ids), got.finish_reason) == (expected, "context")
        exactly = generate(model, [3] * length, max_tokens=expected, ignore_eos=True)
        assert exactly == Generation(got.ids, got.logprobs, "length")
    with pytest.raises(ContextLengthExceeded, match=r"at most 64 positions, .* 65 needed"):
        generate(model, [3] * (n + 1), max_tokens=1)
    small = model.new_cache(len(IDS) + 2)
    assert len(generate(model, IDS, max_tokens=50, ignore_eos=True, cache=small).ids) == 3


def test_on_token_sees_every_id_and_can_cancel(model: Model) -> None:
    """Called in order with id and logprob; False ends after the current id, None and True do not."""
    seen: list[tuple[int, float]] = []

    def watch(token: int, logprob: float) -> bool | None:
        seen.append((token, logprob))
        return {3: True, 5: False}.get(len(seen))

    got = generate(model, IDS, max_tokens=12, ignore_eos=True, on_token=watch)
    assert got.finish_reason == "cancelled"
    assert seen == list(zip(got.ids, got.logprobs, strict=True))
    assert len(seen) == 5


def test_a_cache_continues_a_text(model: Model) -> None:
    """Generated in two calls on one cache is generated in one; the last id of the first call is fed again."""
    params = SamplingParams(temperature=1.0, seed=3)
    whole = generate(model, IDS, max_tokens=10, params=params, ignore_eos=True)
    cache = model.new_cache()
    first = generate(model, IDS, max_tokens=4, params=params, ignore_eos=True, cache=cache)
    assert cache.length == len(IDS) + 3
    second = generate(model, first.ids[-1:], max_tokens=6, params=params, ignore_eos=True, cache=cache)
    assert first.ids + second.ids == whole.ids


def test_it_ends_at_a_stop_string_split_over_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that starts inside one token and ends inside another stops at the token that completes it."""
    free = generate(model, IDS, max_tokens=12, ignore_eos=True)
    pieces = [f"<{i}|{token}>" for i, token in enumerate(free.ids)]
    calls = iter(range(100))
    monkeypatch.setattr(model.tokenizer, "piece", lambda token: pieces[next(calls) % 12].encode())
    text = pieces[4][-2:] + pieces[5] + pieces[6][:2]
    got = generate(model, IDS, max_tokens=12, ignore_eos=True, stop=["never", text])
    assert got == Generation(free.ids[:7], free.logprobs[:7], "stop")


@given(
    text=st.binary(max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    stops=st.lists(st.text("ab\x00é", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_however_the_text_is_cut(
    text: bytes, cuts: list[int], stops: list[str]
) -> None:
    """A piece is the last exactly when the text so far contains a stop string for the first time."""
    text = text + "abéa".encode()
    edges = [0, *sorted(cuts), len(text)]
    matcher, so_far = StopStrings(stops), b""
    for low, high in pairwise(edges):
        so_far += text[low:high]
        expected = any(stop.encode() in so_far for stop in stops)
        assert matcher.push(text[low:high]) == expected
        if expected:
            return


@pytest.mark.parametrize("wrong", ["text", [""], [3]])
def test_bad_stop_strings_are_refused(model: Model, wrong: Any) -> None:
    """A bare string would stop at each of its letters, an empty one at once."""
    with pytest.raises(InvalidParameter, match="in stop"):
        generate(model, IDS, max_tokens=1, stop=wrong)


def test_an_empty_prompt_is_refused(model: Model) -> None:
    """There is nothing to predict from, whatever max_tokens is."""
    for n in (0, 3):
        with pytest.raises(InvalidParameter, match="no ids"):
            generate(model, [], max_tokens=n)


def test_a_batch_generates_what_each_prompt_does_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of unequal length, one of which ends early, give the texts they give alone."""
    prompts = [IDS, IDS[:3], [5], IDS[::-1]]
    params = SamplingParams(temperature=1.2, seed=9)
    free = [generate(model, ids, max_tokens=9, params=params, ignore_eos=True) for ids in prompts]
    monkeypatch.setattr(model.tokenizer, "eog_ids", frozenset([free[1].ids[4]]))
    expected = [generate(model, ids, max_tokens=9, params=params) for ids in prompts]
    got = generate_batch(model, prompts, max_tokens=9, params=[params] * 4)
    assert [(text.ids, text.finish_reason) for text in got] == [
        (text.ids, text.finish_reason) for text in expected
    ]
    assert got[1].finish_reason == "eos"
    assert len({text.ids for text in got}) == len(prompts)  # control: the prompts do differ
    for text, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(text.logprobs, other.logprobs, atol=1e-10)
    assert generate_batch(model, [], max_tokens=9) == []
