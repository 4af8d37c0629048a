"""Byte-level BPE against a plain reference written here, against tiktoken, and word by word."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from functools import cache
from itertools import groupby, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prill_runtime.errors import UnsupportedModel
from prill_runtime.tokenizer.load import load_tokenizer
from prill_runtime.tokenizer.pretokenizers import PRE_TOKENIZERS

# The published expressions, spelled out again: GPT-2's encoder.py, the tokenizer.json of Llama 3 and Qwen2,
# and tiktoken's o200k_base.
SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PUBLISHED = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES,
    "qwen2": ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES,
    "gpt-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENGLISH}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENGLISH}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES,
}
CORPUS = (
    "The river runs past the old mill, and the miller's daughter counts the boats. They've counted 1234 "
    "boats; it's 56789 in all. The RIVER'S water isn't deep: río, über, 川の水 川の水 🐟🐟 🐟.\n\n"
    "  def f(x):\n\treturn x // 2\n"
) * 3
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@cache
def runs() -> tuple[tuple[str, int, int], ...]:
    """All of Unicode as runs of one category: its name, the first and the last character."""
    found = groupby(range(sys.maxunicode + 1), lambda code: unicodedata.category(chr(code)))
    return tuple((category, codes[0], codes[-1]) for category, run in found for codes in [list(run)])


def letters(category: str) -> str:
    """The characters of a Unicode category, as ranges for a character class of `re`."""
    ranges: list[list[int]] = []
    for name, low, high in runs():
        if name.startswith(category):
            if ranges and ranges[-1][1] == low - 1:
                ranges[-1][1] = high
            else:
                ranges.append([low, high])
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)


def plain(pattern: str) -> re.Pattern[str]:
    """The expression for Python's own `re`: categories, \\s and \\S written out."""
    for category in sorted(set(re.findall(r"\\p\{(\w+)\}", pattern))):
        inside = letters(category)
        pattern = re.sub(rf"(?<!\[)\\p\{{{category}\}}(?=[{{+|])", lambda _: f"[{inside}]", pattern)  # noqa: B023
        pattern = pattern.replace(f"\\p{{{category}}}", inside)
    pattern = re.sub(r"(?<=\[\^)\\s", lambda _: WHITE_SPACE, pattern)
    return re.compile(pattern.replace(r"\s", f"[{WHITE_SPACE}]").replace(r"\S", f"[^{WHITE_SPACE}]"))


SPLITS = {name: plain(pattern) for name, pattern in PUBLISHED.items()}


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's byte alphabet, as its encoder.py builds it."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table, extra = {byte: chr(byte) for byte in kept}, 0
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + extra)
            extra += 1
    return table


ALPHABET = bytes_to_unicode()


def spell(data: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in data)


def trained(pattern: re.Pattern[str], count: int) -> list[tuple[bytes, bytes]]:
    """Merges by frequency over the corpus, the plain way."""
    words = Counter(match[0].encode() for match in pattern.finditer(CORPUS))
    parts = {word: [bytes([byte]) for byte in word] for word in words}
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, times in words.items():
            for pair in pairwise(parts[word]):
                pairs[pair] += times
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        parts = {word: reference_merge(split, best) for word, split in parts.items()}
    return merges


