"""The rules that a file's tokenizer metadata must keep, and the one sentence that says which is broken.

Files are checked when they are opened, bare metadata when a tokenizer is built from them. Where the format is
silent, llama.cpp and SentencePiece decide: llama.cpp aborts on two tokens of one spelling, unless they are
empty; both look up byte tokens by upper-case hex digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from numbers import Integral, Real
from typing import Any, Final

import numpy as np

from prill_runtime.errors import ModelFileError
from prill_runtime.gguf.header import Strings, quoted

PREFIX: Final = "tokenizer.ggml."
BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
# Keys that name an end, the first that does being credited with it; and those of fill-in-the-middle.
END_KEYS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
FILL_IN_KEYS: Final = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
# The ids that decide what is generated and where it ends; others are carried along unused.
SPECIAL_IDS: Final = ("bos_token_id", "unknown_token_id", *END_KEYS, *FILL_IN_KEYS)

_TEXT: Final[tuple[str, Any]] = ("text", str)
_TRUTH: Final[tuple[str, Any]] = ("true or false", bool | np.bool_)
_SCALARS: Final[dict[str, tuple[str, Any]]] = {
    "general.architecture": _TEXT,
    "general.name": _TEXT,
    f"{PREFIX}model": _TEXT,
    f"{PREFIX}pre": _TEXT,
    "tokenizer.chat_template": _TEXT,
    f"{PREFIX}add_bos_token": _TRUTH,
    f"{PREFIX}add_eos_token": _TRUTH,
    f"{PREFIX}add_space_prefix": _TRUTH,
    **{f"{PREFIX}{name}": ("a whole number", Integral) for name in SPECIAL_IDS},
}
_ARRAYS: Final[dict[str, tuple[str, Any]]] = {
    f"{PREFIX}tokens": ("text", str),
    f"{PREFIX}merges": ("text", str),
    f"{PREFIX}scores": ("numbers", Real),
    f"{PREFIX}token_type": ("whole numbers", Integral),
}


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`; 0, llama.cpp's "undefined", is none of the format's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class _Fault:
    """Words the error: with the file, and the offset of the key's value where it is known."""

    def __init__(self, path: str, offsets: Mapping[str, int]) -> None:
        self.path, self.offsets = path, offsets

    def __call__(self, key: str, what: str, expected: object, got: object) -> ModelFileError:
        place = f"byte {self.offsets[key]}" if key in self.offsets else ""
        where = ", ".join(part for part in (self.path, place) if part)
        return ModelFileError(f"{key} {what}", where=where, expected=expected, got=got)


def check_tokenizer(
    metadata: Mapping[str, Any], *, path: str = "", offsets: Mapping[str, int] | None = None
) -> None:
    """Check that every key has its type and that they agree: lengths, spellings, token types, special ids.

    Metadata without a token list pass: there is no tokenizer to check.

    Raises:
        ModelFileError: naming the key, and `offsets[key]` when given.
    """
    fault = _Fault(path, offsets or {})
    _check_types(metadata, fault)
    tokens = metadata.get(f"{PREFIX}tokens")
    if tokens is None:
        return
    count = len(tokens)
    if not count:
        raise fault(f"{PREFIX}tokens", "is empty", "at least 1 token", 0)
    for name in ("scores", "token_type"):
        values = metadata.get(f"{PREFIX}{name}")
        if values is not None and len(values) != count:
            raise fault(f"{PREFIX}{name}", "does not match the token list in length", count, len(values))
    scores = np.asarray(metadata.get(f"{PREFIX}scores", ()), np.float64)
    if (bad := np.flatnonzero(np.isnan(scores))).size:
        raise fault(f"{PREFIX}scores", f"of token {bad[0]} is not a number", "a score", "NaN")
    _check_spellings(tokens, metadata.get(f"{PREFIX}token_type", ()), fault)
    for name in SPECIAL_IDS:
        key = f"{PREFIX}{name}"
        if key in metadata and not 0 <= metadata[key] < count:
            raise fault(key, "is outside the vocabulary", f"0 to {count - 1}", metadata[key])


def _check_types(metadata: Mapping[str, Any], fault: _Fault) -> None:
    """Check that every key defined by the format holds a value of the right type."""
    for key, (wanted, kind) in _SCALARS.items():
        if key in metadata and not _fits(type(metadata[key]), kind):
            raise fault(key, "has the wrong type", wanted, _described(metadata[key]))
    for key, (wanted, kind) in _ARRAYS.items():
        values = metadata.get(key, ())
        if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
            raise fault(key, "has the wrong type", f"an array of {wanted}", _described(values))
        # A file's arrays are of one type each, and its text was decoded; lists may hold anything.
        alike = values[:1] if isinstance(values, Strings | np.ndarray) else values
        if wrong := {kept for kept in set(map(type, alike)) if not _fits(kept, kind)}:
            value = next(value for value in alike if type(value) in wrong)
            raise fault(key, "has the wrong type", f"an array of {wanted}", f"of {_described(value)}")
        if kind is str and (at := _not_unicode(alike)) is not None:
            raise fault(key, f"holds no text at {at}", "what UTF-8 can encode", quoted(values[at]))


def _fits(found: type, wanted: Any) -> bool:
    """Whether a value of one type may stand for another; bool counts as an integer only in Python."""
    truth = issubclass(found, bool | np.bool_)
    return truth if wanted == _TRUTH[1] else issubclass(found, wanted) and not truth


def _not_unicode(texts: Iterable[str]) -> int | None:
    """The first text with a lone surrogate."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return next(at for at, text in enumerate(texts) if re.search("[\ud800-\udfff]", text))
    return None


def _check_spellings(tokens: Sequence[str], types: Any, fault: _Fault) -> None:
    """Check that no two tokens share a non-empty spelling, types are known, and byte tokens name a byte."""
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens if len(set(tokens)) < len(tokens) else ()):
        if token and seen.setdefault(token, index) != index:
            ids = f"{quoted(token)} as {seen[token]} and {index}"
            raise fault(f"{PREFIX}tokens", "has a token twice", "one id for each spelling", ids)
    kinds = np.asarray(types)
    if (bad := np.flatnonzero(~np.isin(kinds, [*TokenType]))).size:
        wrong = int(kinds[bad[0]])
        known = f"{min(TokenType)} to {max(TokenType)}"
        raise fault(f"{PREFIX}token_type", f"of token {bad[0]} is unknown", known, wrong)
    for index in np.flatnonzero(kinds == TokenType.BYTE).tolist():
        if not BYTE_TOKEN.fullmatch(tokens[index]):
            found = quoted(tokens[index])
            raise fault(f"{PREFIX}tokens", f"has a malformed byte token {index}", "<0x00> to <0xFF>", found)


def _described(value: Any) -> str:
    if isinstance(value, str):
        return f"text {quoted(value)}"
    if isinstance(value, Sequence | np.ndarray):
        return f"an array of {len(value)}"
    return f"{value} ({type(value).__name__})"
