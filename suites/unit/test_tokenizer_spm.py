"""The SentencePiece-style tokenizer against the sentencepiece library, on models trained here."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prill_runtime.tokenizer.load import Tokenizer, load_tokenizer

CORPUS = (
    "The river runs past the old mill, and the miller's daughter counts the boats.",
    "Seventeen boats passed on Monday; twelve came back on Tuesday before the rain.",
    "Rain fell over the hills, over the mill and over the river until the river rose.",
    "  def count(boats):\n    return sum(1 for boat in boats if boat.passed)\n",
    "El río corre; la niña cuenta los barcos. Der Fluß steigt über die Ufer.",
)
TEXTS = (
    "", " ", "  ", "a", " a", "a ", "The river", " The  river\n\n", "boats,boats", "naïve 🐟 fish 👩‍👩‍👧",
    "\t\tdef x():", "zzzzzzzz", "mill" * 40, "日本語のテキスト", "e\u0301\u0302", "\x00\x01",
    "<s></s><unk><0x41>", "Ω≈ç√∫", "a\r\nb\u2028c",
)  # fmt: skip
FRAGMENTS = ("The", " river", "boats", "  ", " ", "mill", "er", "é", "🐟", "\n", "<s>", "<0x0A>", "ß", "漢")
# U+2581 is the alphabet's own space; sentencepiece cannot take a lone surrogate, and neither can prill.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
ANY_TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(CHARACTERS, max_size=6), max_size=12).map("".join)
USER_DEFINED = ("[tool]", "[tool][end]", "::")


def train(**options: Any) -> bytes:
    """A BPE model proto without any normalisation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, model_type="bpe", minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        **{"vocab_size": 400, "byte_fallback": True, "add_dummy_prefix": True, **options},
    )  # fmt: skip
    return model.getvalue()


def retyped(proto: bytes, types: Mapping[str, int]) -> bytes:
    """The same model proto with some pieces of another type, by the protobuf wire format."""
    out, at = b"", 0

    def varint(position: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = proto[position]
            value |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                return value, position

    while at < len(proto):
        tag, body = varint(at)
        assert tag & 7 == 2, "every field of a ModelProto is a message"
        size, body = varint(body)
        message, at = proto[body : body + size], body + size
        if tag >> 3 == 1:  # SentencePiece {piece = 1, score = 2, type = 3}: the last type counts
            piece = message[2 : 2 + message[1]].decode()
            message += bytes([0x18, types[piece]]) if piece in types else b""
        length, rest = b"", len(message)
        while rest >= 0x80:
            length, rest = length + bytes([rest & 0x7F | 0x80]), rest >> 7
        out += bytes([tag]) + length + bytes([rest]) + message
    return out


def metadata(model: sentencepiece.SentencePieceProcessor, **overrides: object) -> dict[str, object]:
    """What a GGUF converter writes for this model."""
    tokens = [model.id_to_piece(i) for i in range(model.get_piece_size())]

    def kind(i: int) -> int:
        if model.is_unknown(i):
            return 2
        if model.is_control(i):
            return 3
        if model.is_unused(i):
            return 5
        if model.is_byte(i):
            return 6
        return 4 if tokens[i] in USER_DEFINED else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [kind(i) for i in range(len(tokens))],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        **{f"tokenizer.ggml.{key}": value for key, value in overrides.items()},
    }


PROTO = train()
MODEL = sentencepiece.SentencePieceProcessor(model_proto=PROTO)
TOKENIZER = load_tokenizer(metadata(MODEL), vocab_size=400)


def small(pieces: Mapping[str, float], **overrides: object) -> Tokenizer:
    """A vocabulary of unk, bos, eos and the given pieces with their scores, without byte tokens."""
    return load_tokenizer({
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *pieces],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *pieces.values()],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * len(pieces)],
        **{f"tokenizer.ggml.{key}": value for key, value in overrides.items()},
    })  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_sentencepiece(text: str) -> None:
    """Plain text gives sentencepiece's ids: merge order, space prefix and byte fallback are right."""
    assert TOKENIZER.encode(text, add_special=False, parse_special=False) == MODEL.encode(text)


@settings(deadline=None, max_examples=300)
@given(ANY_TEXT)
def test_ids_equal_sentencepiece_on_any_text(text: str) -> None:
    """No text gives other ids than sentencepiece's."""
    assert TOKENIZER.encode(text, add_special=False, parse_special=False) == MODEL.encode(text)


