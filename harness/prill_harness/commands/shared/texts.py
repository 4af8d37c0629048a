"""The token ids that `bisect` and `trace` are to run, given as text, ids or a length."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from prill_harness.engines.base import Engine
from prill_harness.tokens.golden import prompts_for
from prill_runtime.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_TOKENS = 64


def text_options(function: F) -> F:
    """Add --prompt, --ids and --tokens, which say what to run."""
    for option in (
        click.option(
            "--tokens",
            type=click.IntRange(min=1),
            metavar="N",
            help=f"The model's first golden prompt, continued greedily to N ids; default {DEFAULT_TOKENS}.",
        ),
        click.option("--ids", metavar="ID,ID…", help="Token ids, or @FILE with them."),
        click.option("--prompt", metavar="TEXT", help="Text, tokenized by prill's own tokenizer."),
    ):
        function = option(function)
    return function


def ids_for(
    oracle: Engine, model: str, *, prompt: str | None, ids: str | None, tokens: int | None
) -> list[int]:
    """The token ids to run.

    Args:
        oracle: tokenizes, and continues a text that is too short for `tokens`.

    Raises:
        UsageError: several of the three were given, ids that are no ids of the model, or no ids at all.
    """
    given = [name for name, value in (("--prompt", prompt), ("--ids", ids), ("--tokens", tokens)) if value]
    if len(given) > 1:
        raise UsageError(
            "two texts to run", expected="one of --prompt, --ids and --tokens", got=", ".join(given)
        )
    if ids is not None:
        return parse_ids(ids, int(oracle.info.config["vocab_size"]))
    if prompt is not None:
        found = oracle.tokenize(prompt)
        if not found:
            raise UsageError(
                "nothing to run", where="--prompt", expected="text of at least one id", got=repr(prompt)
            )
        return found
    count = tokens or DEFAULT_TOKENS
    room = int(oracle.info.config["context_length"])
    if count > room:
        raise UsageError("too long for the model", where="--tokens", expected=f"at most {room}", got=count)
    start = oracle.tokenize(prompts_for(model)[0])[:count]
    missing = count - len(start)
    if not missing:
        return start
    return start + list(oracle.generate(start, max_tokens=missing, ignore_eos=True).ids)


def parse_ids(text: str, vocab_size: int) -> list[int]:
    """Ids separated by commas or blanks, or those in the file named after an @.

    Raises:
        UsageError: an unreadable file, something that is not a number, an id outside the vocabulary, no ids.
    """
    where = "--ids"
    if text.startswith("@"):
        where = text[1:]
        try:
            text = Path(where).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            got = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UsageError("cannot read the ids", where=where, got=got) from error
    words = [word for word in re.split(r"[\s,\[\]]+", text) if word]
    for word in words:
        if not re.fullmatch(r"\d{1,10}", word):
            raise UsageError(
                "no token id", where=where, expected=f"0 to {vocab_size - 1}", got=repr(word[:40])
            )
    return checked_ids([int(word) for word in words], vocab_size, where)


def checked_ids(ids: Sequence[int], vocab_size: int, where: str) -> list[int]:
    """Check that the ids are in the model's vocabulary.

    Raises:
        UsageError: none, or one outside the vocabulary.
    """
    if not ids:
        raise UsageError("no token ids", where=where, expected="at least one", got="none")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UsageError("no token id", where=where, expected=f"0 to {vocab_size - 1}", got=token)
    return list(ids)
