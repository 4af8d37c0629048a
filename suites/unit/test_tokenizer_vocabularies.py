"""Whatever vocabulary a sound file has, no check of the tokenizer or of ends and stops is red on it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from prill_harness.engines.base import Engine
from prill_harness.faults.opening import open_engine
from prill_harness.run.checks import Observer
from prill_harness.tokens import golden as goldens
from prill_harness.tokens import golden_prompts
from prill_suites import properties, tokenizer, tokenizer_texts
from prill_suites.common import embedded, file_fields
from prill_suites.tokenizer_twins import Twin

from .tiny_gguf import LLAMA, add_config, llama_tensors, write_gguf
from .vocabularies import bpe, spm

EXAMPLES = int(os.environ.get("PRILL_VOCABULARIES", "25"))  # of each family; a few hundred by hand
SIZES = {**LLAMA, "width": 16, "n_heads": 2, "n_kv_heads": 1, "ffn": 16, "n_layers": 1, "context": 24}
TEXT = (
    tokenizer.test_prompt_ids, tokenizer.test_merges, tokenizer.test_round_trip, tokenizer.test_special_whole,
    tokenizer.test_bos_once, tokenizer.test_byte_fallback, tokenizer.test_streaming, tokenizer.test_decoding,
    tokenizer.test_ends,
)  # fmt: skip
WRITING = (properties.test_end_of_text, properties.test_stop_strings)  # these let the model write
FAMILIES = pytest.mark.parametrize("family", [spm, bpe])


def written(folder: Path, metadata: dict[str, Any]) -> Path:
    """A small random Llama with this tokenizer."""

    def describe(writer: gguf.GGUFWriter) -> None:
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_string(key, value)

    tokens = len(metadata["tokenizer.ggml.tokens"])
    tensors = llama_tensors(SIZES, tokens, np.random.default_rng(tokens))
    configure = (lambda writer: add_config(writer, "llama", SIZES), describe)
    return write_gguf(folder / "model.gguf", "llama", tensors, configure)


def judged(path: Path, checks: Sequence[Callable[..., None]]) -> dict[str, Observer]:
    """The observer of each check on the model; a check raises where it finds anything."""
    twin = Twin(file_fields(path))
    texts = ["The dog", "日本語", *tokenizer.own_texts(twin)[:1], *twin.tokens[:1]]
    seen = dict[str, Observer]()
    with open_engine("numpy", str(path)) as engine:
        golden = goldens.record(path, texts, tokens=4) if checks is WRITING else prompts(engine, texts)
        for check in checks:
            observe = seen[check.__name__] = Observer()
            given = {"observe": observe, "engine": engine, "golden": golden, "twin": twin}
            check(**{name: given[name] for name in inspect.signature(check).parameters})
    return seen


def prompts(engine: Engine, texts: Sequence[str]) -> SimpleNamespace:
    """What the checks of text look at of a golden: the prompts that would be recorded."""
    chosen = golden_prompts.choose(embedded(engine).tokenizer, texts, SIZES["context"])
    chosen = chosen or golden_prompts.given(embedded(engine).vocab_size, len(texts), SIZES["context"])
    return SimpleNamespace(prompts=[SimpleNamespace(text=text, ids=ids) for text, ids in chosen])


def hold_green(family: Callable[..., Any], checks: Sequence[Callable[..., None]], examples: int) -> None:
    """Draw vocabularies; every check passes on each, having observed something."""
    green = 0

    # The same draws at every run; by hand, with PRILL_VOCABULARIES, others each time.
    @settings(
        deadline=None,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize="PRILL_VOCABULARIES" not in os.environ,
    )
    @given(family())
    def one(metadata: dict[str, Any]) -> None:
        nonlocal green
        with TemporaryDirectory() as folder:
            for name, observe in judged(written(Path(folder), metadata), checks).items():
                assert observe.observed > 0, name
                assert observe.oracle, name
                assert observe.sentence, name
                green += 1

    one()
    assert green >= len(checks)


@FAMILIES
def test_no_check_of_text_is_red_on_a_sound_vocabulary(
    family: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabularies of 1 to 400 tokens, whatever they lack: each check of the tokenizer passes."""
    monkeypatch.setattr(tokenizer_texts, "LONG", 1200)  # a long text is no other kind of vocabulary
    hold_green(family, TEXT, EXAMPLES)


@FAMILIES
def test_no_check_of_an_end_is_red_on_a_sound_vocabulary(family: Callable[..., Any]) -> None:
    """Models of such vocabularies, with ends and without: what ends a text, and stop strings, pass."""
    hold_green(family, WRITING, EXAMPLES // 5)
