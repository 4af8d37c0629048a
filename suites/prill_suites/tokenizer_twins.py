"""A naive tokenizer that shares no code with the runtime's: ids, bytes and ends from a file's metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from itertools import groupby, pairwise
from typing import Any

from prill_suites.tokenizer_words import BY_NAME, WHITE, Words

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType
REPLACEMENT = "\ufffd".encode()
SPACE = "\u2581"
# Pre-tokenizers that take a word that is a token whole, whatever the merges say, and those that put BOS
# before a text where the file does not say (llama.cpp, llama-vocab.cpp).
WHOLE_WORDS = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken glm4"
BOS_WHERE_SILENT = f"{WHOLE_WORDS.removesuffix(' glm4')} chameleon"
# What ends a text whatever its type, and what a key replaces by its own id (same source).
ENDS = (
    "</s> <eos> <|endoftext|> <|end_of_text|> <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> "
    "<|calls|> <|flush|> <end_of_turn> <end_of_utterance> <EOT> _<EOT> [EOT] [EOS] <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~["
)
FILL_IN = {
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}


class Ambiguous(Exception):
    """The published tokenizers need not agree on this text."""


class Twin:
    """What a file's metadata says about text, worked out the slow way.

    Attributes:
        types: as the file gives them; where it does not, `<0xXX>` is a byte in family "llama", bos and eos
            are control tokens, unk is unknown, all else normal.
        bos, eos, unk: ids, None where there is none; family "llama" has 1, 2 and 0 where the file is silent.
        begin, end: the ids that are put before and behind a text.
        ends: ids that end a text.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self.spm = self._get("model") == "llama"
        self.tokens: list[str] = list(self._get("tokens"))
        roles = dict(zip(("unknown", "bos", "eos"), (0, 1, 2) if self.spm else (None,) * 3, strict=True))
        self.types = self._types(roles)
        self.unk, self.bos, self.eos = (self._role(role, default) for role, default in roles.items())
        pre = str(self._get("pre", "default"))
        self._cut = Words(pre) if not self.spm and pre in BY_NAME else None
        self.whole_words = not self.spm and pre in WHOLE_WORDS.split()
        adds = self._get("add_bos_token", self.spm or pre in BOS_WHERE_SILENT.split())
        self.begin = [self.bos] if adds and self.bos is not None else []
        self.end = [self.eos] if self._get("add_eos_token", False) and self.eos is not None else []
        self.ends = self._ends()
        self.prefix = bool(self.spm and self._get("add_space_prefix", True))
        self.control = {i for i in range(len(self.tokens)) if self.types[i] == CONTROL} | self._ends_by_text()
        # Phi 3's marks are published with "rstrip", but for these: what is white behind the others is lost.
        phi3 = self.spm and fields.get("general.architecture") == "phi3"
        self.tight = {"<unk>", "<s>", "<|endoftext|>"} if phi3 else set(self.tokens)
        cut = {i for i, kind in enumerate(self.types) if kind in (UNKNOWN, USER_DEFINED)} | self.control
        self.special = sorted(
            (i for i in cut if self.tokens[i]), key=lambda i: (-len(self.tokens[i].encode()), i)
        )

    def _get(self, key: str, default: Any = None) -> Any:
        return self._fields.get(f"tokenizer.ggml.{key}", default)

    def _types(self, roles: Mapping[str, int | None]) -> list[int]:
        given = self._get("token_type")
        if given is not None:
            return [int(kind) for kind in given]
        types = [BYTE if self.spm and _byte(token) is not None else NORMAL for token in self.tokens]
        for role, default in roles.items():
            at = self._get(f"{role}_token_id", default)
            if at is not None and at < len(types):
                types[at] = UNKNOWN if role == "unknown" else CONTROL
        return types

    def _role(self, role: str, default: int | None) -> int | None:
        stated = self._get(f"{role}_token_id")
        if stated is not None or default is None or default >= len(self.tokens):
            return None if stated is None else int(stated)
        return default if self.types[default] == (UNKNOWN if role == "unknown" else CONTROL) else None

    def _ends_by_text(self) -> set[int]:
        texts = set(self.tokens)
        closing = texts.intersection(ENDS.split())
        called = closing & {"<|call|>", "<|calls|>"}
        if {"<|return|>", "<|call|>"} <= closing or (called and "<|flush|>" in closing):
            closing.discard("<|end|>")
        if "<|tool_response>" in texts:
            closing.discard("</s>")
        for key, names in FILL_IN.items():
            if self._get(f"{key}_token_id") is None:
                closing |= texts.intersection(names.split())
        return {i for i, token in enumerate(self.tokens) if token in closing}

    def _ends(self) -> frozenset[int]:
        stated = [self.eos, *(self._get(f"{key}_token_id") for key in ("eot", "eom", *FILL_IN))]
        return frozenset({int(i) for i in stated if i is not None} | self._ends_by_text())

    # --- text to ids ------------------------------------------------------------------------------------

    def parts(self, text: str) -> list[int | str]:
        """The text with its special tokens cut out, the longest first: ids, and the text between."""
        parts: list[int | str] = [text]
        for i in self.special if text else ():
            cut: list[int | str] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                first, *behind = part.split(self.tokens[i])
                cut.append(first)
                for stretch in behind:
                    tight = self.tokens[i] in self.tight
                    cut += [i, stretch if tight else re.sub(f"^[{WHITE}]+", "", stretch)]
            parts = cut
        return [part for part in parts if part != ""]

    def ids(self, text: str) -> list[int]:
        """Ids without BOS and EOS.

        Raises:
            Ambiguous: an unused token could be taken apart in several ways, or the pre-tokenizer is unknown.
        """
        found: list[int | None] = []
        for part in self.parts(text):
            found += [part] if isinstance(part, int) else self._spm(part) if self.spm else self._bytes(part)
        return [i for i in found if i is not None]

    @cache  # noqa: B019
    def spelled(self, text: str) -> bytes | None:
        """What comes back of a text, by what the vocabulary can spell; None where this twin cannot tell.

        The text itself where nothing is lost: control tokens give nothing, what becomes unk U+FFFD. Ids do
        not say whether a user-defined token was cut out of the text or merged: a space behind it counts as
        one that encoding put there either way.
        """
        pieces: list[tuple[bytes, bool]] = []
        for part in self.parts(text):
            if isinstance(part, int):
                pieces.append((self.piece(part), self._begins_anew(part)))
                continue
            if self.whole_words and any(_LETTERS[byte] not in self.words for byte in part.encode()):
                return None  # a word that is a token whole may hold a byte that has no token
            try:
                pieces += self._spelled_spm(part) if self.spm else [(self._spelled_bytes(part), False)]
            except Ambiguous:
                return None
        return self._without_prefixes(pieces, self.prefix)

    @cached_property
    def words(self) -> dict[str, int]:
        """Spelling -> id of what may come out of merging."""
        if self.spm:
            wanted = {i for i, kind in enumerate(self.types) if kind in (NORMAL, USER_DEFINED, UNUSED)}
        else:
            own = {i for i, kind in enumerate(self.types) if kind == USER_DEFINED}
            wanted = {i for i, kind in enumerate(self.types) if kind == NORMAL}
            wanted |= {i for i in own if self.tokens[i].isascii()}
        return {self.tokens[i]: i for i in sorted(wanted) if self.tokens[i]}

    @cached_property
    def byte_tokens(self) -> dict[int, int]:
        """Byte -> id of its byte token."""
        named = ((_byte(token), i) for i, token in enumerate(self.tokens) if self.types[i] == BYTE)
        return {byte: i for byte, i in named if byte is not None}

    @cached_property
    def _scores(self) -> list[float]:
        return list(map(float, self._get("scores", [0.0] * len(self.tokens))))

    @cached_property
    def _ranks(self) -> dict[tuple[str, ...], int]:
        merges = list(enumerate(self._get("merges", ())))
        return {tuple(merge.split(" ")): rank for rank, merge in reversed(merges)}

    def _symbols(self, part: str) -> list[str]:
        """Stretches that no token reaches across, merged each for itself: a long text is many short ones."""
        text = (" " * self.prefix + part).replace(" ", SPACE)
        borders = [n for n, pair in enumerate(pairwise(text), 1) if pair not in self._neighbours]
        return [s for a, b in pairwise([0, *borders, len(text)]) for s in self._merged(text[a:b])]

    @cached_property
    def _neighbours(self) -> set[tuple[str, str]]:
        """Every two characters that stand side by side in a token."""
        return {pair for token in self.words for pair in pairwise(token)}

    @cache  # noqa: B019  # a twin lives as long as its file is looked at
    def _merged(self, stretch: str) -> list[str]:
        """Neighbours merged while any may, the best score first, of equal ones the leftmost; then the unused
        ones taken apart the way they were merged."""
        merged: list[Any] = list(stretch)
        while True:
            texts = list(map(_joined, merged))
            pairs = [(a + b, i) for i, (a, b) in enumerate(pairwise(texts)) if a + b in self.words]
            if not pairs:
                return [text for symbol in merged for text in self._apart(symbol)]
            at = min((-self._scores[self.words[text]], i) for text, i in pairs)[1]
            merged[at : at + 2] = [(merged[at], merged[at + 1])]

    def _apart(self, symbol: Any) -> list[str]:
        text = _joined(symbol)
        if isinstance(symbol, str) or self.types[self.words[text]] != UNUSED:
            return [text]
        halves = [(text[:n], text[n:]) for n in range(1, len(text))]
        if sum(all(len(half) == 1 or half in self.words for half in pair) for pair in halves) > 1:
            raise Ambiguous(text)
        return [*self._apart(symbol[0]), *self._apart(symbol[1])]

    def _spm(self, part: str) -> Iterator[int | None]:
        for known, symbols in groupby(self._symbols(part), self._has):
            if not known:
                yield self.unk
                continue
            for symbol in symbols:
                yield from [self.words[symbol]] if symbol in self.words else self._in_bytes(symbol)

    def _has(self, symbol: str) -> bool:
        return symbol in self.words or all(byte in self.byte_tokens for byte in symbol.encode())

    def _in_bytes(self, symbol: str) -> list[int]:
        return [self.byte_tokens[byte] for byte in symbol.encode()]

    def _spelled_spm(self, part: str) -> Iterator[tuple[bytes, bool]]:
        for known, symbols in groupby(self._symbols(part), self._has):
            if known:
                for symbol in symbols:
                    at = self.words.get(symbol)
                    yield (symbol.encode(), False) if at is None else (self.piece(at), self._begins_anew(at))
            elif self.unk is not None:
                yield self.piece(self.unk), self._begins_anew(self.unk)

    def _spelled_bytes(self, part: str) -> bytes:
        return bytes(byte for byte in part.encode() if _LETTERS[byte] in self.words)

    def _bytes(self, part: str) -> list[int | None]:
        if self._cut is None:
            raise Ambiguous(part)
        return [i for word in self._cut.cut(part) for i in self._word(word)]

    @cache  # noqa: B019
    def _word(self, word: str) -> list[int | None]:
        """Ids of one word: the earliest listed pair merges until none is listed; None for a lost byte."""
        pieces = [_LETTERS[byte] for byte in word.encode()]
        if self.whole_words and "".join(pieces) in self.words:
            return [self.words["".join(pieces)]]
        while True:
            pairs = [(self._ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in self._ranks]
            if not pairs:
                return [self.words.get(piece) for piece in pieces]
            at = min(pairs)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]

    # --- ids to text ------------------------------------------------------------------------------------

    def piece(self, i: int) -> bytes:
        """The bytes that one id stands for."""
        token, kind = self.tokens[i], self.types[i]
        if i in self.control:
            return b""
        if kind == UNKNOWN:
            return REPLACEMENT
        if kind == BYTE:
            return bytes([_byte(token) or 0])
        if self.spm and kind != USER_DEFINED:
            return token.replace(SPACE, " ").encode()
        spelled = kind != USER_DEFINED and all(letter in _BYTES for letter in token)
        return bytes(_BYTES[letter] for letter in token) if spelled else token.encode()

    def text(self, ids: list[int], continuation: bool = False) -> bytes:
        """The bytes of ids, without the spaces that were put before stretches of text; the first space of a
        continuation is a real one."""
        pieces = ((self.piece(i), self._begins_anew(i)) for i in ids)
        return self._without_prefixes(pieces, self.prefix and not continuation)

    def _begins_anew(self, i: int) -> bool:
        """Whether a stretch of text begins behind an id."""
        return i in self.control or self.types[i] == USER_DEFINED

    def _without_prefixes(self, pieces: Iterable[tuple[bytes, bool]], strip: bool) -> bytes:
        """Pieces joined, each with whether a stretch of text begins behind it; and whether one begins now."""
        out = b""
        for piece, anew in pieces:
            out += piece[1:] if strip and not anew and piece.startswith(b" ") else piece
            strip = self.prefix and anew
        return out


def _joined(symbol: Any) -> str:
    return symbol if isinstance(symbol, str) else _joined(symbol[0]) + _joined(symbol[1])


def _byte(token: str) -> int | None:
    digits = token[3:5] if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else ""
    return int(digits, 16) if digits and all(d in "0123456789ABCDEF" for d in digits) else None


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


_LETTERS = byte_letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}


def longest_text(data: bytes) -> str:
    """What may be shown of a byte stream so far: all but the beginning of a character at its end, with U+FFFD
    for bytes that no character has."""
    for cut in range(1, min(3, len(data)) + 1):
        if _begins_character(data[len(data) - cut :]):
            return data[: len(data) - cut].decode(errors="replace")
    return data.decode(errors="replace")


def _begins_character(tail: bytes) -> bool:
    """Whether bytes are the beginning of one character, and not all of it."""
    try:
        tail.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start == 0
    return False
