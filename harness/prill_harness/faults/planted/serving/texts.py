"""Faults of tokenizers on texts that few try: rare characters, spaces beside special tokens, long texts,
pre-tokenizers of other models, and ids decoded in parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from prill_harness.faults.planted.serving.tokenizer import BLAMES, SPM_FILE, TOKENIZER, other_text
from prill_harness.planting.faults import Patch, fault

PARTITION = f"{TOKENIZER}._partition"
DECODE = f"{TOKENIZER}.decode"
ENCODE_TEXT = "prill_runtime.tokenizer.spm:SentencePieceTokenizer._encode_text"
STREAM = "prill_runtime.tokenizer.base:TextStream"
BUILD = "prill_runtime.tokenizer.pretokenizers:PreTokenizer.build"
PIECE_CHARACTERS = 4096  # characters
AREA = "tokenizer"


def other_expressions(changed: Callable[[str], str]) -> Iterator[Patch]:
    """Pre-tokenizers with expressions as `changed` makes them of the published ones."""

    def wrap(build: Any) -> Any:
        return lambda self: build(replace(self, patterns=tuple(map(changed, self.patterns))))

    yield Patch(BUILD, wrap)


def other_parts(changed: Callable[[list[Any], int], Any]) -> Iterator[Patch]:
    """Stretches of text beside special tokens, each as `changed` makes it of all parts and its place."""

    def wrap(partition: Any) -> Any:
        def parts(self: Any, text: str, parse_special: bool) -> Iterator[Any]:
            found = list(partition(self, text, parse_special))
            return iter([part for n in range(len(found)) if (part := changed(found, n)) != ""])

        return parts

    yield Patch(PARTITION, wrap)


@fault(area=AREA, blames=BLAMES)
def variation_selector_dropped() -> Iterator[Patch]:
    """U+FE0F, which asks for the emoji's look, is left out of a text."""
    yield from other_text(lambda text: text.replace("\ufe0f", ""))


@fault(area=AREA, blames=BLAMES)
def lone_return_translated() -> Iterator[Patch]:
    """A carriage return without a line feed becomes one."""
    yield from other_text(lambda text: re.sub("\r(?!\n)", "\n", text))


@fault(area=AREA, blames=BLAMES)
def nul_ends_text() -> Iterator[Patch]:
    """A text ends at its first NUL, as a string of C does."""
    yield from other_text(lambda text: text.partition("\x00")[0])


@fault(area=AREA, blames=BLAMES)
def long_text_in_pieces() -> Iterator[Patch]:
    """A long text is taken in pieces of 4,096 characters; nothing merges over their borders."""

    def wrap(encode: Any) -> Any:
        def piecewise(self: Any, text: str, *rest: Any, **named: Any) -> list[int]:
            ids = encode(self, text[:PIECE_CHARACTERS], *rest, **named)
            for at in range(PIECE_CHARACTERS, len(text), PIECE_CHARACTERS):
                more = encode(self, f"x{text[at : at + PIECE_CHARACTERS]}", False)
                ids += more[len(encode(self, "x", False)) :]
            return list(ids)

        return piecewise

    yield Patch(f"{TOKENIZER}.encode", wrap)


@fault(area=AREA, blames=BLAMES)
def space_before_special_stripped() -> Iterator[Patch]:
    """White space before a special token is thrown away."""

    def stripped(parts: list[Any], n: int) -> Any:
        before = isinstance(parts[n], str) and n + 1 < len(parts)
        return parts[n].rstrip() if before else parts[n]

    yield from other_parts(stripped)


@fault(area=AREA, blames=BLAMES)
def space_after_special_stripped() -> Iterator[Patch]:
    """White space behind a special token is thrown away."""
    yield from other_parts(
        lambda parts, n: parts[n].lstrip() if isinstance(parts[n], str) and n else parts[n]
    )


@fault(area=AREA, blames=BLAMES, models=SPM_FILE)
def space_prefix_at_start_only() -> Iterator[Patch]:
    """Behind a special token no space is put before the text."""

    def encode(original: Any) -> Any:
        def plain(self: Any, text: str) -> Any:
            own, self.strips_prefix = self.strips_prefix, self.strips_prefix and not text.startswith("\x02")
            try:
                return original(self, text.removeprefix("\x02"))
            finally:
                self.strips_prefix = own

        return plain

    yield from other_parts(
        lambda parts, n: f"\x02{parts[n]}" if isinstance(parts[n], str) and n else parts[n]
    )
    yield Patch(ENCODE_TEXT, encode)


@fault(area=AREA, blames=BLAMES)
def spaces_cleaned_up() -> Iterator[Patch]:
    """Decoding takes the spaces before punctuation and English endings for clumsy, and leaves them out."""

    def wrap(decode: Any) -> Any:
        return lambda *given, **named: re.sub(
            rb" ([.,?!]|n't|'m|'s|'ve|'re)", rb"\1", decode(*given, **named)
        )

    yield Patch(DECODE, wrap)


@fault(area=AREA, blames=BLAMES)
def incomplete_end_dropped() -> Iterator[Patch]:
    """Bytes at the end of a text that are not a whole character yet are left out."""

    def wrap(decode: Any) -> Any:
        def whole(*given: Any, **named: Any) -> bytes:
            data = bytes(decode(*given, **named))
            tail = re.search(rb"(?:[\xc0-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf7][\x80-\xbf]{0,2})$", data)
            return data[: tail.start()] if tail else data

        return whole

    yield Patch(DECODE, wrap)


@fault(area=AREA, blames=BLAMES, models=SPM_FILE)
def continuation_stripped() -> Iterator[Patch]:
    """Ids that go on where a text stopped lose their first space, as if they began one."""
    yield Patch(DECODE, lambda decode: lambda self, ids, *, continuation=False: decode(self, ids))


@fault(area=AREA, blames=BLAMES)
def stream_end_lost() -> Iterator[Patch]:
    """A streamed text says nothing of a character that its last id leaves incomplete."""

    def wrap(finish: Any) -> Any:
        def silent(self: Any) -> str:
            finish(self)
            return ""

        return silent

    yield Patch(f"{STREAM}.finish", wrap)


@fault(area=AREA, blames=BLAMES)
def digits_in_fours() -> Iterator[Patch]:
    """Pre-tokenizers that take three digits for a word take four."""
    yield from other_expressions(lambda pattern: pattern.replace("{1,3}", "{1,4}"))


@fault(area=AREA, blames=BLAMES)
def contractions_in_one_case() -> Iterator[Patch]:
    """Pre-tokenizers that cut off 'S and 's alike cut off the small one alone."""
    yield from other_expressions(lambda pattern: pattern.replace("(?i:", "(?:"))


@fault(area=AREA, blames=BLAMES)
def returns_are_spaces() -> Iterator[Patch]:
    """Pre-tokenizers end a word behind line feeds, and not behind carriage returns."""
    yield from other_expressions(lambda pattern: pattern.replace(r"\s*[\r\n]+", r"\s*\n+"))


@fault(area=AREA, blames=BLAMES)
def marks_are_letters() -> Iterator[Patch]:
    """Pre-tokenizers keep combining marks with the letters before them."""
    yield from other_expressions(lambda pattern: re.sub(r"(?<!\[)\\p\{L\}\+", r"[\\p{L}\\p{M}]+", pattern))


@fault(area=AREA, blames=BLAMES)
def o200k_marks_apart() -> Iterator[Patch]:
    """The pre-tokenizer of o200k takes combining marks for no part of a word."""
    yield from other_expressions(lambda pattern: pattern.replace(r"\p{Lo}\p{M}", r"\p{Lo}"))
