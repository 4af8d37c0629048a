"""The witness: a second, naive forward pass over the same file.

The witness judges the oracle, so it shares nothing with it: it imports nothing of the runtime, and computes
in float64 from the published descriptions (Llama: Touvron et al. 2023, with RoFormer's rotation on
neighbouring pairs, as llama.cpp's converter lays them out; GPT-2: Radford et al. 2019; the others from their
published configurations and papers). It is slow and plain on purpose: one sequence, no cache, one query at a
time, and what an architecture's name alone says stands in a branch on that name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import numpy as np

from prill_harness.witness.reading import Float, Reading, attention, embedded, head, linear, read, softmax
from prill_harness.witness.turning import rotated, rotation

__all__ = ["Float", "Reading", "knows", "linear", "logits", "read", "whose"]
GROUP = "prill.witnesses"  # entry points NAME = "module:function", the function a Forward
Forward = Callable[[Reading, Sequence[int]], Float]
Norm = Callable[[str, Float], Float]


def logits(reading: Reading, ids: Sequence[int]) -> Float:
    """Row i predicts the token after ids[i]: (len(ids), vocabulary), float64.

    Raises:
        KeyError: an architecture that the witness does not know (see `knows`), or a tensor that is absent.
        Exception: whatever an installed reading raises.
    """
    installed = _installed(reading.architecture)
    forward: Forward = installed.load() if installed else FORWARD[reading.architecture]
    return forward(reading, ids)


def knows(reading: Reading) -> bool:
    """Whether the witness can read the architecture."""
    return reading.architecture in FORWARD or _installed(reading.architecture) is not None


def whose(reading: Reading) -> str:
    """`module:function of PACKAGE VERSION` that reads the architecture; empty for those of this file."""
    found = _installed(reading.architecture)
    return f"{found.value} of {found.dist.name} {found.dist.version}" if found and found.dist else ""


@cache
def _installed(architecture: str) -> EntryPoint | None:
    """The reading that another package brings for an architecture that is not in FORWARD."""
    found = () if architecture in FORWARD else entry_points(group=GROUP, name=architecture)
    return next(iter(found), None)


def llama(r: Reading, ids: Sequence[int]) -> Float:
    """RMSNorm, rotation, grouped queries, SwiGLU; biases, window, frequency factors if the file has them."""
    heads, size, norm = r.key("attention.head_count"), r.head_size, _rms_norm(r)
    n, window = len(ids), int(r.key("attention.sliding_window", 0))
    cos, sin = rotation(r, n)
    x = embedded(r, "token_embd.weight", ids)
    for layer in range(r.key("block_count")):
        at = f"blk.{layer}."
        h = norm(f"{at}attn_norm", x)
        q = rotated(linear(r, f"{at}attn_q", h).reshape(n, heads, size), cos, sin)
        k = rotated(linear(r, f"{at}attn_k", h).reshape(n, r.groups, size), cos, sin)
        v = linear(r, f"{at}attn_v", h).reshape(n, r.groups, size)
        x = x + linear(r, f"{at}attn_output", attention(q, k, v, window))
        h = norm(f"{at}ffn_norm", x)
        gate = linear(r, f"{at}ffn_gate", h)
        x = x + linear(r, f"{at}ffn_down", gate * _sigmoid(gate) * linear(r, f"{at}ffn_up", h))
    return head(r, norm("output_norm", x))


def gpt2(r: Reading, ids: Sequence[int]) -> Float:
    """LayerNorm with bias, learned positions, fused query, key and value, GELU by tanh."""
    heads, size, n = r.key("attention.head_count"), r.head_size, len(ids)
    norm = _layer_norm(r)
    x = embedded(r, "token_embd.weight", ids) + r.rows("position_embd.weight", 0, n)
    for layer in range(r.key("block_count")):
        at = f"blk.{layer}."
        q, k, v = np.split(linear(r, f"{at}attn_qkv", norm(f"{at}attn_norm", x)), 3, axis=1)
        q, k, v = (part.reshape(n, heads, size) for part in (q, k, v))
        x = x + linear(r, f"{at}attn_output", attention(q, k, v))
        up = linear(r, f"{at}ffn_up", norm(f"{at}ffn_norm", x))
        x = x + linear(r, f"{at}ffn_down", _gelu(up))
    return head(r, norm("output_norm", x))


def gptneox(r: Reading, ids: Sequence[int]) -> Float:
    """LayerNorm with bias, partial rotation of halves, fused query, key and value, GELU by erf."""
    heads, size, n, norm = r.key("attention.head_count"), r.head_size, len(ids), _layer_norm(r)
    cos, sin = rotation(r, n)
    x = embedded(r, "token_embd.weight", ids)
    for layer in range(r.key("block_count")):
        at = f"blk.{layer}."
        q, k, v = np.split(linear(r, f"{at}attn_qkv", norm(f"{at}attn_norm", x)), 3, axis=1)
        q, k, v = (part.reshape(n, heads, size) for part in (q, k, v))
        mixed = attention(rotated(q, cos, sin, halves=True), rotated(k, cos, sin, halves=True), v)
        out = linear(r, f"{at}attn_output", mixed)
        up = linear(r, f"{at}ffn_up", norm(f"{at}ffn_norm", x if r.key("use_parallel_residual") else x + out))
        erf = np.array([math.erf(value / math.sqrt(2)) for value in up.ravel()]).reshape(up.shape)
        x = x + out + linear(r, f"{at}ffn_down", 0.5 * up * (1 + erf))
    return head(r, norm("output_norm", x))


def modern(r: Reading, ids: Sequence[int]) -> Float:
    """What came after Llama: norms per head and behind a branch, windows by layer, caps, sinks, experts."""
    name, heads, size, n = r.architecture, r.key("attention.head_count"), r.head_size, len(ids)
    gemma, width, norm = name.startswith("gemma"), r.key("embedding_length"), _rms_norm(r)
    large = gemma and (heads, size) == (32, 128)
    scale = 1 / math.sqrt(width / heads if large else size)
    cap = float(r.key("attn_logit_softcapping", 50.0 if name == "gemma2" else 0.0))
    x = embedded(r, "token_embd.weight", ids) * (math.sqrt(width) if gemma else 1.0)
    for layer in range(r.key("block_count")):
        at, q_norm, post = f"blk.{layer}.", f"blk.{layer}.attn_q_norm", f"blk.{layer}.post_attention_norm"
        local = layer % 6 != 5 if name == "gemma3" else layer % 2 == 0 or name == "phi3"
        h = norm(f"{at}attn_norm", x)
        q, k, v = _projected(r, at, h, heads)
        if r.has(f"{q_norm}.weight"):
            q, k = norm(q_norm, q), norm(f"{at}attn_k_norm", k)
        cos, sin = rotation(r, n, local=local)
        q, k = (rotated(part, cos, sin, halves=name != "mistral3") for part in (q, k))
        if beta := float(r.key("attention.temperature_scale", 0.0)):
            original = r.key("rope.scaling.original_context_length", r.key("context_length"))
            q = q * np.array([1 + beta * math.log(1 + t // original) for t in range(n)])[:, None, None]
        window = int(r.key("attention.sliding_window", 4096 if name == "gemma2" else 0)) if local else 0
        sinks = r.all(f"{at}attn_sinks.weight") if r.has(f"{at}attn_sinks.weight") else None
        out = linear(r, f"{at}attn_output", attention(q, k, v, window, scale=scale, cap=cap, sinks=sinks))
        x = x + (norm(post, out) if gemma else out)
        h = norm(post if name == "gpt-oss" else f"{at}ffn_norm", x)
        out = _experts(r, at, h) if r.has(f"{at}ffn_gate_inp.weight") else _dense(r, at, h, gemma)
        x = x + (norm(f"{at}post_ffw_norm", out) if gemma else out)
    out = head(r, norm("output_norm", x))
    cap = float(r.key("final_logit_softcapping", 30.0 if name == "gemma2" else 0.0))
    return np.asarray(cap * np.tanh(out / cap)) if cap else out


def _projected(r: Reading, at: str, h: Float, heads: int) -> list[Float]:
    """Queries, keys and values (n, heads, size), of one tensor or of three."""
    counts = [heads, r.groups, r.groups]
    if r.has(f"{at}attn_qkv.weight"):
        ends = np.cumsum(counts)[:2] * r.head_size
        parts = np.split(linear(r, f"{at}attn_qkv", h), ends, axis=1)
    else:
        parts = [linear(r, f"{at}attn_{part}", h) for part in "qkv"]
    return [part.reshape(len(h), count, r.head_size) for part, count in zip(parts, counts, strict=True)]


def _dense(r: Reading, at: str, h: Float, gemma: bool) -> Float:
    """A gated layer; without a gate of its own the first half of `ffn_up` is it."""
    up = linear(r, f"{at}ffn_up", h)
    if r.has(f"{at}ffn_gate.weight"):
        gate = linear(r, f"{at}ffn_gate", h)
    else:
        gate, up = np.split(up, 2, axis=1)
    return linear(r, f"{at}ffn_down", (_gelu(gate) if gemma else gate * _sigmoid(gate)) * up)


def _experts(r: Reading, at: str, h: Float) -> Float:
    """Row by row: the experts with the largest logits, lower ids first, by the softmax over these."""
    logits, out = linear(r, f"{at}ffn_gate_inp", h), np.zeros_like(h)

    def product(part: str, expert: int, x: Float) -> Float:
        y = r.rows(f"{at}ffn_{part}_exps.weight", expert, expert + 1)[0] @ r.moved(x)
        bias = f"{at}ffn_{part}_exps.bias"
        return np.asarray(y + r.all(bias)[expert] if r.has(bias) else y)

    for row, scores in enumerate(logits):
        chosen = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[: r.key("expert_used_count")]
        for expert, weight in zip(chosen, softmax(scores[chosen]), strict=True):
            gate, up = product("gate", expert, h[row]), product("up", expert, h[row])
            if r.architecture == "gpt-oss":
                gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
                act = gate * _sigmoid(1.702 * gate) * (up + 1)
            else:
                act = gate * _sigmoid(gate) * up
            out[row] += weight * product("down", expert, act)
    return out


def _rms_norm(r: Reading) -> Norm:
    eps = float(r.keys[f"{r.architecture}.attention.layer_norm_rms_epsilon"])

    def norm(name: str, x: Float) -> Float:
        x = r.moved(x)
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean + eps) * r.all(f"{name}.weight"))

    return norm


def _layer_norm(r: Reading) -> Norm:
    eps = float(r.keys[f"{r.architecture}.attention.layer_norm_epsilon"])

    def norm(name: str, x: Float) -> Float:
        x = r.moved(x)
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
        return np.asarray(centred / scale * r.all(f"{name}.weight") + r.all(f"{name}.bias"))

    return norm


def _gelu(x: Float) -> Float:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _sigmoid(x: Float) -> Float:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


MODERN = ("qwen2", "qwen3", "qwen3moe", "phi3", "gemma2", "gemma3", "mistral3", "gpt-oss")
FORWARD: dict[str, Forward] = {
    "llama": llama, "gpt2": gpt2, "gptneox": gptneox, **dict.fromkeys(MODERN, modern),
}  # fmt: skip
"""By `general.architecture`; others are installed, or the witness does not know them."""
