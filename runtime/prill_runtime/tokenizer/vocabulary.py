"""A file's tokenizer metadata in; a checked vocabulary with its special ids out."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from prill_runtime.errors import ModelFileError
from prill_runtime.tokenizer.ends import END_KEYS, FILL_IN, ends, known_ends

PREFIX = "tokenizer.ggml."
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a family assumes where the file is silent."""

    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a file, checked.

    Attributes:
        types: as the file gives them, or as guessed where it does not.
        ids: finds a token by its spelling (empty spellings excepted).
        ends: the ids that end a text, each with the key that names it or "its text".
        closing: those of them whose text says so, whatever else does.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    ids: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    ends: Mapping[int, str]
    closing: frozenset[int]
    add_bos: bool
    add_eos: bool

    def of_type(self, *types: TokenType) -> list[int]:
        """Ids of the tokens of the given types, ascending."""
        return [token_id for token_id, kind in enumerate(self.types) if kind in types]


def read_vocabulary(metadata: Mapping[str, object], vocab_size: int | None, defaults: Defaults) -> Vocabulary:
    """Check the tokens, their types and the special ids of a file.

    No two tokens may share a spelling, except the empty one, which nothing ever matches. Without
    `token_type` every token is NORMAL but the bos and eos ids (CONTROL), the unk id (UNKNOWN) and, in
    families that have an unk by default, `<0xXX>` (BYTE). A default id holds only if the vocabulary has
    that id, with the type the role asks for.

    Raises:
        ModelFileError: an array is missing, mistyped or of another length; a spelling is taken twice or
            is not Unicode; a byte token is not `<0xXX>`; an id is outside the vocabulary.
    """
    tokens = strings(metadata, "tokens")
    size = len(tokens)
    if vocab_size is not None and size != vocab_size:
        raise ModelFileError(
            "vocabulary and token_embd.weight differ in size",
            where=PREFIX + "tokens",
            expected=f"{vocab_size} tokens",
            got=size,
        )
    ids = _index(tokens)
    given = {role: _token_id(metadata, f"{role}_token_id", size) for role in ("bos", "eos")}
    unk = _token_id(metadata, "unknown_token_id", size)
    types = _types(metadata, tokens, given, unk, defaults)

    def default(token_id: int | None, kind: TokenType) -> int | None:
        fits = token_id is not None and token_id < size and types[token_id] == kind
        return token_id if fits else None

    bos = given["bos"] if given["bos"] is not None else default(defaults.bos_id, TokenType.CONTROL)
    eos = given["eos"] if given["eos"] is not None else default(defaults.eos_id, TokenType.CONTROL)
    named = {key: _token_id(metadata, key, size) for key in (*END_KEYS, *FILL_IN)} | {"eos_token_id": eos}
    stated = {key: token_id for key, token_id in named.items() if token_id is not None}
    closing = known_ends(stated, ids)
    return Vocabulary(
        tokens=tuple(tokens),
        types=tuple(types),
        ids=ids,
        bos_id=bos,
        eos_id=eos,
        unk_id=unk if unk is not None else default(defaults.unk_id, TokenType.UNKNOWN),
        ends=ends(stated, closing),
        closing=closing,
        # A file may ask for a token that it does not name: there is nothing to add then.
        add_bos=flag(metadata, "add_bos_token", default=defaults.add_bos) and bos is not None,
        add_eos=flag(metadata, "add_eos_token", default=False) and eos is not None,
    )


def strings(metadata: Mapping[str, object], name: str) -> list[str]:
    """The array of strings `tokenizer.ggml.NAME`, which must be there, not empty and valid Unicode."""
    key = PREFIX + name
    values = metadata.get(key)
    if values is None:
        raise ModelFileError("key is missing", where=key, expected="an array of strings")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ModelFileError("wrong type", where=key, expected="an array of strings", got=_kind(values))
    if not values:
        raise ModelFileError("array is empty", where=key, expected="at least one string")
    try:
        "".join(values).encode("utf-8")
    except UnicodeEncodeError:
        index = next(i for i, value in enumerate(values) if re.search("[\ud800-\udfff]", value))
        raise ModelFileError("string is not valid UTF-8", where=f"{key}[{index}]") from None
    return values