def reference_merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Every occurrence of a pair merged, from the left."""
    out, at = [], 0
    while at < len(parts):
        if tuple(parts[at : at + 2]) == pair:
            out.append(pair[0] + pair[1])
            at += 2
        else:
            out.append(parts[at])
            at += 1
    return out


def reference_encode(text: str, name: str) -> list[bytes]:
    """BPE as the paper tells it: in each word the earliest merge goes first, until none applies."""
    ranks = {pair: rank for rank, pair in enumerate(MERGES[name])}
    result = []
    for match in SPLITS[name].finditer(text):
        parts = [bytes([byte]) for byte in match[0].encode()]
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda p: ranks.get(p, len(ranks)))
            if pair not in ranks:
                break
            parts = reference_merge(parts, pair)
        result.extend(parts)
    return result


def metadata(merges: list[tuple[bytes, bytes]], pre: str, **overrides: object) -> dict[str, object]:
    """What a GGUF converter writes: 256 bytes, the merged tokens in order, one control token."""
    tokens = list(dict.fromkeys([*(bytes([b]) for b in range(256)), *(a + b for a, b in merges)]))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*map(spell, tokens), "<|endoftext|>"],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3],
        "tokenizer.ggml.merges": [f"{spell(a)} {spell(b)}" for a, b in merges],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens),
        **{f"tokenizer.ggml.{key}": value for key, value in overrides.items()},
    }


MERGES = {name: trained(split, 150) for name, split in SPLITS.items()}
TOKENIZERS = {name: load_tokenizer(metadata(merges, name)) for name, merges in MERGES.items()}

# Blocks whose categories no version of Unicode changes.
STABLE = st.sampled_from(
    "abcXYZ'ſ019²½٣ \t\n\r\v\x85\xa0\u2003\u3000.,!?/-_<>|(){}€+=~`éßñŁΩжЯǅʰאبक्षि漢字かなカナ한글🐟👩\u200d👧"
    "\u0301\x00\x1c\u2581"
)
WORDS = st.sampled_from(
    ["The", " river", "'s", "'LL", " don't", "  ", "\n\n", "1234", " 56", "🐟", "<|endoftext|>", "//"]
)
ANY_TEXT = st.lists(WORDS | st.text(STABLE, max_size=6), max_size=12).map("".join)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT)
@example(text=CORPUS)
@example(text="it'S  1234567 río\n\n  x\t\ty \r\n")
def test_pieces_equal_the_plain_reference(name: str, text: str) -> None:
    """Words cut by the published expression and merged the plain way give the same pieces."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert [tokenizer.piece(i) for i in ids] == reference_encode(text, name)


def test_the_trained_merges_matter() -> None:
    """The reference vocabulary merges, so that a lost or misordered merge shows."""
    for name in PUBLISHED:
        assert len(reference_encode(CORPUS, name)) < 0.6 * len(CORPUS.encode())


@pytest.mark.hf
@pytest.mark.parametrize("name", PUBLISHED)
@settings(deadline=None, max_examples=100)
@given(text=ANY_TEXT)
@example(text=CORPUS)
def test_ids_equal_tiktoken(name: str, text: str) -> None:
    """tiktoken, given the same ranks and expression, gives the same ids."""
    tiktoken = pytest.importorskip("tiktoken")
    tokens = list(dict.fromkeys([*(bytes([b]) for b in range(256)), *(a + b for a, b in MERGES[name])]))
    encoding = tiktoken.Encoding(
        "test",
        pat_str=PUBLISHED[name],
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": len(tokens)},
    )
    tokenizer = TOKENIZERS[name]
    assert tokenizer.encode(text, add_special=False) == encoding.encode(text, allowed_special="all")
    assert tokenizer.encode(text, add_special=False, parse_special=False) == encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("default", "a 123456!", ["a", " ", "123", "456", "!"]),
        ("gpt-2", "a 123456! it'S", ["a", " 123456", "!", " it", "'", "S"]),
        ("llama-bpe", "a 12345 it'S", ["a", " ", "123", "45", " it", "'S"]),
        ("dbrx", "a 12345 it'S", ["a", " ", "123", "45", " it", "'S"]),
        ("glm4", "a 12345 it'S", ["a", " ", "123", "45", " it", "'S"]),
        ("qwen2", "a 12 ne\u0301e", ["a", " ", "1", "2", " ne", "\u0301e"]),
        ("qwen35", "a 12 ne\u0301e", ["a", " ", "1", "2", " ne\u0301e"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", " ", "123", "4"]),
        ("tekken", "HelloWorld's 12", ["Hello", "World", "'s", " ", "1", "2"]),
        ("deepseek-v3", "a 1234日本!bc", ["a", " ", "123", "4", "日本", "!bc"]),
        ("deepseek-coder", "a 12\nb!", ["a", " ", "1", "2", "\n", "b", "!"]),
        ("falcon", "a 1234`b!?", ["a", " ", "123", "4", "`", "b", "!?"]),
        ("starcoder", "a 12!", ["a", " ", "1", "2", "!"]),
        ("seed-coder", "a 12!\n", ["a", " ", "1", "2", "!", "\n"]),
        ("bloom", "a 12, b", ["a", " 12", ",", " b"]),
        ("chameleon", "a  12 it's", ["a", "  ", "1", "2", " it", "'", "s"]),
        ("viking", "a 12, b", ["a", " ", "1", "2", ",", " b"]),
    ],
)
def test_each_pre_tokenizer_cuts_where_its_model_does(name: str, text: str, words: list[str]) -> None:
    """Every distinct pre-tokenizer cuts a text that tells it from its neighbours, as derived by hand."""
    pieces = PRE_TOKENIZERS[name].build().pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == words


