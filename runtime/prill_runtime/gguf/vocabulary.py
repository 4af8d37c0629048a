"""The metadata of a file goes in; nothing comes out, or one sentence on how its tokenizer is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Final

import numpy as np

from prill_runtime.errors import ModelFileError
from prill_runtime.gguf.header import quoted

PREFIX: Final = "tokenizer.ggml."
BYTE: Final = 6
MAX_TOKEN_TYPE: Final = 6
# The ids that decide what is generated and where it ends; others are carried along unused.
SPECIAL_IDS: Final = ("bos", "eos", "eot", "eom", "unknown")
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_TEXT: Final = ("text", str)
_TRUTH: Final = ("true or false", bool)
_SCALARS: Final = {
    "general.architecture": _TEXT,
    "general.name": _TEXT,
    f"{PREFIX}model": _TEXT,
    f"{PREFIX}pre": _TEXT,
    "tokenizer.chat_template": _TEXT,
    f"{PREFIX}add_bos_token": _TRUTH,
    f"{PREFIX}add_eos_token": _TRUTH,
    f"{PREFIX}add_space_prefix": _TRUTH,
    **{f"{PREFIX}{name}_token_id": ("a whole number", Integral) for name in SPECIAL_IDS},
}
_ARRAYS: Final = {
    f"{PREFIX}tokens": ("text", str),
    f"{PREFIX}merges": ("text", str),
    f"{PREFIX}scores": ("numbers", Real),
    f"{PREFIX}token_type": ("whole numbers", Integral),
}


class _Fault:
    """Words the sentence: the file and the byte at which the key's value lies, when known."""

    def __init__(self, path: str, offsets: Mapping[str, int]) -> None:
        self.path, self.offsets = path, offsets

    def __call__(self, key: str, what: str, expected: object, got: object) -> ModelFileError:
        place = f"byte {self.offsets[key]}" if key in self.offsets else ""
        where = ", ".join(part for part in (self.path, place) if part)
        return ModelFileError(f"{key} {what}", where=where, expected=expected, got=got)


def check_types(
    metadata: Mapping[str, Any], *, path: str = "", offsets: Mapping[str, int] | None = None
) -> None:
    """Every key whose meaning is fixed by the format holds a value of the right type.

    Raises:
        ModelFileError: naming the key, and `offsets[key]` when given.
    """
    fault = _Fault(path, offsets or {})
    for key, (wanted, kind) in _SCALARS.items():
        value = metadata.get(key)
        # bool is an Integral to Python, not to the format
        if value is not None and (
            not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))
        ):
            raise fault(key, "has the wrong type", wanted, _described(value))
    for key, (wanted, kind) in _ARRAYS.items():
        value = metadata.get(key)
        if value is None:
            continue
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise fault(key, "has the wrong type", f"an array of {wanted}", _described(value))
        if len(value) and (not isinstance(value[0], kind) or isinstance(value[0], bool | np.bool_)):
            raise fault(key, "has the wrong type", f"an array of {wanted}", f"of {_described(value[0])}")


def check_tokenizer(
    metadata: Mapping[str, Any], *, path: str = "", offsets: Mapping[str, int] | None = None
) -> None:
    """The parts of the tokenizer agree: array lengths, token types, byte tokens, special ids.

    A file without a token list passes: it has no tokenizer to contradict. Duplicate tokens are legal.

    Raises:
        ModelFileError: naming the key, and `offsets[key]` when given.
    """
    check_types(metadata, path=path, offsets=offsets)
    fault = _Fault(path, offsets or {})
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
    types = np.asarray(metadata.get(f"{PREFIX}token_type", ()), np.int64)
    if (bad := np.flatnonzero((types < 0) | (types > MAX_TOKEN_TYPE))).size:
        wrong = int(types[bad[0]])
        raise fault(f"{PREFIX}token_type", f"of token {bad[0]} is unknown", f"0 to {MAX_TOKEN_TYPE}", wrong)
    for index in np.flatnonzero(types == BYTE):
        if not _BYTE_TOKEN.fullmatch(tokens[int(index)]):
            found = quoted(tokens[int(index)])
            raise fault(f"{PREFIX}tokens", f"has a malformed byte token {index}", "<0x00> to <0xFF>", found)
    for name in SPECIAL_IDS:
        key = f"{PREFIX}{name}_token_id"
        if key in metadata and not 0 <= metadata[key] < count:
            raise fault(key, "is outside the vocabulary", f"0 to {count - 1}", metadata[key])


def _described(value: Any) -> str:
    if isinstance(value, str):
        return f"text {quoted(value)}"
    if isinstance(value, Sequence | np.ndarray):
        return f"an array of {len(value)}"
    return f"{value} ({type(value).__name__})"
