"""Texts of a golden's model, as many and as long as checks ask for."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from prill_harness.tokens.golden import Golden

LONG = 300  # positions that the longest checks look at, where the context has them
FULL = 2048  # that they look at on a model so small that it takes no time
PRODUCTS = 500_000_000  # that such a model multiplies for them, at most
LATE_PROMPT = 1100  # ids behind which a text is late
LATE, TAIL = 256, 64  # positions before the late ones, and the last of them
FEWEST = 3


def context_of(golden: Golden) -> int:
    """Positions of the model: what a check may ask for at most."""
    return int(golden.config["context_length"])


def moves_freely(config: Mapping[str, object]) -> bool:
    """Whether all positions may move together and change nothing, in a model of this configuration: it
    rotates, and neither are late queries sharper nor has it other divisors for long texts."""
    return "rope_base" in config and "temperature" not in config and config.get("rope_scaling") != "longrope"


def reach_of(golden: Golden) -> int:
    """Positions that the longest checks look at: the whole context of a small model, LONG of any other."""
    c = golden.config
    width, ffn, heads = int(c["width"]), int(c["ffn"]), int(c["n_heads"]) * int(c["head_dim"])
    each = width * int(c["vocab_size"]) + int(c["n_layers"]) * width * (4 * heads + 3 * ffn)
    return min(context_of(golden), max(LONG, min(FULL, PRODUCTS // each)))


def late_from(golden: Golden) -> int:
    """The first position that counts as late."""
    return min(LATE, context_of(golden) // 2)


def late_spans(golden: Golden) -> list[range]:
    """The late positions in parts, each as long as all before it, and the last TAIL by themselves.

    A mistake at a few positions is not to be lost in the mean over two thousand.
    """
    first, end = late_from(golden), reach_of(golden)
    ends = [first]
    while 2 * ends[-1] < end - TAIL:
        ends.append(2 * ends[-1])
    return [range(a, b) for a, b in pairwise(sorted({*ends, max(first, end - TAIL), end}))]


def longest_of(golden: Golden) -> list[int]:
    """The text that reaches furthest, as many ids as the longest checks look at."""
    text, wanted = max(texts_of(golden), key=len), reach_of(golden)
    return (text * -(-wanted // len(text)))[:wanted]


def late_prompt(golden: Golden) -> list[int]:
    """A prompt behind which every token is late; empty where the longest checks do not look so far."""
    longest = longest_of(golden)
    return longest[:LATE_PROMPT] if len(longest) > LATE_PROMPT else []


def texts_of(golden: Golden) -> list[list[int]]:
    """Golden prompts with their continuations, realistic ids; repeated where the context holds more."""
    wanted = min(context_of(golden), LONG)
    texts = [[*prompt.ids, *prompt.tokens] for prompt in golden.prompts]
    texts = [text * -(-wanted // len(text)) if len(text) < wanted else text for text in texts]
    turned = (text[n:] + text[:n] for n in range(1, FEWEST + 1) for text in texts)
    return texts + [next(turned) for _ in range(FEWEST - len(texts))]
