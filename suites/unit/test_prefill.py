"""Prompts on the emulator: captured or not, in one piece or several, and the choice of the id behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_fixtures import sound
from prill_fixtures.sound_vocab import SoundVocabulary
from prill_harness import Engine, open_engine
from prill_harness.tokens.golden import golden_for
from prill_runtime.device import model as device_model
from prill_runtime.device.steps.prefill import KEPT_GRAPHS
from prill_runtime.errors import ContextLengthExceeded, InvalidParameter, NotANumber
from prill_runtime.run.generate import logprob
from prill_runtime.sampling.sampler import SamplingParams

VOCABULARIES = {"llama": SoundVocabulary("spm", 300), "gpt2": SoundVocabulary("bpe", 300)}
SMALL = "fixture:llama-long"
ROWS = 20  # enough for the tensor cores' kernels


@pytest.fixture(scope="module", params=VOCABULARIES)
def fast(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Both families, quantised: two layers of two heads."""
    recipe = sound.Recipe(
        seed=1, family=request.param, vocabulary=VOCABULARIES[request.param], context=128, layers=2,
        width=128, heads=2, kv_heads=2, head_dim=64, rope_dim=64, ffn=128, type="Q8_0",
    )  # fmt: skip
    file = sound.build(recipe, tmp_path_factory.mktemp("prefill") / "model.gguf")
    with open_engine("emu:fast", str(file)) as opened:
        yield opened


@pytest.fixture(scope="module")
def llama() -> Iterator[Engine]:
    with open_engine("emu:fast", SMALL) as opened:
        yield opened


def ids_of(engine: Engine, rows: int, first: int = 0) -> list[int]:
    if engine.info.model != SMALL:
        drawn = np.random.default_rng(1).integers(0, engine.info.config["vocab_size"], first + rows)
        return [int(token) for token in drawn[first:]]
    prompt = golden_for(SMALL).prompts[0]
    return [*prompt.ids, *prompt.tokens][first : first + rows]


def fed(engine: Engine, *pieces: list[int]) -> np.ndarray:
    """The logits that a prefill of these pieces, one after the other, leaves on the device."""
    model: Any = engine.model  # type: ignore[attr-defined]
    cache = model.new_cache(sum(map(len, pieces)))
    for piece in pieces:
        model.prefill(cache, piece)
    assert cache.length == sum(map(len, pieces))
    cache.close()
    return np.asarray(model.decoder.logits)[0]


def graphs(engine: Engine) -> list[int]:
    """Rows of the prompts that are captured."""
    return list(engine.model.decoder.prompt._graphs)  # type: ignore[attr-defined]


def test_a_length_that_comes_again_is_captured_and_gives_the_same_bits(fast: Engine) -> None:
    """The first prompt of a length is launched, later ones replayed; another prompt has its own logits."""
    ids, others = ids_of(fast, ROWS + 1), ids_of(fast, ROWS + 1, first=7)
    launched = fed(fast, ids)
    assert ROWS + 1 not in graphs(fast)
    first, second, third = fed(fast, ids), fed(fast, others), fed(fast, ids)
    assert ROWS + 1 in graphs(fast)
    assert np.array_equal(launched, first)
    assert np.array_equal(launched, third)
    assert not np.array_equal(launched, second)


def test_a_captured_piece_stands_anywhere_in_a_sequence(fast: Engine) -> None:
    """One graph appends behind nothing and behind other rows: off the whole prompt's row by rounding."""
    ids = ids_of(fast, 3 * ROWS)
    pieces = [ids[:ROWS], ids[ROWS : 2 * ROWS], ids[2 * ROWS :]]
    got = [fed(fast, *pieces) for _ in range(2)]
    assert ROWS in graphs(fast)
    whole = fast.logits(ids)[-1]
    assert np.array_equal(got[0], got[1])
    assert np.sum((got[0] - whole) ** 2) / np.sum(whole**2) < 1e-6


