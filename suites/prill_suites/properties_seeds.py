"""A trial and a sampled request in; whether another seed draws another token, where one can, out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prill_suites import sampler_twins as twin
from prill_suites.controls import Trial

SEEDS = 64
TRIED = 4
TWIN = "a second sampler in plain Python, on the float64 oracle's logits"


def another_seed(trial: Trial, prompt: Sequence[int], asked: dict[str, Any]) -> str:
    """Hold the engine to drawing another text under another seed; a clause.

    Whether seeds can differ on this model is for the twin to say, not for the engine, nor for the oracle,
    whose sampler is the engine's own.

    Args:
        asked: of `generate`, the seed left out.
    """
    observe, engine = trial.observe, trial.engine
    what = "seeds 1 and 2 give the same tokens"
    text = engine.generate(prompt, seed=1, **asked).ids
    if text != engine.generate(prompt, seed=2, **asked).ids:
        return "another"
    rows = trial.oracle.logits([*prompt, *text])[len(prompt) - 1 : -1]
    shares = [twin.distribution(row.tolist(), temperature=asked["temperature"]) for row in rows]

    def parts(seed: int) -> bool:
        draws = (twin.draw(*each, twin.uniform(seed, len(prompt) + n)) for n, each in enumerate(shares))
        return any(token != own for token, own in zip(draws, text, strict=True))

    seeds = [seed for seed in range(2, SEEDS + 1) if parts(seed)][:TRIED]
    observe.saw(len(text), oracle=TWIN)
    if not seeds:
        return trial.cannot_tell(what, 1, f"none of {SEEDS} seeds draws another", oracle=TWIN)
    others = {engine.generate(prompt, seed=seed, **asked).ids for seed in seeds}
    sentence = f"the control did not differ: {what}, as do {seeds}, under which the twin draws others"
    observe.expect(others != {text}, sentence)
    return f"another under seed {seeds[0]}"
