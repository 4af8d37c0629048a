"""Is text turned into the right ids and back? The engine's tokenizer against the file's own vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from prill_harness.engines.base import Capability, Engine
from prill_harness.run.checks import Observer, check
from prill_harness.tokens.golden import Golden
from prill_runtime.errors import MissingCapability
from prill_runtime.tokenizer.load import load_tokenizer
from prill_runtime.tokenizer.pretokenizers import PRE_TOKENIZERS
from prill_suites.common import FILE_READER, embedded, file_fields
from prill_suites.tokenizer_drawn import SEED, vocabularies
from prill_suites.tokenizer_texts import AROUND, HARD_TEXTS, NO_SPECIAL, RARE, WORDY, long_text, parting
from prill_suites.tokenizer_twins import NORMAL, UNUSED, USER_DEFINED, Ambiguous, Twin, longest_text
from prill_suites.tokenizer_words import BY_NAME, Words

OWN = 48  # tokens of the vocabulary itself that are tried as texts
TWIN = "naive tokenizer by the file's vocabulary"
CHUNKS = (1, 7, 512)  # ids


@pytest.fixture(scope="module")
def twin(model_path: Path) -> Twin:
    """What the file's metadata, as gguf reads it, says about text."""
    return Twin(file_fields(model_path))


def own_texts(twin: Twin) -> list[str]:
    """Texts that tokens of the vocabulary stand for, alone and two by two, evenly out of all of it."""
    wanted = [i for i, kind in enumerate(twin.types) if kind in (NORMAL, USER_DEFINED, UNUSED)]
    pieces = [twin.piece(i) for i in wanted[:: max(1, len(wanted) // OWN)]]
    texts = [piece.decode() for piece in pieces if piece and longest_text(piece).encode() == piece]
    return list(dict.fromkeys([*texts, *map("".join, pairwise(texts))]))


def spelled_texts(twin: Twin, texts: Iterable[str]) -> list[tuple[str, bytes]]:
    """The texts of which the twin can tell what comes back, with that."""
    found = [(text, twin.spelled(text)) for text in texts]
    return [(text, spelled) for text, spelled in found if spelled is not None]


@check(
    "tokenizer.prompt_ids",
    kills=("bos_missing", "bos_twice", "space_prefix_lost", "merge_order", "golden_cut_short"),
    needs=(Capability.TOKENIZE,),
)
def test_prompt_ids(observe: Observer, engine: Engine, golden: Golden, twin: Twin) -> None:
    """Every golden prompt becomes exactly its golden ids, special tokens included."""
    for number, prompt in enumerate(golden.prompts):
        ids = engine.tokenize(prompt.text)
        # A prompt that no text spells is ids alone: the empty text gives what the file adds to any.
        expected = prompt.ids if prompt.text else [*twin.begin, *twin.end]
        observe.saw(max(1, len(expected)), oracle="golden ids")
        observe.expect(
            ids == expected,
            f"prompt {number}: expected {len(expected)} ids {expected[:8]}…, got {len(ids)}: {ids[:8]}…",
            prompt=prompt.text,
            expected=expected,
            got=ids,
        )
    observe.say(f"{len(golden.prompts)} prompts, {observe.observed} ids, all equal to the golden ids")


@check(
    "tokenizer.merges",
    kills=(
        "merge_order",
        "merge_ranks_reversed",
        "space_prefix_lost",
        "space_prefix_kept",
        "variation_selector_dropped",
        "lone_return_translated",
        "nul_ends_text",
        "long_text_in_pieces",
    ),
    needs=(Capability.TOKENIZE,),
)
def test_merges(observe: Observer, engine: Engine, golden: Golden, twin: Twin) -> None:
    """The pieces are those that a naive twin merges from the file's scores or merge list."""
    samples = {*(prompt.text for prompt in golden.prompts), *HARD_TEXTS, *own_texts(twin), "", long_text()}
    tried = 0
    for text in sorted(samples):
        try:
            expected = twin.ids(text)
        except Ambiguous:
            continue
        got = engine.tokenize(text, add_special=False)
        tried += 1
        observe.saw(max(1, len(expected)), oracle=TWIN)
        observe.expect(got == expected, f"{text[:40]!r}: ids {parting(expected, got)}")
    observe.say(
        f"{tried} texts of up to {len(long_text())} characters, {observe.observed} ids, all as the twin's"
    )


@check(
    "tokenizer.round_trip",
    kills=(
        "byte_fallback_lost",
        "space_prefix_lost",
        "text_normalised",
        "text_stripped",
        "text_in_lower_case",
        "newlines_translated",
        "variation_selector_dropped",
        "lone_return_translated",
        "nul_ends_text",
    ),
    needs=(Capability.TOKENIZE,),
)
def test_round_trip(observe: Observer, engine: Engine, twin: Twin) -> None:
    """Text goes to ids and back without losing a byte that the vocabulary can spell, on texts that hurt."""
    tried = spelled_texts(twin, [*HARD_TEXTS, *own_texts(twin), "", long_text()])
    silent = twin.control.issuperset([*twin.begin, *twin.end])  # a BOS that is no control token would be read
    whole = 0
    for text, expected in tried:
        back = engine.detokenize(engine.tokenize(text, add_special=silent))
        observe.saw(max(1, len(expected)), oracle="the text itself, as far as the vocabulary can spell it")
        observe.expect(back == expected, f"{text[:40]!r} came back otherwise: {parting(expected, back)}")
        whole += back == text.encode()
    lost = f"; {len(tried) - whole} hold what the vocabulary cannot spell" if whole < len(tried) else ""
    observe.say(f"{len(tried)} texts, {observe.observed} bytes, all came back{lost}")


@check(
    "tokenizer.special_whole",
    kills=(
        "special_token_split",
        "space_before_special_stripped",
        "space_after_special_stripped",
        "space_prefix_at_start_only",
        "harmony_token_split",
    ),
    needs=(Capability.TOKENIZE,),
)
def test_special_whole(observe: Observer, engine: Engine, twin: Twin) -> None:
    """The text of a special token becomes that one id, between other text too; no other text does."""
    for token_id in twin.special:
        text = twin.tokens[token_id]
        alone = engine.tokenize(text, add_special=False)
        observe.saw(1, oracle=FILE_READER)
        observe.expect(alone == [token_id], f"{text!r}: expected the one id [{token_id}], got {alone}")
        for around in AROUND:
            inside = around.replace("{}", text)
            try:
                expected = twin.ids(inside)
            except Ambiguous:
                continue
            got = engine.tokenize(inside, add_special=False)
            observe.saw(1, oracle=TWIN)
            observe.expect(got == expected, f"{inside!r}: ids {parting(expected, got)}")
    others = [text for text in NO_SPECIAL if not any(isinstance(part, int) for part in twin.parts(text))]
    for text in others:
        ids = engine.tokenize(text, add_special=False)
        observe.saw(1, oracle=FILE_READER)
        control = sorted((twin.control - {twin.unk}).intersection(ids))
        observe.expect(not control, f"{text!r} is no special token, and became {ids} with {control}")
        spelled, back = twin.spelled(text), engine.detokenize(ids)
        observe.expect(
            spelled in (None, back), f"{text!r} is no special token: expected {spelled!r}, got {back!r}"
        )
    observe.say(
        f"{len(twin.special)} special tokens, each one id alone and inside {len(AROUND)} texts; "
        f"{len(others)} texts that look like one and are none stay text"
    )


@check("tokenizer.bos_once", kills=("bos_missing", "bos_twice", "eos_added"), needs=(Capability.TOKENIZE,))
def test_bos_once(observe: Observer, engine: Engine, twin: Twin) -> None:
    """BOS and EOS are added exactly when the file or its pre-tokenizer asks for them, exactly once."""
    own = [twin.tokens[i] for i in (twin.bos, twin.eos) if i is not None]
    for text in ("", "one", HARD_TEXTS[0], *own, *(f"{token}one{token}" for token in own)):
        plain, full = engine.tokenize(text, add_special=False), engine.tokenize(text)
        expected = [*twin.begin, *plain, *twin.end]
        observe.saw(len(expected) + 1, oracle=FILE_READER)
        observe.expect(full == expected, f"{text!r}: expected {expected}, got {full}")
        spelled = [part for part in twin.parts(text) if isinstance(part, int)]
        for name, token_id in (("bos", twin.bos), ("eos", twin.eos)):
            if token_id in twin.control and token_id not in spelled:
                observe.expect(
                    token_id not in plain, f"{text!r}: {name} {token_id} added without being asked for"
                )
    bos, eos = ("once" if added else "never" for added in (twin.begin, twin.end))
    observe.say(f"BOS {bos}, EOS {eos}, as the file asks")


@check(
    "tokenizer.byte_fallback",
    kills=("byte_fallback_lost", "pieces_decoded_alone"),
    needs=(Capability.TOKENIZE,),
)
def test_byte_fallback(observe: Observer, engine: Engine, twin: Twin) -> None:
    """Characters that the vocabulary lacks become exactly their UTF-8 bytes; where it has no tokens for them,
    the unknown token; and where it has none, nothing."""
    whole = 0
    for character in RARE:
        ids, expected = engine.tokenize(character, add_special=False), twin.ids(character)
        pieces, spelled = [engine.detokenize([i]) for i in ids], twin.spelled(character)
        observe.saw(len(character.encode()), oracle="UTF-8, and the file's vocabulary")
        observe.expect(ids == expected, f"{character!r}: expected {expected}, got {ids}")
        if spelled == character.encode():
            whole += 1
            observe.expect(
                b"".join(pieces).strip(b" ") == character.encode(),
                f"{character!r}: expected the bytes {character.encode()!r}, got {pieces}",
            )
    lost = len(RARE) - whole
    rest = f"{lost} that it cannot spell are unknown or left out" if lost else "none lost"
    observe.say(f"{len(RARE)} rare characters, {observe.observed} bytes, {rest}")


@check(
    "tokenizer.streaming",
    kills=("character_split_in_stream", "stream_holds_back", "every_space_stripped", "stream_end_lost"),
    needs=(Capability.TOKENIZE,),
)
def test_streaming(observe: Observer, engine: Engine, twin: Twin) -> None:
    """Streamed text never splits a character and never holds a whole one back."""
    tokenizer = embedded(engine).tokenizer
    streams = [engine.tokenize(text, add_special=False) for text in [*HARD_TEXTS, *own_texts(twin)]]
    halves = [i for i in range(len(twin.tokens)) if longest_text(twin.piece(i)).encode() != twin.piece(i)]
    # Ids in any order too: halves of characters that no text would put together.
    some = halves[:: max(1, len(halves) // OWN)]
    streams += [halves[:OWN], *([i] for i in some), list(range(min(len(twin.tokens), OWN)))]
    split, stream = 0, tokenizer.stream()  # finished, it starts anew
    for ids in streams:
        shown = ""
        for count, token_id in enumerate(ids, 1):
            shown += stream.push(token_id)
            data = twin.text(ids[:count])
            expected = longest_text(data)
            split += expected.encode() != data
            observe.saw(1, oracle="the longest whole-character prefix of the bytes")
            observe.expect(
                shown == expected, f"after {count} of the ids {ids}: expected {expected!r}, got {shown!r}"
            )
        shown, whole = shown + stream.finish(), twin.text(ids).decode(errors="replace")
        observe.expect(shown == whole, f"the ids {ids} were streamed as {shown!r}, expected {whole!r}")
    ids = engine.tokenize(long_text(), add_special=False)
    expected = twin.text(ids).decode(errors="replace")
    shown = "".join(map(stream.push, ids)) + stream.finish()
    observe.saw(len(ids), oracle="the bytes of all ids")
    observe.expect(shown == expected, f"a long text was streamed otherwise: {parting(expected, shown)}")
    if halves and not split:
        raise MissingCapability("no text ends a token inside a character: streaming was not put to the test")
    ending = f"{split} of them ending inside a character, none split" if halves else "of whole characters all"
    observe.say(f"{observe.observed} ids streamed, {ending}")


@check(
    "tokenizer.decoding",
    kills=("spaces_cleaned_up", "incomplete_end_dropped", "continuation_stripped", "pieces_decoded_alone"),
    needs=(Capability.TOKENIZE,),
)
def test_decoding(observe: Observer, engine: Engine, twin: Twin) -> None:
    """Ids up to any place give the bytes that they stand for, a part of a character too; so do the ids of a
    long text, taken in chunks of any size."""
    texts = [*HARD_TEXTS, *(around.replace("{}", twin.tokens[i]) for i in twin.special for around in AROUND)]
    for text in texts:
        ids = engine.tokenize(text, add_special=False)
        for count in range(len(ids) + 1):
            expected, got = twin.text(ids[:count]), engine.detokenize(ids[:count])
            observe.saw(1, oracle="the pieces of the file's vocabulary")
            observe.expect(got == expected, f"{count} ids of {text!r}: {parting(expected, got)}")
    decode, ids = embedded(engine).tokenizer.decode, engine.tokenize(long_text(), add_special=False)
    for size in CHUNKS:
        chunks = [(ids[at : at + size], at > 0) for at in range(0, len(ids), size)]
        expected = b"".join(twin.text(chunk, behind) for chunk, behind in chunks)
        got = b"".join(decode(chunk, continuation=behind) for chunk, behind in chunks)
        observe.saw(len(ids), oracle="the pieces of the file's vocabulary")
        observe.expect(got == expected, f"a long text in chunks of {size} ids: {parting(expected, got)}")
    observe.say(
        f"{observe.observed} ids decoded: {len(texts)} texts to any place, a long one in {len(CHUNKS)} sizes"
    )


@check(
    "tokenizer.pre_tokenizers",
    kills=(
        "digits_in_fours",
        "contractions_in_one_case",
        "returns_are_spaces",
        "marks_are_letters",
        "o200k_marks_apart",
    ),
)
def test_pre_tokenizers(observe: Observer, engine: Engine) -> None:
    """Whatever pre-tokenizer a file may name cuts text where a second implementation of it does."""
    embedded(engine)
    known = PRE_TOKENIZERS.keys() ^ BY_NAME.keys()
    observe.expect(not known, f"names that one of the two does not know: {sorted(known)}")
    for name in {pre: name for name, pre in PRE_TOKENIZERS.items()}.values():
        runtime, own = PRE_TOKENIZERS[name].build(), Words(name)
        own.cut("".join(WORDY))
        for text in WORDY:
            expected, got = own.cut(text), [text[a:b] for _, (a, b) in runtime.pre_tokenize_str(text)]
            observe.saw(len(expected), oracle="the published expressions, by Python's re")
            observe.expect(got == expected, f"{name!r} cuts {text!r} otherwise: {parting(expected, got)}")
    observe.say(f"{len(BY_NAME)} names, {len(WORDY)} texts, {observe.observed} words, each as published")


@check(
    "tokenizer.drawn",
    kills=(
        "specials_in_order_of_ids",
        "specials_from_the_left",
        "ties_to_the_right",
        "runs_of_spaces_apart",
        "all_spaces_of_prefix_stripped",
    ),
)
def test_drawn(observe: Observer, engine: Engine) -> None:
    """On drawn vocabularies, of special tokens that overlap, scores that tie and pieces of several spaces,
    ids are the naive twin's, and so are the bytes that come back."""
    embedded(engine)
    observe.seed, drawn = SEED, list(vocabularies())
    for number, (fields, texts) in enumerate(drawn):
        tokenizer, twin = load_tokenizer(fields), Twin(fields)
        for text in texts:
            expected, got = twin.ids(text), tokenizer.encode(text, add_special=False)
            observe.saw(max(1, len(expected)), oracle=TWIN)
            observe.expect(
                got == expected, f"drawn vocabulary {number}, {text!r}: ids {parting(expected, got)}"
            )
            back, bytes_of = tokenizer.decode(got), twin.text(expected)
            observe.expect(
                back == bytes_of, f"drawn vocabulary {number}, {text!r}: bytes {parting(bytes_of, back)}"
            )
    observe.say(
        f"{len(drawn)} drawn vocabularies, {observe.observed} ids, all as the twin's, and the bytes of each"
    )


@check("tokenizer.ends", kills=("ends_forgotten",), needs=(Capability.TOKENIZE,))
def test_ends(observe: Observer, engine: Engine, twin: Twin) -> None:
    """A text ends at the ids that the file names, and at texts known to end one, whatever their type."""
    got = embedded(engine).tokenizer.eog_ids
    observe.saw(len(twin.tokens), oracle=FILE_READER)
    wrong = sorted(got ^ twin.ends)
    observe.expect(
        not wrong,
        f"{len(wrong)} ids end a text for one and not for the other, the first {wrong[:1]} "
        f"{[twin.tokens[i] for i in wrong[:1]]}: expected {sorted(twin.ends)}, got {sorted(got)}",
    )
    names = ", ".join(repr(twin.tokens[i]) for i in sorted(twin.ends)) or "none"
    observe.say(f"of {len(twin.tokens)} tokens {len(twin.ends)} end a text: {names}")
