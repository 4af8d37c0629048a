"""Byte-level BPE: the ids that the file's pre-tokenizer and merges give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers.models import BPE

from prill_runtime.errors import ModelFileError, UnsupportedModel
from prill_runtime.gguf.vocabulary import PREFIX, TokenType
from prill_runtime.tokenizer.base import Tokenizer
from prill_runtime.tokenizer.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from prill_runtime.tokenizer.vocabulary import Defaults, Vocabulary, read_vocabulary, required


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's spelling of the 256 bytes: printable Latin-1 as itself, the others from U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()
GAP_CHARACTER = " "  # byte-level text has no space: it is spelled U+0120
_TO_BYTE = {ord(character): byte for byte, character in BYTE_ALPHABET.items()}


class ByteLevelTokenizer(Tokenizer, model="gpt2"):
    """`tokenizer.ggml.model` "gpt2": byte-level BPE with `tokenizer.ggml.merges` in order of rank.

    `tokenizer.ggml.pre` names the pre-tokenizer; where it is missing, "default" holds, as in llama.cpp. A
    merge listed twice counts where it comes first. BPE gives NORMAL tokens, and USER_DEFINED ones that are
    plain ASCII. A byte without a token of its own is left out of a text, and nothing merges over the gap (as
    in llama.cpp); a whole word may still stand for it. `add_space_prefix` has no meaning here, nor has the
    unk id (both as in llama.cpp).

    Raises:
        UnsupportedModel: the pre-tokenizer is not known.
        ModelFileError: what `read_vocabulary` raises; a merge is not two tokens that make a third.
    """

    def __init__(self, metadata: Mapping[str, Any], vocab_size: int | None = None) -> None:
        self._pre = _pre_tokenizer(metadata)
        vocabulary = read_vocabulary(metadata, vocab_size, Defaults(add_bos=self._pre.add_bos))
        self._adopt(vocabulary)
        words = _words(vocabulary)
        self._merges = _merges(required(metadata, "merges"), words)
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in self._merges)]
        self._unspelled = sum(letter not in words for letter in BYTE_ALPHABET.values())
        # The library drops what it has no token for and then merges across the gap; a token past the
        # vocabulary holds the place instead. No merge can name it: a space separates the tokens of a merge.
        self._bpe = tokenizers.Tokenizer(
            BPE(
                vocab={**words, GAP_CHARACTER: self.vocab_size},
                merges=pairs,
                unk_token=GAP_CHARACTER,
                ignore_merges=self._pre.ignore_merges,
            )
        )
        self._bpe.pre_tokenizer = self._pre.build()

    def unspelled_bytes(self) -> int:
        return self._unspelled

    def _encode_text(self, text: str) -> list[int | None]:
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return [token_id if token_id < self.vocab_size else None for token_id in ids]

    def _text(self, token: str) -> bytes:
        try:
            return token.translate(_TO_BYTE).encode("latin-1") if _spelled_in_bytes(token) else token.encode()
        except UnicodeEncodeError:
            return token.encode()

    def _decisive(self) -> list[object]:
        return [self._pre.patterns, self._pre.ignore_merges, [merge.split(" ") for merge in self._merges]]


def _spelled_in_bytes(token: str) -> bool:
    return all(ord(character) in _TO_BYTE for character in token)


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = metadata.get(PREFIX + "pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"pre-tokenizer {name!r:.80} is not known",
            where=PREFIX + "pre",
            expected=f"one of {', '.join(sorted(PRE_TOKENIZERS))}",
        )
    return PRE_TOKENIZERS[name]


def _words(vocabulary: Vocabulary) -> dict[str, int]:
    """The tokens that BPE may produce: a raw spelling outside ASCII would be read as other bytes."""
    words = {vocabulary.tokens[i]: i for i in vocabulary.of_type(TokenType.NORMAL) if vocabulary.tokens[i]}
    own = {vocabulary.tokens[i]: i for i in vocabulary.of_type(TokenType.USER_DEFINED)}
    return words | {token: i for token, i in own.items() if token and token.isascii()}


def _merges(merges: Sequence[str], words: Mapping[str, int]) -> list[str]:
    """The merges in order of rank, checked and without repetitions."""
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left in words and right in words and left + right in words:
            continue
        where = f"{PREFIX}merges[{index}]"
        if not left or not right or " " in right:
            raise ModelFileError(
                "merge is not a pair",
                where=where,
                expected="two tokens with one space between",
                got=repr(merge),
            )
        missing = next(token for token in (left, right, left + right) if token not in words)
        role = "result" if missing == left + right else "part"
        raise ModelFileError(
            f"{role} {missing!r} of merge {merge!r} is not a text token of the vocabulary", where=where
        )
    return list(dict.fromkeys(merges))
