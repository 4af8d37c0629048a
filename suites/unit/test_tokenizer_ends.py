"""Which ids end a generation: those that the file names, and texts that are known to."""

from __future__ import annotations

import pytest

from prill_runtime.tokenizer.load import load_tokenizer

from .test_tokenizer import BPE, CONTROL, FAMILIES, SPM, bpe, named, spm


@FAMILIES
def test_ends_of_generation(family: object) -> None:
    """eos, stated eot and eom ids and well-known texts end a generation; look-alikes do not."""
    make = spm if family is spm else bpe
    tokenizer = load_tokenizer(make(eot_token_id=5, eom_token_id=6))
    ends = {tokenizer.vocabulary.tokens[i] for i in tokenizer.eog_ids - {5, 6}}
    assert ends == {"</s>", "<|im_end|>", "<|end|>", "<|return|>"}
    assert {5, 6} <= tokenizer.eog_ids
    reasons = {tokenizer.name(i): why for i, why in tokenizer.vocabulary.ends.items()}
    assert reasons["</s>"] == "eos_token_id"
    assert reasons["<|im_end|>"] == "its text"
    assert [tokenizer.vocabulary.ends[i] for i in (5, 6)] == ["eot_token_id", "eom_token_id"]


@FAMILIES
@pytest.mark.parametrize("kind", [1, 3, 4, 5])
def test_a_known_end_is_one_whatever_its_type(family: object, kind: int) -> None:
    """A text known to end a turn ends it as any type, is cut out of a text whole, and is not shown."""
    make = spm if family is spm else bpe
    types = list(make()["tokenizer.ggml.token_type"])  # type: ignore[call-overload]
    end = named(SPM if family is spm else BPE, "<|im_end|>")
    types[end] = kind
    tokenizer = load_tokenizer(make(token_type=types))
    assert end in tokenizer.eog_ids
    assert tokenizer.encode("a<|im_end|>", add_special=False)[-1] == end
    assert end not in tokenizer.encode("a<|im_end|>", add_special=False, parse_special=False)
    assert tokenizer.piece(end) == b""


@FAMILIES
@pytest.mark.parametrize(
    ("texts", "ending"),
    [
        (("<|end|>", "<|call|>"), {"<|end|>", "<|call|>"}),
        (("<|end|>", "<|call|>", "<|flush|>"), {"<|call|>", "<|flush|>"}),
        (("<|tool_response>", "<turn|>"), {"<|tool_response>", "<turn|>"}),
        (("<fim_pad>", "<reponame>", "<|file_sep|>"), {"<fim_pad>", "<reponame>", "<|file_sep|>"}),
        (("<｜end▁of▁sentence｜>", "[EOS]", "<eos>"), {"<｜end▁of▁sentence｜>", "[EOS]", "<eos>"}),
        (("<|im_start|>", "<|fim_prefix|>", "</S>", "im_end"), set()),
    ],
)
def test_the_ends_of_a_vocabulary(family: object, texts: tuple[str, ...], ending: set[str]) -> None:
    """Which texts end a generation depends on the other texts of the vocabulary, never on their types."""
    make, base = (spm, SPM) if family is spm else (bpe, BPE)
    tokens = [f"w{i}" if text in CONTROL else text for i, text in enumerate(base.vocabulary.tokens)]
    types = [*base.vocabulary.types, *[1] * len(texts)]
    scores = {"scores": [0.0] * len(types)} if family is spm else {}
    tokenizer = load_tokenizer(make(tokens=[*tokens, *texts], token_type=types, eos_token_id=None, **scores))
    assert {tokenizer.name(i) for i in tokenizer.eog_ids - {2}} == ending


def test_a_stated_end_of_fill_in_silences_the_texts() -> None:
    """Where the file names its fill-in pad, another token of such a name ends nothing."""
    tokens = [*SPM.vocabulary.tokens, "<|fim_pad|>", "<PAD>"]
    more = {"tokens": tokens, "token_type": [*SPM.vocabulary.types, 1, 1], "scores": [0.0] * len(tokens)}
    assert {len(tokens) - 2, len(tokens) - 1} <= load_tokenizer(spm(**more)).eog_ids
    stated = load_tokenizer(spm(**more, fim_pad_token_id=len(tokens) - 2))
    assert len(tokens) - 1 not in stated.eog_ids
    assert stated.vocabulary.ends[len(tokens) - 2] == "fim_pad_token_id"


def test_end_closes_a_message_where_return_and_call_exist() -> None:
    """In a vocabulary with <|return|> and <|call|>, <|end|> does not end the generation."""
    base = bpe()
    tokens = [*base["tokenizer.ggml.tokens"], "<|call|>"]  # type: ignore[misc]
    types = [*base["tokenizer.ggml.token_type"], 3]  # type: ignore[misc]
    tokenizer = load_tokenizer(bpe(tokens=tokens, token_type=types))
    assert named(tokenizer, "<|end|>") not in tokenizer.eog_ids
    assert {named(tokenizer, "<|call|>"), named(tokenizer, "<|return|>")} <= tokenizer.eog_ids
