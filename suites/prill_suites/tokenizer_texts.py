"""Texts that tokenizers have got wrong, and the place where two results part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

HARD_TEXTS = (
    "plain words, then a full stop.",
    "  two leading and two trailing spaces  ",
    "tabs\tand\nline\n\nbreaks\r\n",
    "CamelCase snake_case kebab-case 3.14159 1,000,000 0x1F",
    "don't can't we'll I'm they've",
    "na\u00efve caf\u00e9 \u00fcber \u00c5ngstr\u00f6m",
    "e\u0301 combining and \u00e9 composed",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3068\u4e2d\u6587",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f9ea\U0001f469\u200d\U0001f52c\U0001f1f3\U0001f1f4 emoji",
    "control \x01\x7f characters",
    "zero\u200bwidth \ufeff and \u00a0 spaces",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "{}[]()<>|\\/~`!@#$%^&*-_=+;:'\",.?",
    "\u2764\ufe0f\ufe0f heart\ufe0f 1\ufe0f\u20e3",
    "lone\rcarriage\r\rreturns \r and\r",
    "spaces , that . nobody ! cleans ? up 's n't 'm do not : ;",
    "UPPER's 'LL 12345 v1.2.3 \u216b\u00b2 \u01c5",
    "nul\x00 \x1c\x85\u2028 separators",
    "\ufeffno mark of any byte order",
)
# Where a special token may stand: spaces beside it are the text's own.
AROUND = (
    "before{}after",
    "before {} after",
    " {} ",
    "{}\n{}",
    "{} {}",
    "{}{}",
    "  {}  x{}",
    "\ufe0f{}\ufe0f",
)
# For pre-tokenizers: what each of them does in another way than some other.
WORDY = (
    *HARD_TEXTS,
    "\u0301B \u0301b a\u0301b A\u0301B \ufe0fA1x",
    "CamelCASE HTMLParser iPhone \u01c5ab DON'Tx I'LLy we'rez",
    "x\r\ny\r\n \r\n  z\n\n\n  \n",
    "\t\tdef f(x):\n    return x\n",
    "!hello #tag @me (a.b) path/to/x ///\n",
    "1 12 123 1234 12345 \u0661\u0662\u0663\u0664",
    "\u65e5\u672c\u30ab\u30bf\u3072\u3089\ud55c\uad6d\u5b57 x\u65e5",
    "<sentinel:12>IMGIMGABCZ    x  y\tz",
    "a\u3000b\u00a0c \u2028d",
    "$5 + 3 = 8 ~ ` ^ | <a>",
)
PLAIN = " and the doctor, of whom nobody had heard, asked the miller"  # words that merge, wherever one cuts
LONG = 20_000  # characters: past the pieces of 512 to 16,384 in which a text may be taken


NO_SPECIAL = ("<s>", "<|im_start|>", "[control]", "<S>", "</S>", "<|EndOfText|>", "< s >")
RARE = tuple(map(chr, (0xDF, 0x3A9, 0x416, 0x5D0, 0x20AC, 0x65E5, 0xAC00, 0x1F9EA, 0x10FFFF)))


@cache
def long_text() -> str:
    """The hard texts over and over, with ever longer words between: at no two borders stands the same."""
    text, rounds = "", 0
    while len(text) < LONG:
        rounds += 1
        text += "".join(HARD_TEXTS) + PLAIN * 4 * rounds + "word" * rounds + " " * (rounds % 3)
    return text


def parting(expected: Sequence[Any], got: Sequence[Any]) -> str:
    """Where two sequences of ids or bytes part, and how each goes on there."""
    at = next((n for n, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    shown = slice(at := min(len(expected), len(got)) if at is None else at, at + 16)
    return f"from {at} on expected {expected[shown]!r} of {len(expected)}, got {got[shown]!r} of {len(got)}"
