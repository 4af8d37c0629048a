"""The words within which byte-level BPE merges, by the name of a pre-tokenizer.

A second implementation beside the `tokenizers` library that the runtime cuts with: Python's `re`, Unicode's
own tables, and the expressions as llama.cpp publishes them (llama-vocab.cpp), each applied to the pieces that
the one before left; what lies between its matches is a piece too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

ENGLISH = r"'s|'t|'re|'ve|'m|'ll|'d"
ANY_CASE = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
GPT = rf"{ENGLISH}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = r"{english}|[^\r\n\p{L}\p{N}]?\p{L}+|{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
PUNCTUATED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + REST
HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


def _llama(digits: str) -> str:
    return LLAMA.replace("{english}", ANY_CASE).replace("{digits}", digits)


EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat mellum modern-bert a.x-4.0": (GPT,),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe "
    "chatglm-bpe glm4": (_llama(r"\p{N}{1,3}"),),
    "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan solar-open grok-2 kormo": (_llama(r"\p{N}"),),
    "qwen35": (
        rf"{ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{REST}",
    ),
    "gpt-4o o200k llama4 kanana2 minimax-m2": (
        rf"{BEFORE}{UPPER}*{LOWER}+(?:{ANY_CASE})?|{BEFORE}{UPPER}+{LOWER}*(?:{ANY_CASE})?"
        r"|\p{N}{1,3}" + PUNCTUATED,
    ),
    "tekken": (rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*" + r"|\p{N}" + PUNCTUATED,),
    "chameleon": (
        "<sentinel:[0-9]+>", "(?:IMGIMG)(?:A|B|C|D|E|F|G|H|I){1,4}Z", "[\t\n]|    |  ", r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]", GPT,
    ),
    "deepseek-v3 hunyuan-dense joyai-llm": (
        r"\p{N}{1,3}", KANA,
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|" + REST,
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, r"\p{N}"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT, "[0-9][0-9][0-9]"),
    "starcoder refact command-r smollm codeshell exaone minerva-7b": (r"\p{N}", GPT),
    "seed-coder": (
        rf"{ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{REST}",
    ),
    "bloom gpt3-finnish poro-chat": (BLOOM,),
    "viking": (BLOOM, r"\p{N}"),
}  # fmt: skip
BY_NAME = {name: expressions for names, expressions in EXPRESSIONS.items() for name in names.split()}
# Unicode's White_Space, which is not what `str.isspace` says.
WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
NONE = "\uffff"  # no text holds it: a class without a member
_PARTS = re.compile(r"\\p\{(\w+)\}|\\s|\\S|\\.|\[\^?|\]|.", re.DOTALL)


class Words:
    """What the pre-tokenizer of a name cuts texts into.

    Raises:
        KeyError: no such name.
    """

    def __init__(self, name: str) -> None:
        self._expressions = BY_NAME[name]
        self._alphabet = set[str]()
        self._patterns: list[re.Pattern[str]] = []

    def cut(self, text: str) -> list[str]:
        """The words of a text; joined they are the text."""
        if not self._alphabet.issuperset(text) or not self._patterns:
            self._alphabet.update(text)
            self._patterns = [_compiled(each, sorted(self._alphabet)) for each in self._expressions]
        pieces = [text] if text else []
        for pattern in self._patterns:
            pieces = [word for piece in pieces for word in _isolated(pattern, piece)]
        return pieces


def _isolated(pattern: re.Pattern[str], text: str) -> list[str]:
    """A text cut before and behind every match."""
    borders = {0, len(text)}
    for match in pattern.finditer(text):
        borders |= {match.start(), match.end()} if match.group() else set()
    at = sorted(borders)
    return [text[a:b] for a, b in pairwise(at)]


def _compiled(expression: str, alphabet: Sequence[str]) -> re.Pattern[str]:
    """The expression with its classes spelled out, as far as the alphabet has them: `re` has no `\\p`."""
    out, inside = "", False
    for part in _PARTS.finditer(expression):
        token = part.group()
        if part[1]:
            members = [re.escape(c) for c in alphabet if unicodedata.category(c).startswith(part[1])]
            spelled = "".join(members) or NONE
            out += spelled if inside else f"[{spelled}]"
        elif token in ("\\s", "\\S"):
            negated = "^" if token == "\\S" else ""
            out += WHITE if inside else f"[{negated}{WHITE}]"
        else:
            inside = (inside or token[0] == "[") and token != "]"
            out += token
    return re.compile(out)
