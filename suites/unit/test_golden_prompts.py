"""Prompts of a golden: what any vocabulary and any context give to compare."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

from prill_fixtures import sound
from prill_fixtures.sound_vocab import SoundVocabulary
from prill_harness.engines.embedded import Embedded
from prill_harness.faults.opening import open_engine
from prill_harness.tokens import golden_prompts
from prill_harness.tokens import judge as tokens
from prill_harness.tokens.golden import PROMPTS, golden_for, record
from prill_harness.tokens.golden_pack import ONLY_TOKEN_GAP, load, save
from prill_runtime.errors import UsageError
from prill_runtime.gguf.file import open_gguf
from prill_runtime.tokenizer.load import load_tokenizer

from .sound_models import recipes
from .test_sound_models import PLAIN

UNUSED = SoundVocabulary("spm", 1, unused=1, unk=False, bos=False, eos=False)
SILENT = replace(PLAIN, context=12, vocabulary=UNUSED)


@settings(max_examples=12, deadline=None)
@given(recipe=recipes())
def test_prompts_fit_and_are_the_tokenizers_own(recipe: sound.Recipe) -> None:
    """Every prompt is spelled as the tokenizer spells it, fills half of the context at most, and is unlike
    the others; only a vocabulary that spells nothing gives none."""
    with tempfile.TemporaryDirectory() as folder:
        with open_gguf(sound.build(recipe, Path(folder) / "model.gguf")) as file:
            tokenizer = load_tokenizer(file.metadata)
        chosen = golden_prompts.choose(tokenizer, PROMPTS, recipe.context)
        for text, ids in chosen:
            assert tokenizer.encode(text) == ids
            assert 0 < len(ids) <= recipe.context // 2
        assert len({tuple(ids) for _, ids in chosen}) == len(chosen) <= len(PROMPTS)
        if not chosen:
            assert golden_prompts.spelled(tokenizer, PROMPTS[0]) is None or recipe.context // 2 < 12


def test_prompts_of_an_ordinary_model_are_the_given_ones(tmp_path: Path) -> None:
    """Where all texts fit, nothing is made up."""
    with open_gguf(sound.build(replace(PLAIN, context=512), tmp_path / "model.gguf")) as file:
        tokenizer = load_tokenizer(file.metadata)
    chosen = golden_prompts.choose(tokenizer, PROMPTS, 512)
    assert [text for text, _ in chosen] == list(PROMPTS)


def test_given_ids_are_in_the_vocabulary() -> None:
    """Ids without a text are in range, short enough, all different, and none for a context of one."""
    prompts = golden_prompts.given(3, 8, 9)
    assert 2 <= len(prompts) <= 8
    assert len({tuple(ids) for _, ids in prompts}) == len(prompts)
    for text, ids in prompts:
        assert text == ""
        assert 1 <= len(ids) <= 4
        assert set(ids) <= {0, 1, 2}
    assert golden_prompts.given(3, 8, 1) == []


def test_a_golden_without_texts(tmp_path: Path) -> None:
    """A vocabulary that spells nothing has a golden of given ids; step 1 compares what texts give."""
    file = sound.build(SILENT, tmp_path / "model.gguf")
    golden = record(file, tokens=4)
    save(golden, tmp_path / "golden.json")
    assert load(tmp_path / "golden.json") == golden
    assert all(prompt.unspelled and not prompt.text for prompt in golden.prompts)
    assert set(golden.prompts[0].margins.tolist()) == {ONLY_TOKEN_GAP}
    with open_engine("numpy", str(file)) as engine, open_engine("numpy64", str(file)) as oracle:
        assert isinstance(oracle, Embedded)
        found = tokens.compare_prompt_ids(engine, golden, oracle)
        assert found.ok
        assert found.observed == len(PROMPTS)
        engine.tokenize = lambda text, add_special=True: [0]  # type: ignore[method-assign]
        wrong = tokens.compare_prompt_ids(engine, golden, oracle)
        assert not wrong.ok
        assert "expected 0 ids, the engine gives 1 ids" in wrong.sentence


def test_no_golden_of_a_context_of_one(tmp_path: Path) -> None:
    """One position holds a prompt and no token: one sentence."""
    file = sound.build(replace(PLAIN, context=1), tmp_path / "model.gguf")
    with pytest.raises(UsageError, match="at least 2 positions, got 8 prompts, 300 tokens, a context of 1"):
        record(file)


def test_committed_goldens_say_nothing_new() -> None:
    """Goldens that were recorded before prompts without a text existed are read and written as they were."""
    golden = golden_for("fixture:llama-tiny")
    assert not any(prompt.unspelled for prompt in golden.prompts)
