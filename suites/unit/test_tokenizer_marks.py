"""Marks of Phi 3 take the white space behind them along, as the model's own tokenizer does; no other's do."""

from __future__ import annotations

from types import SimpleNamespace

import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers

from prill_runtime.models.assumptions import assumptions
from prill_runtime.tokenizer.load import load_tokenizer

MARKS = ("<|user|>", "<|end|>", "<|assistant|>")
TIGHT = ("<unk>", "<s>", "<|endoftext|>")
WHITE = " \t\n\v\f\r\x85\xa0\u2003\u2028\u3000"
LETTERS = ["\u2581", "a", "b", "\x1c", "\u200b", *WHITE[1:]]
TOKENS = [*TIGHT, "</s>", *MARKS, *LETTERS]
FILE = {
    "general.architecture": "phi3",
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [2, 3, 3, 4, *[3] * len(MARKS), *[1] * len(LETTERS)],
    "tokenizer.ggml.scores": [0.0] * len(TOKENS),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_space_prefix": False,
}
PHI3 = load_tokenizer(FILE)
TEXT = st.lists(
    st.sampled_from([*TIGHT, "</s>", *MARKS, *WHITE, *WHITE[:3], "a", "b", "\x1c", "\u200b"]), max_size=14
)


def theirs() -> tokenizers.Tokenizer:
    """The same vocabulary in the library that the model was published for, its marks with `rstrip`."""
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, []))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.add_special_tokens([
        AddedToken(token, rstrip=token not in TIGHT, normalized=False) for token in (*TIGHT, "</s>", *MARKS)
    ])  # fmt: skip
    return made


PUBLISHED = theirs()


@settings(deadline=None, max_examples=300)
@given(parts=TEXT)
@example(parts=["<|user|>", "\n", "a", " ", "b", "<|end|>", "\n", "<|assistant|>", "\n"])
@example(parts=["<s>", " ", "<|user|>", "\x1c", " ", "<|endoftext|>", " ", "</s>", "\u3000", "\u200b"])
def test_ids_are_those_of_the_published_tokenizer(parts: list[str]) -> None:
    """Runs of any white space behind a mark, between two and at the end: as `rstrip` has it."""
    text = "".join(parts)
    assert PHI3.encode(text) == PUBLISHED.encode(text, add_special_tokens=False).ids


def test_a_prompt_of_its_template_has_no_line_feeds() -> None:
    """The line feed behind each mark, which every template writes, is none of the ids; one in a text is."""
    ids = PHI3.encode("<|user|>\na\nb<|end|>\n<|assistant|>\n")
    assert [PHI3.name(i) for i in ids] == ["<|user|>", "a", "\n", "b", "<|end|>", "<|assistant|>"]


def test_no_other_file_drops_them() -> None:
    """Another architecture keeps every space, and has another digest; so does text that is only text."""
    spaced, names = "<|user|> a", ["<|user|>", "\u2581", "a"]
    other = load_tokenizer(FILE | {"general.architecture": "llama"})
    assert [other.name(i) for i in other.encode(spaced)] == names
    assert other.digest != PHI3.digest
    plain = PHI3.encode("a a", parse_special=False)
    assert [PHI3.name(i) for i in plain] == ["a", "\u2581", "a"]


def test_it_is_said_that_a_file_does_not_say_so() -> None:
    """What prill takes from the architecture alone stands among what it assumes, and of no other file."""
    for arch in ("phi3", "llama"):
        file = SimpleNamespace(architecture=arch, metadata={**FILE, "general.architecture": arch})
        said = [each.assumed for each in assumptions(file)]
        assert ("white space behind special tokens goes with them" in said) == (arch == "phi3")
