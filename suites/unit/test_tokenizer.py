"""What both tokenizer families share: special tokens, BOS and EOS, ends of generation, streaming, digest."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prill_runtime.errors import InvalidParameter, ModelFileError, PrillError, UnsupportedModel
from prill_runtime.tokenizer.load import Tokenizer, load_tokenizer

# GPT-2 spells the bytes that are not printable Latin-1 from U+0100 upwards.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = [chr(byte if byte in PRINTABLE else 256 + OTHERS.index(byte)) for byte in range(256)]
CONTROL = ("<|im_start|>", "<|im_end|>", "<|im_end|>\n", "<s>", "</s>", "<|end|>", "<|return|>")


def spm(**overrides: object) -> dict[str, object]:
    """A small "llama" vocabulary: unk 0, bytes 1-256, then words, then control and user-defined tokens."""
    words = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "é"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *CONTROL, "[u]"]
    types = [2, *[6] * 256, *[1] * len(words), *[3] * len(CONTROL), 4]
    base = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": [-float(i) for i in range(len(tokens))],
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        "unknown_token_id": 0,
    }
    return finished(base, overrides)


def bpe(**overrides: object) -> dict[str, object]:
    """A small "gpt2" vocabulary: bytes 0-255, then words, then control and user-defined tokens."""
    words = ["ab", "Ġa", "Ġab", "Ã©"]
    tokens = [*ALPHABET, *words, *CONTROL, "[u]"]
    base = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [*[1] * (256 + len(words)), *[3] * len(CONTROL), 4],
        "merges": ["a b", "Ġ a", "Ġ ab", "Ã ©"],
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
    }
    return finished(base, overrides)


def finished(base: dict[str, object], overrides: dict[str, object]) -> dict[str, object]:
    """The keys with their prefix; an override of None takes a key away."""
    return {
        f"tokenizer.ggml.{key}": value for key, value in {**base, **overrides}.items() if value is not None
    }


FAMILIES = pytest.mark.parametrize("family", [spm, bpe])
SPM, BPE = load_tokenizer(spm()), load_tokenizer(bpe())
BOTH = pytest.mark.parametrize("tokenizer", [SPM, BPE], ids=["llama", "gpt2"])
TEXT = st.text(
    st.sampled_from("abc é🐟👩\u200d\u0301\n<|>") | st.characters(exclude_categories=["Cs"]), max_size=12
)


def named(tokenizer: Tokenizer, name: str) -> int:
    return tokenizer.vocabulary.ids[name]


@BOTH
@settings(deadline=None)
@example(parts=["<|im_end|>", "\n\n"])
@example(parts=["<|im_end|>", "\n", "\n", "a"])
@given(
    parts=st.lists(
        st.sampled_from(CONTROL[:2] + CONTROL[3:]) | st.just("[u]") | st.text("abc é\n"), max_size=8
    )
)
def test_special_tokens_are_never_split(tokenizer: Tokenizer, parts: list[str]) -> None:
    """Each special token spelled out in a text becomes its one id, in order, and nothing else does."""
    # With any line feed behind it, another token would begin: "<|im_end|>\n" is one too.
    text = re.sub(r"(<\|im_end\|>)\n+", r"\1", "".join(parts))
    expected = [named(tokenizer, part) for part in parts if part in (*CONTROL, "[u]")]
    ids = tokenizer.encode(text, add_special=False)
    assert [i for i in ids if tokenizer.vocabulary.types[i] in (3, 4)] == expected


@BOTH
def test_the_longest_special_token_matches_first(tokenizer: Tokenizer) -> None:
    """Where one special token begins another, the longer one is taken."""
    ids = tokenizer.encode("<|im_end|>\n<|im_end|>", add_special=False)
    assert ids == [named(tokenizer, "<|im_end|>\n"), named(tokenizer, "<|im_end|>")]


@BOTH
def test_without_parse_special_control_tokens_are_text_and_user_defined_ones_are_not(
    tokenizer: Tokenizer,
) -> None:
    """parse_special=False keeps control tokens from a text, but still matches user-defined ones."""
    ids = tokenizer.encode("a<|im_end|>[u]", add_special=False, parse_special=False)
    assert {tokenizer.vocabulary.types[i] for i in ids[:-1]} <= {1, 6}
    assert ids[-1] == named(tokenizer, "[u]")
    assert tokenizer.decode(ids) == b"a<|im_end|>[u]"


def test_the_unknown_token_is_special_only_where_parsed() -> None:
    """<unk> in a text is the unk id when special tokens are parsed, and plain text when not."""
    assert SPM.encode("<unk>", add_special=False) == [0]
    assert 0 not in SPM.encode("<unk>", add_special=False, parse_special=False)


@pytest.mark.parametrize(
    ("metadata", "adds_bos", "adds_eos"),
    [
        (spm(), True, False),
        (spm(add_bos_token=False), False, False),
        (spm(add_eos_token=True), True, True),
        (bpe(), False, False),
        (bpe(add_bos_token=True, add_eos_token=True), True, True),
        (bpe(pre="llama-bpe"), True, False),
        (bpe(pre="tekken"), True, False),
        (bpe(pre="llama-bpe", add_bos_token=False), False, False),
        (bpe(pre="llama-bpe", bos_token_id=None), False, False),
        (bpe(add_bos_token=True, bos_token_id=None), False, False),
        (spm(add_eos_token=True, eos_token_id=None, token_type=[1] * 273), True, False),
    ],
)
def test_bos_and_eos_follow_the_file(metadata: dict[str, object], adds_bos: bool, adds_eos: bool) -> None:
    """BOS and EOS are added once, where file or family say so, and only with add_special."""
    tokenizer = load_tokenizer(metadata)
    inner = tokenizer.encode("ab", add_special=False)
    assert tokenizer.bos_id not in inner
    assert tokenizer.encode("ab") == [tokenizer.bos_id] * adds_bos + inner + [tokenizer.eos_id] * adds_eos
    assert tokenizer.encode("") == [tokenizer.bos_id] * adds_bos + [tokenizer.eos_id] * adds_eos
    assert tokenizer.encode("", add_special=False) == []


def test_llama_defaults_hold_only_for_tokens_of_that_role() -> None:
    """Without ids a "llama" file has bos 1, eos 2 and unk 0 if those are such tokens, else none."""
    silent = {"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None}
    tokens, types = ["<unk>", "<s>", "</s>", "a"], [2, 3, 3, 1]
    usual = load_tokenizer(spm(tokens=tokens, token_type=types, scores=[0.0] * 4, **silent))
    assert (usual.bos_id, usual.eos_id, usual.encode("a", parse_special=False)[0]) == (1, 2, 1)
    assert 0 in usual.encode("é")
    other = load_tokenizer(spm(**silent))
    assert (other.bos_id, other.eos_id) == (None, None)


@BOTH
@settings(deadline=None, max_examples=300)
@given(text=TEXT)
@example(text="🐟👩\u200d👩\u200d👧e\u0301")
def test_a_stream_gives_whole_characters_that_add_up(tokenizer: Tokenizer, text: str) -> None:
    """Characters split over byte tokens come out whole: no push of a valid text gives U+FFFD."""
    ids = tokenizer.encode(text, parse_special=False)
    stream = tokenizer.stream()
    pushed = [stream.push(token_id) for token_id in ids]
    assert stream.finish() == ""
    assert (
        "".join(pushed)
        == tokenizer.decode(ids).decode("utf-8")
        == text.replace("\u2581", " " * (tokenizer is SPM) or "\u2581")
    )


@BOTH
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_stream_of_any_ids_equals_their_decoding(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Even ids that make no valid UTF-8 stream to exactly what decoding them at once gives."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    stream = tokenizer.stream()
    streamed = "".join([*map(stream.push, ids), stream.finish()])
    assert streamed == tokenizer.decode(ids).decode("utf-8", "replace")


def test_an_incomplete_character_waits_and_then_is_replaced() -> None:
    """The first bytes of a character give nothing until finish, which gives one U+FFFD; then all is new."""
    stream = BPE.stream()
    assert [stream.push(byte) for byte in "🐟".encode()[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    assert "".join(stream.push(byte) for byte in "🐟".encode()) == "🐟"


@BOTH
def test_control_tokens_decode_to_nothing_and_keep_their_name(tokenizer: Tokenizer) -> None:
    """Control tokens leave no trace in the text, and can still be shown to people."""
    token_id = named(tokenizer, "<|im_end|>")
    assert tokenizer.piece(token_id) == b""
    assert tokenizer.name(token_id) == "<|im_end|>"
    assert tokenizer.decode([token_id, *tokenizer.encode("ab"), token_id]) == b"ab"


@BOTH
@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token_id: int) -> None:
    """Ids outside the vocabulary are an error in every direction, never another token."""
    for use in (tokenizer.piece, tokenizer.name, tokenizer.stream().push, lambda i: tokenizer.decode([i])):
        with pytest.raises(InvalidParameter, match="id is outside the vocabulary: expected 0 to"):
            use(token_id)


@BOTH
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    """Text that UTF-8 cannot encode is one sentence that names the character, not a traceback."""
    with pytest.raises(
        InvalidParameter, match=r"character 1: text holds the lone surrogate U\+D83D"
    ) as caught:
        tokenizer.encode("a\ud83d")
    assert "\n" not in str(caught.value)


def swapped(values: object) -> list[object]:
    assert isinstance(values, list)
    return [values[1], values[0], *values[2:]]


@pytest.mark.parametrize(
    ("family", "change"),
    [
        (spm, {"add_space_prefix": False}),
        (spm, {"add_bos_token": False}),
        (spm, {"add_eos_token": True}),
        (spm, {"bos_token_id": 270}),
        (spm, {"eos_token_id": 270}),
        (spm, {"eot_token_id": 5}),
        (spm, {"scores": swapped(spm()["tokenizer.ggml.scores"])}),
        (spm, {key: swapped(spm()[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type")}),
        (bpe, {"pre": "qwen2"}),
        (bpe, {"pre": "llama-bpe", "add_bos_token": False}),
        (bpe, {"merges": swapped(bpe()["tokenizer.ggml.merges"])}),
        (bpe, {"tokens": swapped(bpe()["tokenizer.ggml.tokens"])}),
        (bpe, {"token_type": [*bpe()["tokenizer.ggml.token_type"][:-1], 3]}),  # type: ignore[index]
    ],
)  # fmt: skip
def test_the_digest_changes_with_everything_that_decides(family: object, change: dict[str, object]) -> None:
    """Each thing that decides tokenization is in the digest."""
    make = spm if family is spm else bpe
    assert load_tokenizer(make()).digest != load_tokenizer(make(**change)).digest


@FAMILIES
def test_the_digest_ignores_what_decides_nothing(family: object) -> None:
    """Spelled-out defaults, the order of keys and other metadata leave the digest alone."""
    make = spm if family is spm else bpe
    keys = list(make(add_eos_token=False, add_bos_token=make is spm).items())
    random.Random(0).shuffle(keys)
    same = load_tokenizer({**dict(keys), "general.name": "another"})
    assert same.digest == load_tokenizer(make()).digest
    assert len(same.digest) == 64


def test_the_digest_stays_what_recorded_goldens_hold() -> None:
    """The canonical form is part of every golden's fingerprint: it may change only on purpose."""
    assert SPM.digest == "8eb92ff261391a6a9b06fdd0c9ddcbbab07fc975b0c6b4aa0884e67faf2e9b9d"
    assert BPE.digest == "0e1226718f7efb02a7c5730cb44f3d9be7333871b8e46aaca2e4814a3090e6d4"


