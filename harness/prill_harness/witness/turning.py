"""A file and a length come in; how far its rotary positions turn each pair, and rows so turned, come out.

A part of the witness: it imports nothing of the runtime.
"""

from __future__ import annotations

import math

import numpy as np

from prill_harness.witness.reading import Float, Reading


def rotation(r: Reading, n: int, *, local: bool = False) -> tuple[Float, Float]:
    """Cosine and sine of every position and pair: (n, dim / 2) each.

    Pair i turns by position / scale * base^(-2i / dim) / factor_i; only a scale of type linear counts, or one
    without a type (`rope.scale_linear`, an older key). `local`: in a layer with a window, where those have a
    base of their own and no scale.
    """
    dim, base = r.rope_size, float(r.key("rope.freq_base", 10000.0))
    bare = float(r.key("rope.scale_linear", 1.0))
    scale = float(r.key("rope.scaling.factor", bare))
    kind = r.key("rope.scaling.type", "none" if scale == 1.0 else "linear")
    if local and r.architecture == "gemma3":
        base, kind = float(r.key("rope.freq_base_swa", 10000.0)), "none"
    speed, grown = base ** (-2.0 * np.arange(dim // 2) / dim), 1.0
    original = int(r.key("rope.scaling.original_context_length", r.key("context_length")))
    if kind == "yarn":
        speed = _yarn(r, speed, base, scale, original)
        more = 0.1 * math.log(float(np.maximum(scale, 1.0)))
        grown = (more + 1) / (more * float(r.key("rope.scaling.yarn_log_multiplier", 0.0)) + 1)
        grown *= float(r.key("rope.scaling.attn_factor", 1.0))
    elif r.has("rope_factors_long.weight"):
        speed = speed / r.all(f"rope_factors_{'long' if n > original else 'short'}.weight")
        grown = float(r.key("rope.scaling.attn_factor", 1.0))
    elif kind == "linear":
        speed = speed / scale
    if r.has("rope_freqs.weight"):
        speed = speed / r.all("rope_freqs.weight")
    angle = np.arange(n)[:, None] * speed
    return np.cos(angle) * grown, np.sin(angle) * grown


def _yarn(r: Reading, speed: Float, base: float, factor: float, original: int) -> Float:
    """Peng et al. 2023: pairs that turn often are left, pairs that turn seldom are slowed, a ramp between.

    The pair that turns so many times over the original length is not whole; it is rounded, except in gpt-oss.
    """
    dim, turns = r.rope_size, (("fast", 32.0), ("slow", 1.0))
    low, high = (
        dim / 2 * math.log(original / (2 * math.pi * float(r.key(f"rope.scaling.yarn_beta_{name}", usual))))
        / math.log(base) for name, usual in turns
    )  # fmt: skip
    if r.architecture != "gpt-oss":
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = float(np.maximum(low, 0.0)), float(np.minimum(high, dim - 1.0))
    out = speed.copy()
    for i in range(len(speed)):
        slowed = float(np.clip((i - low) / (high - low if high > low else 0.001), 0.0, 1.0))
        out[i] = speed[i] * (1 - slowed) + speed[i] / factor * slowed
    return out


def rotated(x: Float, cos: Float, sin: Float, *, halves: bool = False) -> Float:
    """x (n, heads, size) turned: neighbours (2i, 2i + 1) or `halves` (i, i + pairs); the rest stays."""
    out, pairs = x.copy(), cos.shape[1]
    for i in range(pairs):
        one, two = (i, i + pairs) if halves else (2 * i, 2 * i + 1)
        a, b, c, s = x[..., one], x[..., two], cos[:, i, None], sin[:, i, None]
        out[..., one], out[..., two] = a * c - b * s, a * s + b * c
    return out
