"""The planted faults of requests and of text, for the checks that must not pass over them."""

from __future__ import annotations

from .planted import Patch, breaks
from .planted_cost import FAULTS, planted

__all__ = ["FAULTS"]


@breaks("requests.features")
def second_stop_ignored(patch: Patch) -> None:
    planted(patch, "second_stop_ignored")


@breaks("requests.logprobs")
def logprob_after_penalty(patch: Patch) -> None:
    planted(patch, "logprob_after_penalty")


@breaks("requests.stops")
def stop_tail_shown(patch: Patch) -> None:
    planted(patch, "stop_tail_shown")


@breaks("tokenizer.decoding")
def incomplete_end_dropped(patch: Patch) -> None:
    planted(patch, "incomplete_end_dropped")


@breaks("tokenizer.pre_tokenizers")
def digits_in_fours(patch: Patch) -> None:
    planted(patch, "digits_in_fours")


@breaks("tokenizer.drawn")
def ties_to_the_right(patch: Patch) -> None:
    planted(patch, "ties_to_the_right")