def numbers(metadata: Mapping[str, object], name: str, size: int, kinds: str) -> NDArray[np.generic] | None:
    """The array `tokenizer.ggml.NAME` of `size` numbers of the NumPy kinds "iu" or "iuf", or None."""
    key = PREFIX + name
    if key not in metadata:
        return None
    wanted = "an array of numbers" if "f" in kinds else "an array of integers"
    try:
        array = np.asarray(metadata[key])
    except ValueError:
        raise ModelFileError("nested array", where=key, expected=wanted) from None
    if array.ndim == 1 and len(array) != size:
        raise ModelFileError(
            "length differs from the token list", where=key, expected=f"{size} entries", got=len(array)
        )
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise ModelFileError("wrong type", where=key, expected=wanted, got=_kind(metadata[key]))
    return array


def flag(metadata: Mapping[str, object], name: str, *, default: bool) -> bool:
    """The boolean `tokenizer.ggml.NAME`, or the default."""
    value = metadata.get(PREFIX + name, default)
    if not isinstance(value, bool | np.bool_):
        raise ModelFileError("wrong type", where=PREFIX + name, expected="a boolean", got=_kind(value))
    return bool(value)


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if isinstance(value, list):
        return f"an array of {'/'.join(sorted({type(item).__name__ for item in value[:1000]})) or 'nothing'}"
    return f"{type(value).__name__} {value!r:.40}"


def _index(tokens: Sequence[str]) -> dict[str, int]:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        seen: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            if token and seen.setdefault(token, token_id) != token_id:
                raise ModelFileError(
                    f"token {token!r:.60} occurs twice",
                    where=PREFIX + "tokens",
                    expected="one id for each spelling",
                    got=f"ids {seen[token]} and {token_id}",
                )
    ids.pop("", None)
    return ids


def _token_id(metadata: Mapping[str, object], name: str, size: int) -> int | None:
    key = PREFIX + name
    value = metadata.get(key)
    if value is None:
        return None
    try:
        token_id = operator.index(value) if not isinstance(value, bool) else -1  # type: ignore[arg-type]
    except TypeError:
        token_id = -1
    if not 0 <= token_id < size:
        raise ModelFileError(
            "id is outside the vocabulary", where=key, expected=f"0 to {size - 1}", got=f"{value!r:.40}"
        )
    return token_id


def _types(
    metadata: Mapping[str, object],
    tokens: Sequence[str],
    given: Mapping[str, int | None],
    unk: int | None,
    defaults: Defaults,
) -> list[int]:
    array = numbers(metadata, "token_type", len(tokens), "iu")
    if array is None:
        return _guessed_types(tokens, given, unk, defaults)
    types: list[int] = array.tolist()
    for token_id in np.flatnonzero(~np.isin(array, [int(kind) for kind in TokenType]))[:1].tolist():
        raise ModelFileError(
            "unknown token type",
            where=f"{PREFIX}token_type[{token_id}]",
            expected="1 to 6",
            got=types[token_id],
        )
    for token_id in np.flatnonzero(array == TokenType.BYTE).tolist():
        if not BYTE_TOKEN.fullmatch(tokens[token_id]):
            raise ModelFileError(
                "byte token names no byte",
                where=f"{PREFIX}tokens[{token_id}]",
                expected="<0x00> to <0xFF> with two upper-case hexadecimal digits",
                got=repr(tokens[token_id]),
            )
    return types


def _guessed_types(
    tokens: Sequence[str], given: Mapping[str, int | None], unk: int | None, defaults: Defaults
) -> list[int]:
    types = [int(TokenType.NORMAL)] * len(tokens)
    if defaults.unk_id is not None:
        for token_id, token in enumerate(tokens):
            if BYTE_TOKEN.fullmatch(token):
                types[token_id] = TokenType.BYTE
    roles = (
        (unk if unk is not None else defaults.unk_id, TokenType.UNKNOWN),
        (given["bos"] if given["bos"] is not None else defaults.bos_id, TokenType.CONTROL),
        (given["eos"] if given["eos"] is not None else defaults.eos_id, TokenType.CONTROL),
    )
    for role, kind in roles:
        if role is not None and role < len(tokens):
            types[role] = kind
    return types
