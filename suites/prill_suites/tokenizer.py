"""Is text turned into the right ids and back? The engine's tokenizer against the file's own vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from prill_harness.checks import Observer, check
from prill_harness.engines.base import Capability, Engine
from prill_harness.golden import Golden
from prill_runtime.errors import MissingCapability
from prill_suites.common import FILE_READER, embedded, file_fields
from prill_suites.tokenizer_twins import bpe_word_ids, longest_text, spm_ids

CONTROL = 3  # gguf.TokenType.CONTROL
HARD_TEXTS = (
    "plain words, then a full stop.",
    "  two leading and two trailing spaces  ",
    "tabs\tand\nline\n\nbreaks\r\n",
    "CamelCase snake_case kebab-case 3.14159 1,000,000 0x1F",
    "don't can't we'll I'm they've",
    "na\u00efve caf\u00e9 \u00fcber \u00c5ngstr\u00f6m",
    "e\u0301 combining and \u00e9 composed",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3068\u4e2d\u6587",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f9ea\U0001f469\u200d\U0001f52c\U0001f1f3\U0001f1f4 emoji",
    "control \x01\x7f characters",
    "zero\u200bwidth \ufeff and \u00a0 spaces",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "{}[]()<>|\\/~`!@#$%^&*-_=+;:'\",.?",
)


@pytest.fixture(scope="module")
def fields(model_path: Path) -> dict[str, Any]:
    """The file's metadata as gguf reads it."""
    return file_fields(model_path)


@check(
    "tokenizer.prompt_ids",
    kills=("bos_missing", "bos_twice", "space_prefix_lost", "merge_order"),
    needs=(Capability.TOKENIZE,),
)
def test_prompt_ids(observe: Observer, engine: Engine, golden: Golden) -> None:
    """Every golden prompt becomes exactly its golden ids, special tokens included."""
    for number, prompt in enumerate(golden.prompts):
        ids = engine.tokenize(prompt.text)
        observe.saw(len(prompt.ids), oracle="golden ids")
        observe.expect(
            ids == prompt.ids,
            f"prompt {number}: expected {len(prompt.ids)} ids {prompt.ids[:8]}…, got {len(ids)}: {ids[:8]}…",
            prompt=prompt.text,
            expected=prompt.ids,
            got=ids,
        )
    observe.say(f"{len(golden.prompts)} prompts, {observe.observed} ids, all equal to the golden ids")


@check(
    "tokenizer.merges",
    kills=("merge_order", "merge_ranks_reversed", "space_prefix_lost", "space_prefix_kept"),
    needs=(Capability.TOKENIZE,),
)
def test_merges(observe: Observer, engine: Engine, golden: Golden, fields: dict[str, Any]) -> None:
    """The pieces are those that a naive twin merges from the file's scores or merge list."""
    texts = [prompt.text for prompt in golden.prompts]
    twin: Callable[[str, Mapping[str, Any]], list[int]]
    if fields["tokenizer.ggml.model"] == "llama":
        twin, samples = spm_ids, sorted({*texts, *HARD_TEXTS})
    else:
        # A run of letters after one space is one pre-token under every byte-level pre-tokenizer.
        words = {word for text in [*texts, *HARD_TEXTS] for word in re.findall(r" [a-z]+", text)}
        twin, samples = bpe_word_ids, sorted(words)
    for text in samples:
        expected, got = twin(text, fields), engine.tokenize(text, add_special=False)
        observe.saw(len(expected), oracle="naive merging by the file's scores or merge list")
        observe.expect(got == expected, f"{text[:40]!r}: expected ids {expected}, got {got}")
    observe.expect(observe.observed > 0, "no text of the golden has a word to merge")
    observe.say(f"{len(samples)} texts, {observe.observed} ids, all as the naive twin merges them")


@check(
    "tokenizer.round_trip",
    kills=(
        "byte_fallback_lost",
        "space_prefix_lost",
        "text_normalised",
        "text_stripped",
        "newlines_translated",
    ),
    needs=(Capability.TOKENIZE,),
)
def test_round_trip(observe: Observer, engine: Engine) -> None:
    """Text goes to ids and back without losing a byte, on texts chosen to hurt."""
    for text in HARD_TEXTS:
        back = engine.detokenize(engine.tokenize(text))
        observe.saw(len(text.encode()), oracle="the text itself")
        observe.expect(back == text.encode(), f"{text!r} came back as {back!r}")
    observe.say(f"{len(HARD_TEXTS)} hard texts, {observe.observed} bytes, all came back")


