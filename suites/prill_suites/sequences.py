"""A golden comes in; texts of its model, as many and as long as the checks ask for, go out."""

from __future__ import annotations

from prill_harness.golden import Golden

LONG = 300  # positions that the longest checks look at, where the context has them
FEWEST = 3


def context_of(golden: Golden) -> int:
    """Positions of the model: what a check may ask for at most."""
    return int(golden.config["context_length"])


def texts_of(golden: Golden) -> list[list[int]]:
    """Golden prompts with their continuations, realistic ids; repeated where the context holds more."""
    wanted = min(context_of(golden), LONG)
    texts = [[*prompt.ids, *prompt.tokens] for prompt in golden.prompts]
    texts = [text * -(-wanted // len(text)) if len(text) < wanted else text for text in texts]
    turned = (text[n:] + text[:n] for n in range(1, FEWEST + 1) for text in texts)
    return texts + [next(turned) for _ in range(FEWEST - len(texts))]
