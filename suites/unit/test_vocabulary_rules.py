"""A vocabulary is sound or not by one rule book: a file opens exactly when its tokenizer loads."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from prill_fixtures.malformed import ARCHITECTURE, ARRAY, F32, I32, MODEL, PARTS, array, pair, strings
from prill_runtime.errors import ModelFileError
from prill_runtime.gguf.file import check_tokenizer, open_gguf
from prill_runtime.tokenizer.load import Tokenizer, load_tokenizer

TOKENS = ("", "a", "b", "▁", "<s>", "</s>", "<unk>", "<0x0A>", "<0xab>", "<0xAB>", "<0xA>", "<0xZZ>", "é")
IDS = ("bos", "eos", "eot", "eom", "unknown", "fim_pad", "fim_rep", "fim_sep")
SOUND: dict[str, Any] = {
    "tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "a", ""],
    "token_type": [2, 3, 3, 6, 1, 1],
    "scores": [0.0, 0.0, 0.0, 0.0, -1.0, 0.0],
    "eos_token_id": 2,
}


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[str, Any]:
    """Metadata of family "llama", sound or broken in any of the ways that a rule is about."""
    tokens = draw(st.lists(st.sampled_from(TOKENS), max_size=5))
    tokens = tokens if draw(st.booleans()) else [*dict.fromkeys(tokens)]
    size = max(0, len(tokens) + draw(st.sampled_from((0, 0, 0, -1, 1))))
    types = st.sampled_from((1, 1, 2, 3, 4, 5, 0, 7, -1))
    bytes_right = [6 if token.startswith("<0x") and draw(st.booleans()) else draw(types) for token in tokens]
    finite = st.floats(-4, 0, width=32)
    scores = finite if draw(st.integers(0, 3)) else finite | st.sampled_from((float("nan"), -float("inf")))
    keys: dict[str, Any] = {
        "tokens": tokens,
        "token_type": draw(st.none() | st.just([*bytes_right, 1][:size])),
        "scores": draw(st.none() | st.lists(scores, min_size=size, max_size=size)),
    }
    for role in draw(st.lists(st.sampled_from(IDS), unique=True, max_size=2)):
        keys[f"{role}_token_id"] = draw(st.integers(-1, len(tokens)))
    return {key: value for key, value in keys.items() if value is not None}


def written(folder: Path, keys: dict[str, Any]) -> Path:
    """A file with this tokenizer."""
    pairs = [ARCHITECTURE, MODEL]
    for name, value in keys.items():
        key = f"tokenizer.ggml.{name}".encode()
        if name == "tokens":
            pairs.append(pair(key, ARRAY, strings(*(token.encode() for token in value))))
        elif isinstance(value, list):
            kind, letter = (F32, "<f") if name == "scores" else (I32, "<i")
            pairs.append(pair(key, ARRAY, array(kind, [struct.pack(letter, each) for each in value])))
        else:
            pairs.append(pair(key, I32, struct.pack("<i", value)))
    path = folder / "vocabulary.gguf"
    path.write_bytes(replace(PARTS, pairs=tuple(pairs)).build())
    return path


def metadata(keys: dict[str, Any]) -> dict[str, Any]:
    return {"tokenizer.ggml.model": "llama", **{f"tokenizer.ggml.{k}": v for k, v in keys.items()}}


def opened(path: Path) -> Tokenizer | None:
    """The tokenizer of a file that opens, whatever else there is to refuse; None of one that does not."""
    try:
        file = open_gguf(path)
    except ModelFileError:
        return None
    with file:
        return load_tokenizer(file.metadata)


def loaded(keys: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of the bare metadata, or None."""
    try:
        return load_tokenizer(metadata(keys))
    except ModelFileError:
        return None


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(keys=SOUND)
@given(keys=vocabularies())
def test_a_file_opens_exactly_when_its_tokenizer_loads(tmp_path: Path, keys: dict[str, Any]) -> None:
    """What opens loads, what loads opens, and both read the same vocabulary out of it."""
    first, second = opened(written(tmp_path, keys)), loaded(keys)
    event(f"sound: {second is not None}")
    assert (first is None) == (second is None)
    if first is None or second is None:
        return
    assert first.vocabulary == second.vocabulary
    assert first.digest == second.digest
    assert list(first.vocabulary.tokens) == keys["tokens"]
    assert list(first.vocabulary.types) == keys.get("token_type", list(first.vocabulary.types))


DISPUTED: list[tuple[str, dict[str, Any], str]] = [
    ("twice", {"tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "a", "a"]}, "has a token twice.* 4 and 5"),
    ("type 0", {"token_type": [2, 3, 3, 6, 0, 1]}, "of token 4 is unknown: expected 1 to 6, got 0"),
    ("lower case", {"tokens": ["<unk>", "<s>", "</s>", "<0x0a>", "a", ""]}, "malformed byte token 3"),
    ("fill-in end", {"fim_pad_token_id": 6}, "fim_pad_token_id is outside the vocabulary"),
]


@pytest.mark.parametrize(
    ("change", "sentence"), [case[1:] for case in DISPUTED], ids=[case[0] for case in DISPUTED]
)
def test_file_and_metadata_are_refused_in_the_same_words(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    """What reader and tokenizer once disagreed about is refused by both, in one sentence."""
    keys = {**SOUND, **change}
    with pytest.raises(ModelFileError, match=sentence) as of_file:
        open_gguf(written(tmp_path, keys))
    with pytest.raises(ModelFileError, match=sentence) as of_metadata:
        check_tokenizer(metadata(keys))
    assert of_file.value.what == of_metadata.value.what


def test_what_engines_load_is_no_mistake(tmp_path: Path) -> None:
    """Empty spellings repeat, a score may be infinite, and a spelling that no byte token has is text."""
    keys = {**SOUND, "tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "", "<0xab>"],
            "scores": [0.0, 0.0, 0.0, 0.0, 0.0, -float("inf")]}  # fmt: skip
    tokenizer = opened(written(tmp_path, keys))
    assert tokenizer is not None
    assert tokenizer.piece(5) == b"<0xab>"
    assert tokenizer.piece(3) == b"\n"