def test_every_distinct_pre_tokenizer_has_an_example() -> None:
    """No pre-tokenizer is in the table without a hand-derived example above."""
    marks = test_each_pre_tokenizer_cuts_where_its_model_does.pytestmark  # type: ignore[attr-defined]
    shown = {PRE_TOKENIZERS[name] for name, _, _ in marks[0].args[1]}
    assert shown == set(PRE_TOKENIZERS.values())


def test_an_unknown_pre_tokenizer_is_named() -> None:
    """The error names the unknown pre-tokenizer and lists the known ones."""
    with pytest.raises(UnsupportedModel, match=r"'klingon'.*llama-bpe.*qwen2") as caught:
        load_tokenizer(metadata(MERGES["gpt-2"], "klingon"))
    assert "\n" not in str(caught.value)


def test_a_missing_pre_tokenizer_means_default() -> None:
    """Without `pre` the cut is llama.cpp's default: digits in threes, punctuation apart."""
    bare = {
        k: v for k, v in metadata([(b"1", b"2"), (b"12", b"3"), (b"123", b"4")], "").items() if "pre" not in k
    }
    tokenizer = load_tokenizer(bare)
    assert [tokenizer.piece(i) for i in tokenizer.encode("1234")] == [b"123", b"4"]


def test_the_order_of_merges_decides() -> None:
    """The earlier merge wins: the same pairs in another order give other pieces."""
    forwards = load_tokenizer(metadata([(b"a", b"b"), (b"b", b"c")], "gpt-2"))
    backwards = load_tokenizer(metadata([(b"b", b"c"), (b"a", b"b")], "gpt-2"))
    assert [forwards.piece(i) for i in forwards.encode("abc")] == [b"ab", b"c"]
    assert [backwards.piece(i) for i in backwards.encode("abc")] == [b"a", b"bc"]


def test_a_merge_listed_twice_counts_where_it_comes_first() -> None:
    """A repeated merge keeps its first rank."""
    tokenizer = load_tokenizer(metadata([(b"a", b"b"), (b"b", b"c"), (b"a", b"b")], "gpt-2"))
    assert [tokenizer.piece(i) for i in tokenizer.encode("abc")] == [b"ab", b"c"]


