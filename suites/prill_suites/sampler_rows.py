"""Rows of logits that are hard for a sampler, from a fixed seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8},
    {"temperature": 1.5, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
)
# Almost flat, so that a penalty on any id of the prompt moves what is drawn; and greedy.
PENALISED: tuple[dict[str, Any], ...] = (
    {"temperature": 3.0, "repetition_penalty": 4.0},
    {"temperature": 0.0, "repetition_penalty": 1.8},
)
SEED = 3


def tied_logits(size: int = 200) -> NDArray[np.float32]:
    """Random logits in quarters, so that many tie, around zero, some masked."""
    logits = np.round(np.random.default_rng(SEED).standard_normal(size) * 8).astype(np.float32)
    logits /= 4
    logits[::17] = -np.inf
    return logits


def hurting_rows() -> tuple[tuple[str, list[float]], ...]:
    """Logits of many shapes by name; none is NaN or +inf, one at least is finite."""
    inf, random = float("inf"), np.random.default_rng(SEED)
    spread = random.standard_normal(1000).astype(np.float32)
    masked = np.where(np.arange(333) % 3, -np.inf, random.standard_normal(333)).astype(np.float32)
    return (
        ("one id", [-3.0]),
        ("one id beside masks", [-inf, -inf, 5.0, -inf]),
        ("two ids, zeros of both signs", [-0.0, 0.0]),
        ("all below zero", [-1.0, -1.25, -4.0, -1.5]),
        ("flat over 33", [2.0] * 33),
        ("flat over 5000", [0.0] * 5000),
        ("in quarters", tied_logits(201).tolist()),
        ("two of three masked", masked.tolist()),
        ("spread", (spread * 4).tolist()),
        ("nearly equal", (1 + spread * 1e-6).tolist()),
        ("huge", (spread * np.float32(1e37)).tolist()),
        ("denormal", (spread * np.float32(1e-40)).tolist()),
        ("one far above", [80.0, *spread.tolist()]),
    )