def test_an_unknown_model_is_named() -> None:
    """A tokenizer model prill does not know is unsupported, by name; none at all is a broken file."""
    with pytest.raises(UnsupportedModel, match=r"'rwkv' is not known: expected one of gpt2, llama"):
        load_tokenizer(spm(model="rwkv"))
    with pytest.raises(ModelFileError, match=r"tokenizer.ggml.model: key is missing"):
        load_tokenizer({})


BROKEN: list[tuple[str, dict[str, object], str]] = [
    ("no tokens", spm(tokens=None), r"tokenizer.ggml.tokens: key is missing"),
    ("no tokens at all", spm(tokens=[]), r"tokens is empty: expected at least 1 token"),
    ("tokens of numbers", spm(tokens=[1, 2]), r"tokens has the wrong type.* array of text, got of 1"),
    ("token not Unicode", spm(tokens=["a", "\udc80"]), r"tokens holds no text at 1: .*, got .\\udc80"),
    ("too few scores", spm(scores=[0.0]), r"scores does not match.* expected \d+, got 1"),
    ("too many scores", spm(scores=[0.0] * 999), r"scores does not match.*got 999"),
    ("scores of strings", spm(scores=["x"] * 273), r"scores has the wrong type.* array of numbers"),
    ("score not a number", spm(scores=[float("nan")] * 273), r"scores of token 0 is not a number"),
    ("nested scores", spm(scores=[[0.0], [0.0, 1.0]]), r"scores has the wrong type: .* got of an array of 1"),
    ("too few types", spm(token_type=[1]), r"token_type does not match"),
    ("fractional types", spm(token_type=[1.5] * 273), r"token_type has the wrong type"),
    ("unknown type", spm(token_type=[2, 9, *[1] * 271]), r"type of token 1 is unknown.* 1 to 6, got 9"),
    ("bos outside", spm(bos_token_id=273), r"bos_token_id is outside.*expected 0 to 272, got 273"),
    ("eos negative", bpe(eos_token_id=-1), r"eos_token_id is outside"),
    ("bos a string", bpe(bos_token_id="<s>"), r"bos_token_id has the wrong type.*, got text"),
    ("eot outside", bpe(eot_token_id=2**32 - 1), r"eot_token_id is outside"),
    ("add_eos a number", bpe(add_eos_token=1), r"add_eos_token has the wrong type: expected true or false"),
    ("no merges", bpe(merges=None), r"merges: key is missing"),
    ("merge part", bpe(merges=["a b", "zz a"]), r"merges\[1\]: part 'zz' of merge 'zz a' is not a text"),
    ("merge result", bpe(merges=["a b", "b a"]), r"merges\[1\]: result 'ba' of merge 'b a' is not a text"),
    ("merge of one", bpe(merges=["ab"]), r"merges\[0\]: merge is not a pair"),
    ("merge of three", bpe(merges=["a b c"]), r"merges\[0\]: merge is not a pair"),
    ("merge into a control token", bpe(merges=["<s >"]), r"merges\[0\]: part '<s'"),
    ("pre not a string", bpe(pre=3), r"pre has the wrong type: expected text"),
    ("twice", bpe(tokens=["a", "b", "a"], token_type=[1] * 3), r"has a token twice.* got 'a' as 0 and 2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("metadata", "sentence"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_a_broken_file_is_one_sentence(metadata: dict[str, object], sentence: str) -> None:
    """Each contradiction in the metadata is refused with one sentence that names the place."""
    with pytest.raises(ModelFileError, match=sentence) as caught:
        load_tokenizer(metadata)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", ["<0x-1>", "<0x1>", "<0x0a>", "<0xGG>", "<0x100>", "x"])
def test_a_byte_token_that_names_no_byte_is_refused(token: str) -> None:
    """Byte tokens must read <0x00> to <0xFF>."""
    tokens = [*spm()["tokenizer.ggml.tokens"]]  # type: ignore[misc]
    tokens[11] = token
    with pytest.raises(ModelFileError, match=r"tokens has a malformed byte token 11"):
        load_tokenizer(spm(tokens=tokens))


@FAMILIES
def test_the_vocabulary_must_match_the_embedding(family: object) -> None:
    """A vocabulary of another size than token_embd.weight is refused; the right size is accepted."""
    make = spm if family is spm else bpe
    size = load_tokenizer(make()).vocab_size
    assert load_tokenizer(make(), vocab_size=size).vocab_size == size
    with pytest.raises(ModelFileError, match=f"expected {size + 1} tokens, got {size}"):
        load_tokenizer(make(), vocab_size=size + 1)


def test_empty_tokens_are_allowed_and_never_matched() -> None:
    """Padding tokens with an empty spelling may repeat, and stand for nothing."""
    base = bpe()
    tokens = [*base["tokenizer.ggml.tokens"], "", ""]  # type: ignore[misc]
    types = [*base["tokenizer.ggml.token_type"], 4, 1]  # type: ignore[misc]
    tokenizer = load_tokenizer(bpe(tokens=tokens, token_type=types))
    assert tokenizer.encode(" ab🐟") == BPE.encode(" ab🐟")
    assert tokenizer.decode([len(tokens) - 1, len(tokens) - 2]) == b""
    assert "" not in tokenizer.vocabulary.ids


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3),
    st.lists(st.integers(-1, 7) | st.floats() | st.text(st.characters(), max_size=2), max_size=4),
)  # fmt: skip


@FAMILIES
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_value_of_any_key_is_a_tokenizer_or_a_sentence(family: object, data: st.DataObject) -> None:
    """Whatever stands in the metadata, loading gives a tokenizer or one of prill's own errors."""
    metadata = spm() if family is spm else bpe()
    keys = st.sampled_from([*metadata, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.eom_token_id"])
    metadata.update(data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=2)))
    try:
        outcome: object = load_tokenizer(metadata)
    except PrillError as error:
        outcome = error
    assert isinstance(outcome, Tokenizer | ModelFileError | UnsupportedModel)
    assert isinstance(outcome, Tokenizer) or "\n" not in str(outcome)
