"""A golden comes in; a request in which the model ends its text goes out, for any model that can end one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.checks import Observer
from prill_harness.engines.base import Engine
from prill_harness.golden import Golden
from prill_runtime.errors import Inconclusive
from prill_runtime.philox import philox_uniform
from prill_runtime.sampler import SamplingParams, filtered_distribution
from prill_suites.common import embedded

HOT = 50.0  # temperature at which a distribution is almost flat


def ending(observe: Observer, engine: Engine, golden: Golden) -> tuple[list[int], int, dict[str, Any]]:
    """A request in which the model ends its text: prompt, how many tokens before the end, sampling.

    Raises:
        Inconclusive: the model never ended a text.
    """
    for prompt in golden.prompts:
        if prompt.first_eos is not None:
            # Begin close to the end, so that a long text is prefilled rather than decoded.
            start = max(0, prompt.first_eos - 5)
            return [*prompt.ids, *prompt.tokens[:start]], prompt.first_eos - start, {}
    ends = embedded(engine).tokenizer.eog_ids
    for prompt in golden.prompts:
        ids = list(prompt.ids)
        arguments = hot_end(engine.logits(ids)[-1], ends, len(ids))
        drawn = engine.generate(ids, max_tokens=4, ignore_eos=True, **arguments)
        observe.expect(
            drawn.finish_reason == "length",
            f"told to ignore the end of text, the engine ended after {len(drawn.ids)} of 4 tokens "
            f"with {drawn.finish_reason!r}",
        )
        if drawn.ids[0] in ends:
            return ids, 0, arguments
        # Two ids about as probable change places when the row that is drawn from is rounded in another way.
    raise Inconclusive(
        "the engine's sampler does not draw the end of text where its logits say so",
        where=f"{len(golden.prompts)} prompts",
    )


def hot_end(row: NDArray[np.floating], ends: Collection[int], position: int) -> dict[str, Any]:
    """Sampling arguments under which an end-of-text id is drawn at `position` from logits (vocab,).

    So hot a distribution is almost flat: one seed in twice `vocab` draws any given id from the middle half
    of its share: where the row that is drawn from is rounded in another way, that does not reach so far.

    Raises:
        Inconclusive: the model has no end-of-text id, or no seed draws one.
    """
    ids, probabilities = filtered_distribution(row, SamplingParams(temperature=HOT))
    places = np.flatnonzero(np.isin(ids, list(ends)))
    if not len(places):
        raise Inconclusive("no end-of-text id of the model has a finite logit")
    mass = np.cumsum(probabilities)
    place = int(places[0])
    low, high = (float(mass[place - 1]) if place else 0.0), float(mass[place])
    for seed in range(40 * len(ids)):
        if abs(philox_uniform(seed, position) * mass[-1] - (low + high) / 2) < (high - low) / 4:
            return {"temperature": HOT, "seed": seed}
    raise Inconclusive("no seed draws the end of text", expected=f"one in {len(ids)}", got=40 * len(ids))
