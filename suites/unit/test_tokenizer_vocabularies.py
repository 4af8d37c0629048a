"""Whatever vocabulary a sound file has, no check of the tokenizer or of ends and stops is red on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from prill_harness import golden as goldens
from prill_harness.checks import Observer
from prill_harness.engines import open_engine
from prill_suites import properties, tokenizer
from prill_suites.common import file_fields
from prill_suites.tokenizer_twins import Twin

from .tiny_gguf import LLAMA, add_config, llama_tensors, write_gguf
from .vocabularies import bpe, spm

EXAMPLES = int(os.environ.get("PRILL_VOCABULARIES", "25"))  # of each family; a few hundred by hand
SIZES = {**LLAMA, "width": 16, "n_heads": 2, "n_kv_heads": 1, "ffn": 16, "n_layers": 1, "context": 32}
CHECKS: tuple[Callable[..., None], ...] = (
    tokenizer.test_prompt_ids, tokenizer.test_merges, tokenizer.test_round_trip, tokenizer.test_special_whole,
    tokenizer.test_bos_once, tokenizer.test_byte_fallback, tokenizer.test_streaming, tokenizer.test_ends,
    properties.test_end_of_text, properties.test_stop_strings,
)  # fmt: skip


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


def judged(path: Path) -> dict[str, Observer]:
    """Every check's observer on the model, by the check's name; the checks raise where they find anything."""
    twin = Twin(file_fields(path))
    seen: dict[str, Observer] = {}
    with open_engine("numpy", str(path)) as engine:
        tried = [*goldens.PROMPTS[:2], "日本語", *tokenizer.own_texts(twin)[:3], *twin.tokens[:2]]
        texts = [text for text in tried if 0 < len(engine.tokenize(text)) <= SIZES["context"] // 2]
        golden = goldens.record(path, texts, tokens=8) if texts else None
        for check in CHECKS:
            names = check.__code__.co_varnames[: check.__code__.co_argcount]
            given = {"observe": Observer(), "engine": engine, "golden": golden, "twin": twin}
            if golden is None and "golden" in names:
                continue  # what to prompt such a model with is for the golden to say
            check(**{name: given[name] for name in names})
            seen[check.__name__] = given["observe"]  # type: ignore[assignment]
    return seen


@pytest.mark.parametrize("family", [spm, bpe])
def test_no_check_is_red_on_a_sound_vocabulary(family: Callable[..., Any]) -> None:
    """Vocabularies of 1 to 400 tokens, whatever they lack: each check passes, having observed something."""
    seen: Counter[str] = Counter()

    @settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
    @given(family())
    def green(metadata: dict[str, Any]) -> None:
        with TemporaryDirectory() as folder:
            for name, observer in judged(written(Path(folder), metadata)).items():
                assert observer.observed > 0, name
                assert observer.oracle, name
                assert observer.sentence, name
                seen[name] += 1

    green()
    assert set(seen) == {check.__name__ for check in CHECKS}
