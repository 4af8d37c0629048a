"""Faults between the last norm and the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, description, node, op

LOGITS = ("logits",)


@fault(area="head", blames=LOGITS, needs=("tied",))
def head_not_tied() -> Iterator[Patch]:
    """A head that shares the embedding table is taken for one of its own, which nobody filled."""

    def head(original: Any, self: Any, p: Any, hidden: Any) -> Any:
        return p.tap("logits", p.ops.linear(hidden, np.zeros_like(p.weights["token_embd.weight"])))

    yield description(lambda network: replace(network, head=replace(network.head, tied=False)))
    yield node("Head", head)


@fault(area="head", blames=LOGITS, lacks=("tied",))
def head_tied_anyway() -> Iterator[Patch]:
    """The embedding table is used as the head although the file has a head of its own."""

    yield node("Head", lambda o, self, p, hidden: o(replace(self, name="token_embd"), p, hidden))


def _logits(changed: Callable[[Any], Any]) -> Patch:
    """Logits that went through `changed`."""

    def head(original: Any, self: Any, p: Any, hidden: Any) -> Any:
        made = original(self, replace(p, tap=lambda stage, x: x), hidden)
        return p.tap("logits", changed(made).astype(made.dtype))

    return node("Head", head)


@fault(area="head", blames=LOGITS, models=ONE)
def logits_scaled() -> Iterator[Patch]:
    """Logits are a hundredth too small, which changes no greedy token."""
    yield _logits(lambda logits: logits * 0.99)


@fault(area="head", blames=LOGITS, models=ONE)
def logits_capped() -> Iterator[Patch]:
    """Logits are softly capped at 30, as only another architecture does."""
    yield _logits(lambda logits: 30 * np.tanh(logits / 30))


@fault(area="head", blames=LOGITS, models=ONE)
def logits_in_half() -> Iterator[Patch]:
    """Logits are rounded to half precision."""
    yield _logits(lambda logits: logits.astype(np.float16))


@fault(area="head", blames=LOGITS, models=ONE)
def logits_of_next_id() -> Iterator[Patch]:
    """Every id has the logit of the next one."""
    yield _logits(lambda logits: np.roll(logits, -1, axis=-1))


@fault(area="head", blames=LOGITS, models=ONE)
def head_rows_cut() -> Iterator[Patch]:
    """The last 16 ids of the vocabulary are never computed."""

    def cut(logits: Any) -> Any:
        logits = logits.copy()
        logits[..., -16:] = 0
        return logits

    yield _logits(cut)


@fault(area="options", blames=LOGITS, needs=("logit_softcap",))
def logits_not_capped() -> Iterator[Patch]:
    """Logits are not held within their cap."""
    yield node("Head", lambda o, self, *given: o(replace(self, softcap=None), *given))


@fault(area="options", blames=("attn", *LOGITS), needs=("softcap", "logit_softcap"))
def caps_cut_off() -> Iterator[Patch]:
    """Scores and logits are cut off at their cap, where they bend towards it."""
    yield op("softcap", lambda o, self, x, cap: np.clip(x, -x.dtype.type(cap), x.dtype.type(cap)))
