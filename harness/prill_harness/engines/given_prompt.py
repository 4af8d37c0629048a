"""What a person should know about a prompt's ids and about the end of a generated text."""

from __future__ import annotations

from collections.abc import Sequence

from prill_harness.engines.base import Engine, Generation
from prill_runtime.models.assumptions import remarks
from prill_runtime.run.model import Model
from prill_runtime.tokenizer.load import Tokenizer


def about(engine: Engine, text: str, ids: Sequence[int]) -> tuple[str, ...]:
    """Remarks on the ids of a prompt; none for an engine whose tokenizer is not prill's."""
    tokenizer = _tokenizer(engine)
    return () if tokenizer is None else remarks(tokenizer, text, ids)


def ended_by(engine: Engine, made: Generation) -> dict[str, int | str] | None:
    """The token that ended a text and what makes it an end; None if no token did, or none is known."""
    tokenizer = _tokenizer(engine)
    if made.end_id is None or tokenizer is None:
        return None
    by = tokenizer.vocabulary.ends.get(made.end_id, "")
    return {"id": made.end_id, "text": tokenizer.name(made.end_id), "by": by}


def _tokenizer(engine: Engine) -> Tokenizer | None:
    model = getattr(engine, "model", None)
    return model.tokenizer if isinstance(model, Model) else None
