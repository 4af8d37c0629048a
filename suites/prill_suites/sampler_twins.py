"""The sampler again in plain Python: Philox from the paper's definition, filters one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

MASK = 0xFFFFFFFF


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words from a counter of four and a key of two."""
    words, keys = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (right >> 32) ^ words[1] ^ keys[0],
            right & MASK,
            (left >> 32) ^ words[3] ^ keys[1],
            left & MASK,
        ]
        keys = [(keys[0] + 0x9E3779B9) & MASK, (keys[1] + 0xBB67AE85) & MASK]
    return words


def uniform(seed: int, position: int) -> float:
    """The upper 27 and 26 bits of the first two words, as a fraction of 2^53."""
    words = philox([position & MASK, position >> 32, 0, 0], [seed & MASK, seed >> 32])
    return (words[0] >> 5 << 26 | words[1] >> 6) / 2**53


def distribution(
    logits: Sequence[float],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    history: Sequence[int] = (),
) -> tuple[list[int], list[float]]:
    """Ids that may be drawn, most probable first and lowest id first on ties, and their probabilities."""
    values = [float(v) for v in logits]
    for i in set(history):
        values[i] = values[i] / repetition_penalty if values[i] > 0 else values[i] * repetition_penalty
    ids = sorted((i for i, v in enumerate(values) if v > -math.inf), key=lambda i: (-values[i], i))
    if temperature == 0:
        return ids[:1], [1.0]
    if top_k > 0:
        ids = ids[:top_k]
    weights = [math.exp((values[i] - values[ids[0]]) / temperature) for i in ids]
    if top_p < 1:
        wanted, mass, kept = top_p * math.fsum(weights), 0.0, 0
        while kept == 0 or (mass < wanted and kept < len(ids)):
            mass += weights[kept]
            kept += 1
        ids, weights = ids[:kept], weights[:kept]
    ids = [i for i, w in zip(ids, weights, strict=True) if w >= min_p * weights[0]]
    total = math.fsum(weights[: len(ids)])
    return ids, [w / total for w in weights[: len(ids)]]


def draw(ids: Sequence[int], probabilities: Sequence[float], fraction: float) -> int:
    """The id whose stretch of the cumulative distribution holds the fraction (0 to 1)."""
    mass = 0.0
    for i, p in zip(ids, probabilities, strict=True):
        mass += p
        if fraction < mass:
            return i
    return ids[-1]
