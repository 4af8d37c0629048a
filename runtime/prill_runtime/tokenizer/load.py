"""Build the tokenizer that a file's metadata describe."""

from __future__ import annotations

from collections.abc import Mapping

from prill_runtime.errors import UnsupportedModel
from prill_runtime.gguf.vocabulary import PREFIX, check_tokenizer
from prill_runtime.tokenizer.base import TextStream, Tokenizer
from prill_runtime.tokenizer.bpe import ByteLevelTokenizer
from prill_runtime.tokenizer.spm import SentencePieceTokenizer
from prill_runtime.tokenizer.vocabulary import required

__all__ = ["ByteLevelTokenizer", "SentencePieceTokenizer", "TextStream", "Tokenizer", "load_tokenizer"]


def load_tokenizer(metadata: Mapping[str, object], vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Args:
        metadata: a GGUF file's keys and values; arrays as lists, numeric ones as NumPy arrays if you like.
        vocab_size: rows of `token_embd.weight`; the vocabulary must have as many tokens.

    Raises:
        ModelFileError: the keys are missing, or break a rule of `check_tokenizer`.
        UnsupportedModel: a tokenizer model or pre-tokenizer that prill does not know.
    """
    check_tokenizer(metadata)
    model = required(metadata, "model")
    if model not in Tokenizer.families:
        raise UnsupportedModel(
            f"tokenizer model {model!r:.80} is not known",
            where=PREFIX + "model",
            expected=f"one of {', '.join(sorted(Tokenizer.families))}",
        )
    return Tokenizer.families[model](metadata, vocab_size)