def test_few_graphs_are_kept(llama: Engine) -> None:
    """The lengths used last are the ones kept."""
    lengths = list(range(ROWS + 2, ROWS + 4 + KEPT_GRAPHS))
    for rows in lengths:
        for _ in range(2):
            fed(llama, ids_of(llama, rows))
    assert graphs(llama) == lengths[-KEPT_GRAPHS:]


def test_float32_prompts_are_not_captured() -> None:
    """Their attention is launched for as many positions as there are."""
    with open_engine("emu", SMALL) as exact:
        rows = [fed(exact, ids_of(exact, ROWS)) for _ in range(3)]
        assert not graphs(exact)
        assert np.array_equal(rows[0], rows[2])
        whole = exact.logits(ids_of(exact, ROWS))[-1]
        assert np.sum((rows[0] - whole) ** 2) / np.sum(whole**2) < 1e-12


def test_a_prompt_longer_than_a_step_goes_through_in_pieces(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text behind it is the same."""
    ids = ids_of(llama, 2 * ROWS + 5)
    expected = llama.generate(ids, max_tokens=8, ignore_eos=True)
    monkeypatch.setattr(device_model, "MAX_ROWS", ROWS)
    assert llama.generate(ids, max_tokens=8, ignore_eos=True).ids == expected.ids


def test_what_does_not_fit_leaves_the_cache_as_it_was(llama: Engine) -> None:
    """More ids than there is room for, an unknown id, none: one error, and the sequence goes on as before."""
    model: Any = llama.model  # type: ignore[attr-defined]
    cache, ids = model.new_cache(ROWS), ids_of(llama, ROWS)
    model.prefill(cache, ids[:5])
    for wrong, error in (
        (ids, ContextLengthExceeded),
        ([model.vocab_size], InvalidParameter),
        ([], InvalidParameter),
    ):
        with pytest.raises(error):
            model.prefill(cache, wrong)
        assert cache.length == 5
    cache.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_that_is_not_finite_names_its_stage(temperature: float) -> None:
    """The host never sees the logits; the error is still that of the first stage that broke."""
    with open_engine("emu:fast", SMALL) as engine:
        model: Any = engine.model  # type: ignore[attr-defined]
        model.device.fill(model.weights["blk.1.ffn_norm.weight"].pointer, 4, 0xFF)
        for ids in (ids_of(engine, ROWS), ids_of(engine, ROWS)):
            with pytest.raises(NotANumber, match=r"blk\.1\.ffn_norm"):
                engine.generate(ids, max_tokens=4, ignore_eos=True, temperature=temperature)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_choice_is_the_lowest_of_the_most_probable_ids(llama: Engine, data: st.DataObject) -> None:
    """Any row: ties go to the lowest id, the logprob is the host's, a value that is no number is refused."""
    model: Any = llama.model  # type: ignore[attr-defined]
    decoder, vocab = model.decoder, model.vocab_size
    row = np.random.default_rng(data.draw(st.integers(0, 2**32))).standard_normal(vocab).astype(np.float32)
    row *= np.float32(data.draw(st.sampled_from([0.0, 1.0, 30.0, 1e30])))
    ties = data.draw(st.lists(st.integers(0, vocab - 1), max_size=5))
    row[ties] = row.max()
    odd = data.draw(st.sampled_from([None, np.nan, np.inf, -np.inf]))
    if odd is not None:
        row[data.draw(st.integers(0, vocab - 1))] = odd
    cache = model.new_cache(4)
    cache.commit(1)
    model.device.upload(decoder.logits.pointer, row)
    try:
        if odd is None:
            token, chosen = decoder.first(cache, [1], SamplingParams())
            assert token == int(np.argmax(row))
            assert chosen == pytest.approx(logprob(row, token), rel=1e-6, abs=1e-6)
        else:
            with pytest.raises(NotANumber):
                decoder.first(cache, [1], SamplingParams())
    finally:
        cache.close()
