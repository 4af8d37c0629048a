"""Naive tokenizers straight from a file's vocabulary, as independent twins: text in, ids out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any


def spm_ids(text: str, fields: Mapping[str, Any]) -> list[int]:
    """SentencePiece-style ids without special tokens: merge the best-scored neighbours until none merge.

    Source: the scores in `tokenizer.ggml.scores`; of equal scores the leftmost pair wins; what the
    vocabulary lacks becomes its UTF-8 bytes.
    """
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    types = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    # Normal, user-defined and unused pieces; control, unknown and byte tokens never come out of merging.
    ids = {token: i for i, token in enumerate(tokens) if types[i] in (1, 4, 5)}
    byte_ids = {token: i for i, token in enumerate(tokens) if types[i] == 6}
    prefix = " " if fields.get("tokenizer.ggml.add_space_prefix", True) and text else ""
    pieces = list((prefix + text).replace(" ", "\u2581"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in ids]
        if not pairs:
            break
        at = min(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    found: list[int] = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [byte_ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte value in byte-level BPE vocabularies (256 entries)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters, spare = [], 0x100
    for byte in range(256):
        if byte in plain:
            letters.append(chr(byte))
        else:
            letters.append(chr(spare))
            spare += 1
    return letters


def bpe_word_ids(word: str, fields: Mapping[str, Any]) -> list[int]:
    """Byte-level BPE ids of one pre-token: merge the earliest listed pair until none is listed."""
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(fields["tokenizer.ggml.merges"])}
    letters = byte_letters()
    pieces = [letters[byte] for byte in word.encode()]
    if fields.get("tokenizer.ggml.pre") == "llama-bpe" and "".join(pieces) in ids:
        return [ids["".join(pieces)]]
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not pairs:
            return [ids[piece] for piece in pieces]
        at = min(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def longest_text(data: bytes) -> str:
    """What may be shown of a byte stream so far: everything up to the last whole character."""
    for cut in range(min(4, len(data)) + 1):
        try:
            return data[: len(data) - cut].decode()
        except UnicodeDecodeError:
            continue
    return data.decode(errors="replace")
