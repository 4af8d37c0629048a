"""Planted faults of ops that only some architectures ask for, for the checks that must not pass over them."""

from __future__ import annotations

from functools import partial

from .planted_cost import planted
from .planted_requests import FAULTS

__all__ = ["FAULTS"]

SEEN = {
    "ties_to_highest_id": "route", "experts_shifted": "experts", "experts_weighted_by_rank": "mix",
    "clamp_of_gate_alone": "clamped", "one_sink_a_layer": "sinks", "scores_not_capped": "softcap",
    "window_off_by_one": "window", "short_divisors_for_all": "stretched", "silu_for_gelu": "activations",
    "late_queries_not_sharpened": "temper", "embedding_not_scaled": "scale",
    "branches_in_sequence": "branches", "branches_in_parallel": "branches",
}  # fmt: skip
FAULTS |= {name: (partial(planted, name=name), (f"options.{check}",)) for name, check in SEEN.items()}
