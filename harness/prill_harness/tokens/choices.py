"""Which part of an engine is wrong when its own logits do not explain a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from prill_harness.engines.base import Capability, Engine
from prill_runtime.sampling.sampler import SamplingParams

Part = Literal["batch", "chance", "cache", "sampler"]
SAID: dict[Part, str] = {
    "batch": "alone, its prompt gives the expected token: the batch",
    "chance": "asked again, it gives the expected token: it does not reproduce itself",
    "cache": "begun anew at that token, it gives the expected one: what it kept of the tokens before",
    "sampler": "the sampler",
}


def culprit(
    engine: Engine, ids: Sequence[int], tokens: Sequence[int], at: int, params: SamplingParams
) -> Part:
    """Ask for the wrong token again, with less of the engine involved each time.

    Args:
        ids, tokens: the prompt and what is expected after it; `at` is the first wrong token, generated in a
            batch with other prompts if the engine can batch.
        params: how the request draws.

    Raises:
        EngineError: the engine fails.
    """

    def written(prompt: Sequence[int], count: int) -> list[int]:
        return list(engine.generate(prompt, max_tokens=count, ignore_eos=True, **asdict(params)).ids)

    if written(ids, at + 1)[: at + 1] == list(tokens[: at + 1]):
        return "batch" if Capability.BATCH in engine.info.capabilities else "chance"
    if written([*ids, *tokens[:at]], 1)[:1] == [tokens[at]]:
        return "cache"
    return "sampler"
