"""Compare a backend's draws with the twin's, on vocabularies at the borders of a kernel's blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.numbers.compare import largest, smallest
from prill_harness.run.checks import Observer
from prill_runtime.sampling.sampler import SamplingParams
from prill_suites import sampler_twins as twins
from prill_suites.ops_shapes import about
from prill_suites.sampler_rows import tied_logits

TWIN = "naive float64 twin"


def borderline(
    row: NDArray[np.float32], seed: int, position: int, history: list[int], setting: dict[str, Any]
) -> set[int]:
    """The ids that the twin draws, with the fraction and top-p's mass moved by what sums may be off."""
    found = set()
    for nudge in (0.0, -1e-11, 1e-11):
        top_p = setting.get("top_p", 1.0)
        named = setting | {"top_p": smallest(largest(top_p + nudge, 0.0), 1.0) if top_p < 1 else 1.0}
        ids, probabilities = twins.distribution(row.tolist(), history=history, **named)
        fraction = twins.uniform(seed, position)
        found |= {twins.draw(ids, probabilities, fraction + n) for n in (0.0, -1e-11, 1e-11)}
    return found


def draws_of_sizes(observe: Observer, draw: Callable[..., Any], settings: Sequence[dict[str, Any]]) -> None:
    """Hold draws from rows just shorter and just longer than what a block, a list or a chunk holds to the
    twin's, and draws that have to be the id on either side of such a border."""
    sizes = about(256, 512, 2048, 4096)
    for number, (size, setting) in enumerate(product(sizes, settings)):
        # Of one value, more ids tie than a list holds; in quarters, than a bin.
        row = np.zeros(size, np.float32) if number % 4 < 2 else tied_logits(size)
        expected = borderline(row, number, size, [size - 1], setting)
        got = int(draw(row, SamplingParams(**setting, seed=number), size, [size - 1]))
        observe.saw(1, oracle=TWIN)
        observe.expect(got in expected, f"{size} ids, {setting}: expected id {expected}, got {got}")
    for at in (0, *sizes):
        row = np.zeros(sizes[-1] + 1, np.float32)
        row[at] = 60
        got = int(draw(row, SamplingParams(1.0, seed=at), at))
        observe.saw(1, oracle="one id has all the mass")
        observe.expect(got == at, f"id {at} of {len(row)} has all the mass, got {got}")
    # Every filter divides equal ids anew, so that the draw begins late; it lands on either side of a border.
    both: dict[str, Any] = {"temperature": 1.0, "top_k": sizes[-1] + 2, "top_p": 0.9999}
    for at in sizes[-3:]:
        row = np.zeros(sizes[-1] + 3, np.float32)
        seed = next(seed for seed in count() if int(twins.uniform(seed, at) * (len(row) - 1)) == at)
        expected = borderline(row, seed, at, [], both)
        got = int(draw(row, SamplingParams(**both, seed=seed), at))
        observe.saw(1, oracle=TWIN)
        observe.expect(got in expected, f"a draw at id {at}, {both}: expected id {expected}, got {got}")
    observe.note(shapes={"sampler.vocabulary": sizes})