@pytest.mark.parametrize(
    ("pre", "pieces"), [("llama-bpe", [b"abc"]), ("glm4", [b"abc"]), ("dbrx", [b"a", b"bc"])]
)
def test_llama_bpe_takes_a_word_that_is_a_token_whole(pre: str, pieces: list[bytes]) -> None:
    """Llama 3 ignores merges for whole words; the same expression without that flag does not."""
    base = metadata([(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")], pre, add_bos_token=False)
    tokenizer = load_tokenizer(base)
    assert [tokenizer.piece(i) for i in tokenizer.encode("abc")] == pieces


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2"])
def test_text_that_spells_a_control_token_stays_text(pre: str) -> None:
    """No merge and no whole-word rule turns plain text into a control token."""
    base = metadata([(b"a", b"b")], pre, add_bos_token=False)
    tokens = [*base["tokenizer.ggml.tokens"], "word"]  # type: ignore[misc]
    types = [*base["tokenizer.ggml.token_type"], 3]  # type: ignore[misc]
    tokenizer = load_tokenizer({**base, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    assert tokenizer.encode("word") == [len(tokens) - 1]
    assert [tokenizer.piece(i) for i in tokenizer.encode("word", parse_special=False)] == [
        b"w",
        b"o",
        b"r",
        b"d",
    ]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(PRE_TOKENIZERS)), st.text(st.characters(exclude_categories=["Cs"])) | ANY_TEXT)
def test_decode_inverts_encode(pre: str, text: str) -> None:
    """Whatever the pre-tokenizer, encoding and decoding gives back the bytes of any text."""
    if pre not in ROUND_TRIP:
        ROUND_TRIP[pre] = load_tokenizer(metadata(MERGES["gpt-2"], pre))
    tokenizer = ROUND_TRIP[pre]
    assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == text.encode()


ROUND_TRIP = dict(TOKENIZERS)


def without_byte(byte: int) -> dict[str, object]:
    """A vocabulary that lacks one byte, but has the word it starts."""
    base = metadata([(b"a", b"b")], "llama-bpe", add_bos_token=False)
    tokens = [token for token in base["tokenizer.ggml.tokens"] if token != spell(bytes([byte]))]  # type: ignore[attr-defined]
    tokens.append(spell(bytes([byte]) + b"b"))
    return {**base, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)}


def test_a_byte_without_token_is_left_out_and_counted() -> None:
    """A byte that no token spells is left out, nothing merges over the gap, and `lost` counts it."""
    tokenizer = load_tokenizer(without_byte(ord("q")))
    pieces = [tokenizer.piece(i) for i in tokenizer.encode("ab aqb qq")]
    assert pieces == [b"ab", b" ", b"a", b"b", b" "]
    assert tokenizer.lost("ab aqb qq") == 3
    assert [tokenizer.piece(i) for i in tokenizer.encode("qb")] == [b"qb"]
    assert tokenizer.decode(tokenizer.encode("ab r")) == b"ab r"
    assert (tokenizer.lost("ab r qb"), tokenizer.lost("qb")) == (1, 0)


def test_a_token_that_is_one_space_is_no_gap() -> None:
    """A user-defined space is its own token, and bytes without one are still left out."""
    base = without_byte(ord("q"))
    tokens = [*base["tokenizer.ggml.tokens"], " "]  # type: ignore[misc]
    types = [*base["tokenizer.ggml.token_type"], 4]  # type: ignore[misc]
    tokenizer = load_tokenizer({**base, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    assert tokenizer.encode("q aq")[0] == len(tokens) - 1
    assert tokenizer.decode(tokenizer.encode("q aq")) == b" a"


def test_a_user_defined_token_is_raw_text() -> None:
    """A user-defined spelling is text, not bytes: it is matched and decoded as it stands, and only whole."""
    base = metadata([(b"a", b"b")], "gpt-2")
    tokens = [*base["tokenizer.ggml.tokens"], "Ġñ  x"]  # type: ignore[misc]
    types = [*base["tokenizer.ggml.token_type"], 4]  # type: ignore[misc]
    tokenizer = load_tokenizer({**base, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    ids = tokenizer.encode("abĠñ  xab", parse_special=False)
    assert [tokenizer.piece(i) for i in ids] == [b"ab", "Ġñ  x".encode(), b"ab"]


def test_text_never_becomes_a_user_defined_token_by_its_bytes() -> None:
    """A user-defined token spelled like the bytes of a word is not that word."""
    base = metadata([(b"a", b"b")], "llama-bpe", add_bos_token=False)
    tokens = [*base["tokenizer.ggml.tokens"], "Ġx"]  # type: ignore[misc]
    types = [*base["tokenizer.ggml.token_type"], 4]  # type: ignore[misc]
    tokenizer = load_tokenizer({**base, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    assert [tokenizer.piece(i) for i in tokenizer.encode(" x")] == [b" ", b"x"]
