"""Small random vocabularies with features that few trained ones have, each with texts.

Special tokens that overlap one another and the pieces of text, scores that tie, pieces of several spaces. A
trained vocabulary has a score for each piece, and its special tokens have brackets that no text has.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from prill_suites.tokenizer_twins import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, byte_letters

SEED, VOCABULARIES, TEXTS = 23, 24, 40
SPACE = "\u2581"
LETTERS = "ab" + SPACE
ARCHITECTURES = ("llama", "llama", "phi3", "phi3", "llama")  # of which one drops white space behind its marks
# Of one length and of several, each the beginning, the end or the middle of others.
SPECIAL = (
    "<a>",
    "<a><b>",
    "a><b",
    "<b>",
    "b><a",
    "><",
    "ab<",
    "<<a",
    "a>>",
    "[ab]",
    "[ab][ab]",
    "ab  ",
    "  ",
)
PARTS = ("a", "b", "ab", "ba", " ", "  ", "   ", "    ", "aab", "b a", " a", "b ", "é")
TIED = (-1.0, -2.0, -2.0, -3.0)  # scores, of which a vocabulary has many of each


def vocabularies() -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Metadata by its keys in a file, of both families in turn, and texts made of its tokens and of parts."""
    for number in range(VOCABULARIES):
        rng = random.Random(f"{SEED}/{number}")
        special = rng.sample(SPECIAL, rng.randint(3, 7))
        described = _byte_level(rng, special) if number % 2 else _by_score(rng, special)
        words = [*PARTS, *special, *special]
        texts = ["".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(TEXTS)]
        fields = {f"tokenizer.ggml.{key}": value for key, value in described.items()}
        yield {**fields, "general.architecture": ARCHITECTURES[number % len(ARCHITECTURES)]}, texts


def _by_score(rng: random.Random, special: list[str]) -> dict[str, Any]:
    """Family "llama": pieces of up to five characters, every one of which merging can come to."""
    pieces = list(LETTERS)
    for _ in range(rng.randint(12, 40)):
        piece = rng.choice(pieces) + rng.choice(pieces)
        if len(piece) <= 5 and piece not in pieces:
            pieces.append(piece)
    pieces += [run for run in (SPACE * 2, SPACE * 3, SPACE * 4) if run not in pieces]
    tokens = dict.fromkeys(pieces, NORMAL)
    tokens |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    tokens |= {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    tokens |= {text: rng.choice((CONTROL, USER_DEFINED)) for text in special}
    names = [*tokens]
    rng.shuffle(names)
    return {
        "model": "llama",
        "tokens": names,
        "token_type": [tokens[name] for name in names],
        "scores": [rng.choice(TIED) for _ in names],
        "unknown_token_id": names.index("<unk>"),
        "bos_token_id": names.index("<s>"),
        "eos_token_id": names.index("</s>"),
        "add_space_prefix": rng.random() < 0.5,
    }


def _byte_level(rng: random.Random, special: list[str]) -> dict[str, Any]:
    """Family "gpt2": every byte, and merges of what there is, spaces among it."""
    letters = byte_letters()
    tokens, merges = dict.fromkeys(letters, NORMAL), list[str]()
    near = [letters[byte] for byte in b"ab "]
    for _ in range(rng.randint(8, 30)):
        left, right = rng.choice(near), rng.choice(near)
        if len(left + right) <= 5 and left + right not in tokens:
            tokens[left + right] = NORMAL
            merges.append(f"{left} {right}")
            near.append(left + right)
    tokens |= {text: rng.choice((CONTROL, USER_DEFINED)) for text in special}
    names = [*tokens]
    rng.shuffle(names)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": names,
        "token_type": [tokens[name] for name in names],
        "merges": merges or ["a b"],
    }