def test_the_trained_vocabulary_exercises_merges_and_fallback() -> None:
    """The oracle's vocabulary is not trivial: texts merge, and some characters need byte tokens."""
    ids = MODEL.encode(" ".join(CORPUS) + "🐟")
    assert len(ids) < len(" ".join(CORPUS)) / 2
    assert any(MODEL.is_byte(i) for i in ids)


@settings(deadline=None)
@given(ANY_TEXT)
@example("日本 語x")
def test_without_byte_tokens_a_run_of_unknown_characters_is_one_unk(text: str) -> None:
    """Without byte fallback the ids, unk ids included, are sentencepiece's."""
    assert NO_BYTES.encode(text, add_special=False, parse_special=False) == NO_BYTES_MODEL.encode(text)


NO_BYTES_MODEL = sentencepiece.SentencePieceProcessor(model_proto=train(byte_fallback=False, vocab_size=150))
NO_BYTES = load_tokenizer(metadata(NO_BYTES_MODEL))


@settings(deadline=None)
@given(st.lists(st.sampled_from([*USER_DEFINED, *FRAGMENTS]), max_size=10).map("".join))
@example("[tool][end]x[tool] y::")
def test_user_defined_tokens_are_matched_whole_longest_first(text: str) -> None:
    """User-defined symbols and a vocabulary without space prefix give sentencepiece's ids."""
    ids = USER.encode(text, add_special=False, parse_special=False)
    assert ids == USER_MODEL.encode(text)
    assert USER.decode(ids) == text.encode()


USER_MODEL = sentencepiece.SentencePieceProcessor(
    model_proto=train(user_defined_symbols=list(USER_DEFINED), add_dummy_prefix=False)
)
USER = load_tokenizer(metadata(USER_MODEL, add_space_prefix=False))


@settings(deadline=None)
@given(ANY_TEXT)
@example("The river runs")
def test_unused_tokens_are_taken_apart_again(text: str) -> None:
    """Tokens marked UNUSED take part in merging but never come out, as in sentencepiece."""
    ids = UNUSED.encode(text, add_special=False, parse_special=False)
    assert ids == UNUSED_MODEL.encode(text)


UNUSED_PIECES = ("▁river", "▁the", "▁T", "he", "er")
UNUSED_MODEL = sentencepiece.SentencePieceProcessor(
    model_proto=retyped(PROTO, dict.fromkeys(UNUSED_PIECES, 5))
)
UNUSED = load_tokenizer(metadata(UNUSED_MODEL))


def test_the_unused_model_differs_from_the_plain_one() -> None:
    """The planted UNUSED types matter: the same text gives other ids."""
    assert UNUSED_MODEL.encode("The river") != MODEL.encode("The river")


def test_scores_decide_not_ids() -> None:
    """The highest score merges first, whatever the order of the tokens."""
    tokenizer = small({"▁": -9, "a": -9, "b": -9, "c": -9, "ab": -2, "bc": -1}, add_space_prefix=False)
    assert [tokenizer.name(i) for i in tokenizer.encode("abc", add_special=False)] == ["a", "bc"]


def test_the_leftmost_pair_merges_first_on_ties() -> None:
    """Equal scores merge from the left."""
    tokenizer = small({"a": -9, "b": -9, "c": -9, "ab": -1, "bc": -1, "aa": -1}, add_space_prefix=False)
    assert [tokenizer.name(i) for i in tokenizer.encode("abcaaa", add_special=False)] == [
        "ab",
        "c",
        "aa",
        "a",
    ]


def test_a_character_without_token_bytes_or_unk_is_left_out_and_counted() -> None:
    """Text that nothing stands for is left out, each character counted; nothing merges over the gap."""
    tokenizer = load_tokenizer({
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["▁", "a", "aa"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0], "tokenizer.ggml.token_type": [1, 1, 1],
    })  # fmt: skip
    assert tokenizer.encode("aéa") == [0, 1, 1]
    assert tokenizer.lost("aéaÿé") == 3
    assert tokenizer.lost("aa") == 0


