"""What all tokenizer families share: special tokens, BOS and EOS, decoding, streaming."""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from prill_runtime.errors import InvalidParameter
from prill_runtime.gguf.vocabulary import BYTE_TOKEN, TokenType
from prill_runtime.tokenizer.vocabulary import Vocabulary

REPLACEMENT = "\ufffd".encode()
# Unicode's White_Space, which `str.isspace` is not.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


class Tokenizer(ABC):
    """Text <-> ids, decided by the metadata of a GGUF file alone; immutable once made.

    Special tokens (CONTROL, UNKNOWN, USER_DEFINED) are cut out of the text whole before anything else
    sees it, the longest spelling (in bytes) first over the whole text, as llama.cpp does. With
    `parse_special=False` only USER_DEFINED ones are, and no control token can come out of plain text. A text
    that is known to end a generation makes a control token, whatever type the file gives it. White space
    behind the special tokens of a "phi3" file of family "llama" goes with them (`vocabulary.GREEDY`).

    Text that no token covers becomes the unknown token if the family has one, and is left out otherwise:
    `lost` tells how much.

    BOS and EOS come from `add_bos_token` and `add_eos_token`. Where the file is silent, llama.cpp's
    defaults hold: EOS is not added; BOS is added by family "llama" and by the pre-tokenizers of Llama 3
    and Tekken. Unlike llama.cpp, a "gpt2" file that names no bos or eos id has none (there: 11), and
    harmony's <|end|>, which ends a message and no generation, stays a control token (there: text).

    Attributes:
        vocab_size: number of ids.
        bos_id, eos_id: None where the file has none.
        eog_ids: ids that end a generation: eos, eot, eom, the fill-in-the-middle ends, and well-known
            texts such as <|im_end|> of any type; `vocabulary.ends` says what makes each an end.
        add_bos, add_eos: whether `encode` adds them.
    """

    families: ClassVar[dict[str, type[Tokenizer]]] = {}
    model: ClassVar[str]  # the family's `tokenizer.ggml.model`
    strips_prefix: bool = False  # whether decode removes the one space that encode put before a text

    def __init_subclass__(cls, *, model: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.model = model
        Tokenizer.families[model] = cls

    @abstractmethod
    def __init__(self, metadata: Mapping[str, Any], vocab_size: int | None) -> None: ...

    def _adopt(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.eog_ids = frozenset(vocabulary.ends)
        self.add_bos, self.add_eos = vocabulary.add_bos, vocabulary.add_eos
        self._control = vocabulary.closing.union(vocabulary.of_type(TokenType.CONTROL))
        special = self._control.union(vocabulary.of_type(TokenType.UNKNOWN, TokenType.USER_DEFINED))
        self._special = sorted(
            (token_id for token_id in special if vocabulary.tokens[token_id]),
            key=lambda token_id: (-len(vocabulary.tokens[token_id].encode()), token_id),
        )

    @cached_property
    def digest(self) -> str:
        """sha256, in hexadecimal, of everything that decides tokenization, and of nothing else."""
        v = self.vocabulary
        shared = [v.tokens, v.types, v.bos_id, v.eos_id, v.unk_id, sorted(v.ends), v.add_bos, v.add_eos]
        shared += [sorted(v.greedy)] if v.greedy else []
        canonical = json.dumps([1, self.model, shared, self._decisive()], separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of a text; an empty text gives only what `add_special` adds. O(n log n) in its length.

        Args:
            add_special: put BOS before and EOS behind, as far as the file asks for them.
            parse_special: read spelled-out control tokens as tokens, not as text.

        Raises:
            InvalidParameter: the text holds a lone surrogate.
        """
        _require_unicode(text)
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(token_id for token_id in self._encode_text(part) if token_id is not None)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def lost(self, text: str) -> int:
        """How many bytes or characters of a text `encode` leaves out because no token covers them."""
        _require_unicode(text)
        parts = [part for part in self._partition(text, True) if isinstance(part, str)]
        return sum(self._encode_text(part).count(None) for part in parts)

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> bytes:
        """The bytes that ids stand for: the inverse of `encode` without special tokens.

        Control tokens give nothing, unknown ones U+FFFD. Family "llama" with a space prefix: the prefix
        that `encode` puts before each stretch of text is removed, which is one space directly at the
        start (BOS may come first) and directly after a CONTROL or USER_DEFINED token. `continuation`
        keeps the one at the start: the ids go on where a text stopped, so their space is a real one.
        O(n).

        Raises:
            InvalidParameter: an id is outside the vocabulary.
        """
        reader = _PieceReader(self, continuation)
        return b"".join([reader.read(token_id) for token_id in ids])

    def piece(self, token_id: int) -> bytes:
        """The bytes one id stands for, wherever it is: nothing is ever stripped; control tokens give b""."""
        token_id = self._require_id(token_id)
        token, kind = self.vocabulary.tokens[token_id], self.vocabulary.types[token_id]
        if token_id in self._control:
            return b""
        if kind == TokenType.UNKNOWN:
            return REPLACEMENT
        if kind == TokenType.BYTE and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return token.encode() if kind == TokenType.USER_DEFINED else self._text(token)

    def name(self, token_id: int) -> str:
        """The token as the file spells it, control tokens included: for people to read."""
        return self.vocabulary.tokens[self._require_id(token_id)]

    def stream(self, *, continuation: bool = False) -> TextStream:
        """A decoder for ids that arrive one by one; `continuation` as for `decode`."""
        return TextStream(self, continuation)

    @abstractmethod
    def unspelled_bytes(self) -> int:
        """How many of the 256 bytes have no token of their own."""

    @abstractmethod
    def _encode_text(self, text: str) -> list[int | None]:
        """Ids of a non-empty stretch of text between special tokens; None for each piece that is lost."""

    @abstractmethod
    def _text(self, token: str) -> bytes:
        """The bytes behind the spelling of a NORMAL or UNUSED token."""

    @abstractmethod
    def _decisive(self) -> list[object]:
        """Whatever else decides this family's tokenization, as JSON values."""

    def _partition(self, text: str, parse_special: bool) -> Iterator[int | str]:
        parts: list[int | str] = [text] if text else []
        for token_id in self._special:
            token = self.vocabulary.tokens[token_id]
            wanted = parse_special or self._is_user_defined(token_id)
            if wanted and token in text:
                dropped = WHITE_SPACE if token_id in self.vocabulary.greedy else ""
                parts = [piece for part in parts for piece in _cut(part, token, token_id, dropped)]
        return iter(parts)

    def _is_user_defined(self, token_id: int) -> bool:
        kind = self.vocabulary.types[token_id]
        return kind == TokenType.USER_DEFINED and token_id not in self._control

    def _require_id(self, token_id: int) -> int:
        index = operator.index(token_id)
        if not 0 <= index < self.vocab_size:
            raise InvalidParameter(
                "id is outside the vocabulary",
                where="token id",
                expected=f"0 to {self.vocab_size - 1}",
                got=index,
            )
        return index


class TextStream:
    """Text from ids that arrive one by one; a character is never split over two pushes.

    All that `push` and `finish` return, joined, equals `decode(ids).decode("utf-8", "replace")`.
    """

    def __init__(self, tokenizer: Tokenizer, continuation: bool = False) -> None:
        self._reader = _PieceReader(tokenizer, continuation)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes: often one word, sometimes none. O(1).

        Raises:
            InvalidParameter: the id is outside the vocabulary.
        """
        return self._decoder.decode(self._reader.read(token_id))

    def finish(self) -> str:
        """U+FFFD for a character left incomplete, else the empty string; the stream then starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._reader.restart()
        return rest


class _PieceReader:
    """Pieces of consecutive ids, without the spaces that encode put before stretches of text."""

    def __init__(self, tokenizer: Tokenizer, continuation: bool) -> None:
        self._tokenizer, self._continuation = tokenizer, continuation
        self.restart()

    def restart(self) -> None:
        self._at_prefix = self._tokenizer.strips_prefix and not self._continuation

    def read(self, token_id: int) -> bytes:
        piece = self._tokenizer.piece(token_id)
        if token_id in self._tokenizer._control or self._tokenizer._is_user_defined(token_id):
            self._at_prefix = self._tokenizer.strips_prefix
            return piece
        stripped = piece[1:] if self._at_prefix and piece.startswith(b" ") else piece
        self._at_prefix = False
        return stripped


def _cut(part: int | str, token: str, token_id: int, dropped: str) -> Iterator[int | str]:
    """The part with each occurrence of a token as its id, and without the `dropped` characters behind it."""
    if isinstance(part, int):
        yield part
        return
    for index, stretch in enumerate(part.split(token)):
        if index:
            yield token_id
            stretch = stretch.lstrip(dropped)
        if stretch:
            yield stretch


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidParameter(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X}",
            where=f"text, character {error.start}",
            expected="text that UTF-8 can encode",
        ) from None
