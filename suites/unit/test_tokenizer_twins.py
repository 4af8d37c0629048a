"""The suite's own tokenizer, which shares nothing with the runtime's, tells of a sound one what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prill_runtime.tokenizer.load import load_tokenizer
from prill_runtime.tokenizer.pretokenizers import PRE_TOKENIZERS
from prill_suites.tokenizer import own_texts
from prill_suites.tokenizer_texts import HARD_TEXTS
from prill_suites.tokenizer_twins import Ambiguous, Twin
from prill_suites.tokenizer_words import Words

from .vocabularies import CONTROL, NORMAL, UNUSED, USER_DEFINED, bpe, spm

FRAGMENTS = (
    "ab", "AB", "é", "1", "23", "456", "日本", "カ", "!", "?", "'s", "'LL", "/", "\ufe0f", "🧪", "\u0301",
    "한", "ß", "Ǆ", "ª", "\u2028", "$", "<", ".", "…", "\x1c", "\x85", "\u200b", "Ⅷ", "²", "ำ", " ", "  ",
    "\r", "\n", "\t", "<sentinel:1>", "IMGIMGAZ",
)  # fmt: skip
SPACES = ("", " ", "  ", "   ", "  a", "a  ", "  a  ", " é", "é é", "▁", " ▁", "a \u2581 b")


def metadata(tokens: dict[str, int], scores: list[float] | None = None, **rest: Any) -> dict[str, Any]:
    """A vocabulary of family "llama" with these tokens and their types."""
    given = scores or [-float(n) for n in range(len(tokens))]
    keys = {"model": "llama", "tokens": [*tokens], "token_type": [*tokens.values()], "scores": given, **rest}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def came_back(fields: dict[str, Any], text: str) -> tuple[bytes | None, bytes]:
    """What the twin says comes back of a text, and what the runtime gives back."""
    tokenizer, twin = load_tokenizer(fields), Twin(fields)
    silent = twin.control.issuperset([*twin.begin, *twin.end])
    return twin.spelled(text), tokenizer.decode(tokenizer.encode(text, add_special=silent))


@pytest.mark.parametrize(
    ("fields", "text", "expected"),
    [
        # A user-defined token that merges in the middle of a text takes the space behind it along.
        (metadata({"▁é": USER_DEFINED, "▁": UNUSED, "é": NORMAL}), "é é é", "▁é▁é▁é"),
        (metadata({"▁▁": USER_DEFINED, "▁": NORMAL, "a": NORMAL}), "   a", "▁▁▁▁a"),
        (metadata({"▁▁": USER_DEFINED, "▁": NORMAL, "a": NORMAL}), "a  ", "a▁▁"),
        # The unknown token is one that shows nothing, and begins a stretch of text.
        (metadata({"e": NORMAL, "▁é": NORMAL, "<s>": CONTROL}, unknown_token_id=2), "eß é", "eé"),
    ],
)
def test_a_prefix_is_taken_off_behind_whatever_begins_a_stretch(
    fields: dict[str, Any], text: str, expected: str
) -> None:
    """Decoding takes a space off behind control and user-defined tokens, wherever those came from."""
    assert came_back(fields, text) == (expected.encode(), expected.encode())


def test_a_text_whose_unused_tokens_come_apart_in_two_ways_is_nobodys_fault() -> None:
    """Where the published tokenizers need not agree, the twin tells nothing, and stops no check."""
    fields = metadata({"the": NORMAL, "aaa": UNUSED, "aa": NORMAL}, scores=[0.0, -1.0, -2.0])
    with pytest.raises(Ambiguous):
        Twin(fields).ids("aaaa")
    assert came_back(fields, "aaaa")[0] is None


@pytest.mark.parametrize("family", [spm, bpe])
def test_the_twin_tells_what_comes_back(family: Callable[[], st.SearchStrategy[dict[str, Any]]]) -> None:
    """Of any sound vocabulary: what the twin can tell of a text is what the runtime gives back."""
    told = 0

    @settings(
        deadline=None, max_examples=40, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(family())
    def one(fields: dict[str, Any]) -> None:
        nonlocal told
        for text in [*HARD_TEXTS, *SPACES, *own_texts(Twin(fields))[:16]]:
            expected, got = came_back(fields, text)
            assert expected in (None, got), text
            told += expected is not None

    one()
    assert told > 400


def test_a_text_of_special_tokens_is_cut_however_many_there_are() -> None:
    """The longest spelling first over the whole text, thousands of times."""
    fields = metadata({"<a>": USER_DEFINED, "<a><a>": USER_DEFINED, "x": NORMAL})
    assert Twin(fields).parts("<a>" * 4001 + "x") == [1] * 2000 + [0, "x"]


@pytest.mark.parametrize("name", sorted({pre: name for name, pre in PRE_TOKENIZERS.items()}.values()))
def test_two_implementations_cut_any_text_alike(name: str) -> None:
    """The `tokenizers` library and Python's re, by expressions written down twice, on drawn texts."""
    runtime, own, cuts = PRE_TOKENIZERS[name].build(), Words(name), 0
    own.cut("".join(FRAGMENTS))

    @settings(deadline=None, max_examples=30, database=None, derandomize=True)
    @given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
    def alike(text: str) -> None:
        nonlocal cuts
        words = own.cut(text)
        assert words == [text[a:b] for _, (a, b) in runtime.pre_tokenize_str(text)]
        assert "".join(words) == text
        cuts += len(words)

    alike()
    assert cuts > 60
