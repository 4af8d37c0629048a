"""Small bugs that show only beside other requests, in a crowd or after a cancelled one, and two of the
judge's: for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

import prill_harness.tokens.golden
from prill_harness.engines.embedded import NumPy
from prill_harness.numbers import compare
from prill_harness.run import gather
from prill_runtime.ops.numpy import NumpyBackend

from .planted import Patch, breaks, wrap
from .planted_judges import FAULTS

__all__ = ["FAULTS"]  # those of `planted` and these


@breaks("properties.switching", "cache.cleared_between_requests")
def models_share_state(patch: Patch) -> None:
    kept: list[int] = []

    def with_the_last_request(original: Any, self: Any, ids: Any) -> Any:
        before = kept[-8:] if max(kept, default=0) < self.info.config["vocab_size"] else []
        kept[:] = ids
        return original(self, [*before, *ids])[len(before) :]

    wrap(patch, NumPy, "logits", with_the_last_request)


@breaks("properties.batch")
def crowd_mixed(patch: Patch) -> None:
    wrap(patch, NumPy, "logits_batch", lambda o, s, batch: o(s, batch)[:: -1 if len(batch) > 16 else 1])


@breaks("properties.batch")
def crowd_decodes_a_neighbour(patch: Patch) -> None:
    def crossed(original: Any, self: Any, prompts: Any, **named: Any) -> Any:
        texts = original(self, prompts, **named)
        moved = [
            replace(t, logprobs=(t.logprobs[0], *u.logprobs[1:]))
            for t, u in zip(texts, texts[::-1], strict=True)
        ]
        return moved if len(prompts) > 16 else texts

    wrap(patch, NumPy, "generate_batch", crossed)


@breaks("cache.cleared_after_cancel")
def cancelled_rows_kept(patch: Patch) -> None:
    kept: list[int] = []

    def after(original: Any, self: Any, ids: Any, **named: Any) -> Any:
        done = original(self, [*kept, *ids], **named)
        kept[:] = ids if done.finish_reason == "cancelled" else ()
        return done

    wrap(patch, NumPy, "generate", after)


@breaks("witness.logits", "witness.sensitivity")
def shared_attention_scale(patch: Patch) -> None:
    """In the oracle too: the code that both run."""
    wrap(patch, NumpyBackend, "attention", lambda o, s, *a, scale, **k: o(s, *a, scale=scale**2, **k))


@breaks("witness.floors")
def floors_of_coarse_arithmetic(patch: Patch) -> None:
    def louder(original: Any, spec: Any, *rest: Any) -> Any:
        golden = original(spec, *rest)
        floors = {name: replace(floor, nmse=50 * floor.nmse) for name, floor in golden.floors.items()}
        return msgspec.structs.replace(golden, floors=floors)

    wrap(patch, prill_harness.tokens.golden, "golden_for", louder)


@breaks("harness.gate")
def records_lost(patch: Patch) -> None:
    wrap(patch, gather, "gather", lambda o, *given: o(*given)[:-1])


@breaks("harness.specimens")
def beginnings_compared(patch: Patch) -> None:
    wrap(patch, compare, "squares", lambda o, a, b: o(a.ravel()[:64], b.ravel()[:64]))
