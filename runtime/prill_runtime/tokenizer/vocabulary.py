"""Read a vocabulary and its special ids from checked metadata."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prill_runtime.errors import ModelFileError
from prill_runtime.gguf.vocabulary import BYTE_TOKEN, END_KEYS, FILL_IN_KEYS, PREFIX, TokenType
from prill_runtime.tokenizer.ends import ends, known_ends

# Architecture and family whose special tokens take the white space behind them along, and those that do not.
# Their own tokenizer.json says so (rstrip), no key of GGUF does: llama.cpp goes by the name of the model.
GREEDY = {("phi3", "llama"): ("<unk>", "<s>", "<|endoftext|>")}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a family assumes if the file is silent."""

    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a file.

    Attributes:
        types: as the file gives them, or as guessed where it does not.
        ids: finds a token by its spelling (empty spellings excepted).
        ends: the ids that end a text, each with the key that names it or "its text".
        closing: those of them that are ends by their text, whether or not a key names them too.
        greedy: the special tokens that take the white space behind them along.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    ids: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    ends: Mapping[int, str]
    closing: frozenset[int]
    greedy: frozenset[int]
    add_bos: bool
    add_eos: bool

    def of_type(self, *types: TokenType) -> list[int]:
        """Ids of the tokens of the given types, ascending."""
        return [token_id for token_id, kind in enumerate(self.types) if kind in types]


def read_vocabulary(metadata: Mapping[str, Any], vocab_size: int | None, defaults: Defaults) -> Vocabulary:
    """The tokens, their types and the special ids of metadata that `check_tokenizer` passes.

    Without `token_type` every token is NORMAL but the bos and eos ids (CONTROL), the unk id (UNKNOWN) and, in
    families that have an unk by default, `<0xXX>` (BYTE). A default id holds only if the vocabulary has
    that id, with the type the role asks for.

    Raises:
        ModelFileError: there are no tokens, or not `vocab_size` of them.
    """
    tokens = tuple(required(metadata, "tokens"))
    size = len(tokens)
    if vocab_size is not None and size != vocab_size:
        raise ModelFileError(
            "vocabulary and token_embd.weight differ in size",
            where=PREFIX + "tokens",
            expected=f"{vocab_size} tokens",
            got=size,
        )
    ids = {token: token_id for token_id, token in enumerate(tokens) if token}
    given = {role: optional(metadata, f"{role}_token_id") for role in ("bos", "eos")}
    unk = optional(metadata, "unknown_token_id")
    types = _types(metadata, tokens, given, unk, defaults)

    def default(token_id: int | None, kind: TokenType) -> int | None:
        fits = token_id is not None and token_id < size and types[token_id] == kind
        return token_id if fits else None

    bos = given["bos"] if given["bos"] is not None else default(defaults.bos_id, TokenType.CONTROL)
    eos = given["eos"] if given["eos"] is not None else default(defaults.eos_id, TokenType.CONTROL)
    named = {key: optional(metadata, key) for key in (*END_KEYS, *FILL_IN_KEYS)} | {"eos_token_id": eos}
    stated = {key: token_id for key, token_id in named.items() if token_id is not None}
    closing = known_ends(stated, ids)
    return Vocabulary(
        tokens=tokens,
        types=tuple(types),
        ids=ids,
        bos_id=bos,
        eos_id=eos,
        unk_id=unk if unk is not None else default(defaults.unk_id, TokenType.UNKNOWN),
        ends=ends(stated, closing),
        closing=closing,
        greedy=_greedy(metadata, tokens, types, closing),
        # A file may ask for a token without naming one; then there is nothing to add.
        add_bos=bool(metadata.get(PREFIX + "add_bos_token", defaults.add_bos)) and bos is not None,
        add_eos=bool(metadata.get(PREFIX + "add_eos_token", False)) and eos is not None,
    )


def required(metadata: Mapping[str, Any], name: str) -> Any:
    """The value of `tokenizer.ggml.NAME`.

    Raises:
        ModelFileError: it is not there.
    """
    key = PREFIX + name
    if key not in metadata:
        raise ModelFileError("key is missing", where=key)
    return metadata[key]


def optional(metadata: Mapping[str, Any], name: str) -> int | None:
    """The id `tokenizer.ggml.NAME`, or None."""
    value = metadata.get(PREFIX + name)
    return None if value is None else int(value)


def _greedy(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], closing: Collection[int]
) -> frozenset[int]:
    rest = GREEDY.get((metadata.get("general.architecture", ""), metadata.get(PREFIX + "model", "")))
    if rest is None:
        return frozenset()
    special = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    return frozenset(
        i for i, kind in enumerate(types) if (kind in special or i in closing) and tokens[i] not in rest
    )


def _types(
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    given: Mapping[str, int | None],
    unk: int | None,
    defaults: Defaults,
) -> list[int]:
    stated = metadata.get(PREFIX + "token_type")
    if stated is not None:
        return [int(kind) for kind in stated]
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