@check("tokenizer.special_whole", kills=("special_token_split",), needs=(Capability.TOKENIZE,))
def test_special_whole(observe: Observer, engine: Engine, fields: dict[str, Any]) -> None:
    """The text of a control token becomes that one id, between other text too."""
    types = fields.get("tokenizer.ggml.token_type", [])
    tokens = fields["tokenizer.ggml.tokens"]
    special = {i: tokens[i] for i, kind in enumerate(types) if kind == CONTROL}
    for token_id, text in special.items():
        alone = engine.tokenize(text, add_special=False)
        inside = engine.tokenize(f"before{text}after", add_special=False)
        observe.saw(2, oracle=FILE_READER)
        observe.expect(alone == [token_id], f"{text!r}: expected the one id [{token_id}], got {alone}")
        observe.expect(
            inside.count(token_id) == 1, f"'before{text}after': id {token_id} expected once in {inside}"
        )
    observe.say(f"{len(special)} control tokens, each one id alone and inside a text")


@check("tokenizer.bos_once", kills=("bos_missing", "bos_twice", "eos_added"), needs=(Capability.TOKENIZE,))
def test_bos_once(observe: Observer, engine: Engine, fields: dict[str, Any]) -> None:
    """BOS and EOS are added exactly when the file asks for them, exactly once."""
    spm = fields["tokenizer.ggml.model"] == "llama"
    rules = (
        ("bos", fields.get("tokenizer.ggml.add_bos_token", spm)),
        ("eos", fields.get("tokenizer.ggml.add_eos_token", False)),
    )
    for text in ("", "one", HARD_TEXTS[0]):
        plain, full = engine.tokenize(text, add_special=False), engine.tokenize(text)
        ends: dict[str, list[int]] = {
            name: [fields[f"tokenizer.ggml.{name}_token_id"]] if wanted else [] for name, wanted in rules
        }
        expected = ends["bos"] + plain + ends["eos"]
        observe.saw(len(expected) + 1, oracle=FILE_READER)
        observe.expect(full == expected, f"{text!r}: expected {expected}, got {full}")
        for name, _ in rules:
            token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
            observe.expect(
                token_id not in plain, f"{text!r}: {name} {token_id} added without being asked for"
            )
    bos, eos = ("once" if wanted else "never" for _, wanted in rules)
    observe.say(f"BOS {bos}, EOS {eos}, as the file asks")


@check(
    "tokenizer.byte_fallback",
    kills=("byte_fallback_lost", "pieces_decoded_alone"),
    needs=(Capability.TOKENIZE,),
)
def test_byte_fallback(observe: Observer, engine: Engine, fields: dict[str, Any]) -> None:
    """Characters that the vocabulary lacks become exactly their UTF-8 bytes, and no unknown token."""
    tokens = set(fields["tokenizer.ggml.tokens"])
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    rare = [chr(c) for c in (0xDF, 0x3A9, 0x416, 0x5D0, 0x20AC, 0x65E5, 0xAC00, 0x1F9EA, 0x10FFFF)]
    for character in rare:
        ids = engine.tokenize(character, add_special=False)
        pieces = [engine.detokenize([i]) for i in ids]
        observe.saw(len(character.encode()), oracle="UTF-8")
        observe.expect(
            b"".join(pieces).strip(b" ") == character.encode(),
            f"{character!r}: expected the bytes {character.encode()!r}, got {pieces}",
        )
        observe.expect(unknown not in ids, f"{character!r} became the unknown token {unknown}")
        if fields["tokenizer.ggml.model"] == "llama" and character not in tokens:
            bytes_only = [fields["tokenizer.ggml.tokens"].index(f"<0x{b:02X}>") for b in character.encode()]
            observe.expect(
                ids[-len(bytes_only) :] == bytes_only, f"{character!r}: expected {bytes_only}, got {ids}"
            )
    observe.say(f"{len(rare)} rare characters, {observe.observed} bytes, none lost")


@check(
    "tokenizer.streaming",
    kills=("character_split_in_stream", "stream_holds_back", "every_space_stripped"),
    needs=(Capability.TOKENIZE,),
)
def test_streaming(observe: Observer, engine: Engine) -> None:
    """Streamed text never splits a character and never holds a whole one back."""
    tokenizer = embedded(engine).tokenizer
    split = 0
    for text in HARD_TEXTS:
        stream, shown, ids = tokenizer.stream(), "", engine.tokenize(text, add_special=False)
        for count, token_id in enumerate(ids, 1):
            shown += stream.push(token_id)
            data = tokenizer.decode(ids[:count])
            split += data.decode(errors="replace").endswith("\ufffd")
            observe.saw(1, oracle="the longest whole-character prefix of the bytes")
            expected = longest_text(data)
            observe.expect(
                shown == expected, f"after {count} ids of {text!r}: expected {expected!r}, got {shown!r}"
            )
        shown += stream.finish()
        observe.expect(shown == text, f"{text!r} was streamed as {shown!r}")
    if split == 0:
        raise MissingCapability("no text ends a token inside a character: streaming was not put to the test")
    observe.say(f"{observe.observed} ids streamed, {split} of them ending inside a character, none split")