def test_without_scores_the_leftmost_pair_merges_first() -> None:
    """A file without scores is one whose scores are all 0, as in llama.cpp."""
    tokens = ["▁", "a", "b", "ab", "ba"]
    shared = {f"tokenizer.ggml.{key}": value for key, value in
              {"model": "llama", "tokens": tokens, "token_type": [1] * 5}.items()}  # fmt: skip
    bare = load_tokenizer(shared)
    assert bare.encode("bab") == [0, 4, 2]
    scored = load_tokenizer({**shared, "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 1.0, 0.0]})
    assert scored.encode("bab") == [0, 2, 3]


def test_a_character_with_only_some_byte_tokens_is_unk() -> None:
    """Half a character is never given: without all of its bytes it is unk."""
    model = {**metadata(MODEL)}
    tokens = [MODEL.id_to_piece(i) for i in range(400)]
    types = list(model["tokenizer.ggml.token_type"])  # type: ignore[call-overload]
    lost = tokens.index("<0x9F>")
    tokens[lost], types[lost] = "no byte", 1
    tokenizer = load_tokenizer({**model, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    assert tokenizer.encode("a🐟", add_special=False)[-1] == MODEL.unk_id()
    assert tokenizer.decode(tokenizer.encode("a🐟")) == "a\ufffd".encode()


@settings(deadline=None, max_examples=300)
@given(ANY_TEXT)
@example(" leading")
@example("  two")
def test_decode_inverts_encode(text: str) -> None:
    """Encoding and decoding gives back the bytes of any text, leading spaces included."""
    ids = TOKENIZER.encode(text, add_special=False, parse_special=False)
    assert TOKENIZER.decode(ids) == text.encode()
    assert TOKENIZER.decode([MODEL.bos_id(), *ids]) == text.encode()


def test_decode_agrees_with_sentencepiece() -> None:
    """Byte tokens, spaces and the stripped prefix read as sentencepiece reads them."""
    for text in TEXTS:
        ids = MODEL.encode(text)
        assert TOKENIZER.decode(ids).decode() == MODEL.decode(ids) == text


def test_a_literal_lower_one_eighth_block_reads_as_a_space() -> None:
    """U+2581 is the one character that does not come back: the vocabulary's alphabet uses it for space."""
    assert TOKENIZER.decode(TOKENIZER.encode("a\u2581b", add_special=False)) == b"a b"


def test_the_prefix_is_put_after_special_tokens_and_removed_again() -> None:
    """A text after a special token gets its own space prefix, and decoding removes exactly that one."""
    plain = TOKENIZER.encode("river", add_special=False)
    assert TOKENIZER.encode("mill<s>river", add_special=False)[-len(plain) :] == plain
    assert TOKENIZER.decode(TOKENIZER.encode("mill<s>river</s> x")) == b"millriver x"


def test_only_one_space_is_the_prefix() -> None:
    """A token of several spaces loses one of them at the start, and no more."""
    tokenizer = small({"▁": -9, "a": -9, "▁▁": -1})
    ids = tokenizer.encode(" a", add_special=False)
    assert [tokenizer.name(i) for i in ids] == ["▁▁", "a"]
    assert tokenizer.decode(ids) == b" a"


def test_merging_never_gives_a_control_token() -> None:
    """Text that spells a control token stays text even where its parts could merge into it."""
    tokenizer = small({"▁": -9, "<": -9, "s": -9, ">": -9, "<s": -1})
    ids = tokenizer.encode("<s>", add_special=False, parse_special=False)
    assert [tokenizer.name(i) for i in ids] == ["▁", "<s", ">"]


def test_piece_and_continuation_keep_the_space() -> None:
    """Only the start of a full decode loses its prefix: a piece or a continuation keeps the space."""
    ids = TOKENIZER.encode("the river", add_special=False)
    assert TOKENIZER.piece(ids[0]).startswith(b" ")
    assert TOKENIZER.decode(ids, continuation=True) == b" the river"
    stream = TOKENIZER.stream(continuation=True)
    assert "".join([*map(stream.push, ids), stream.finish()]) == " the river"


def test_every_byte_token_is_its_byte() -> None:
    """The piece of <0xXX> is the one byte XX."""
    pieces = {TOKENIZER.piece(i) for i in range(400) if MODEL.is_byte(i)}
    assert pieces == {struct.pack("B", byte) for byte in range(256)}


def test_without_token_types_bytes_and_control_tokens_are_known_by_their_role() -> None:
    """A file without token_type still has byte fallback, bos, eos and unk."""
    bare = {key: value for key, value in metadata(MODEL).items() if "token_type" not in key}
    tokenizer = load_tokenizer(bare)
    assert tokenizer.encode("🐟 river") == TOKENIZER.encode("🐟 river")
    assert tokenizer.decode(tokenizer.encode("🐟 river</s>")) == "🐟 river".encode()
