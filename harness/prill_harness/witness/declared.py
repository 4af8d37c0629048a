"""The configuration that a GGUF file declares, read independently of the runtime."""

from __future__ import annotations

from typing import Any

from prill_runtime.gguf.file import GGUFFile

Value = int | float | str | bool

# Metadata key below the architecture's prefix -> configuration name.
KEYS = {
    "block_count": "n_layers",
    "embedding_length": "width",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "ffn",
    "context_length": "context_length",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.layer_norm_epsilon": "norm_eps",
    "rope.freq_base": "rope_base",
    "rope.dimension_count": "rope_dim",
    "rope.scaling.type": "rope_scaling",
    "rope.scaling.factor": "rope_factor",
    "rope.freq_base_swa": "rope_base_local",
    "attention.sliding_window": "window",
    "attention.temperature_scale": "temperature",
    "expert_count": "n_experts",
    "expert_used_count": "n_experts_used",
    "expert_feed_forward_length": "expert_ffn",
}
# Architectures with rotary positions; the format's rules say what holds if the file is silent.
_TURNED: dict[str, Value] = {"rope_base": 10000.0, "rope_scaling": "none"}
ROTARY: dict[str, dict[str, Value]] = {
    "llama": _TURNED, "qwen2": _TURNED, "qwen3": _TURNED, "qwen3moe": _TURNED, "phi3": _TURNED,
    "gemma2": {**_TURNED, "window": 4096}, "gemma3": {**_TURNED, "rope_base_local": 10000.0},
    "gptneox": _TURNED, "mistral3": _TURNED, "gpt-oss": _TURNED,
}  # fmt: skip
MIXTURES = ("qwen3moe", "gpt-oss")  # every layer is one: the size of a dense layer says nothing


def declared(file: GGUFFile) -> dict[str, Value]:
    """Every configuration value that the file states or that its format's defaults and tensors imply."""
    prefix = f"{file.architecture}."
    stated = {KEYS[key.removeprefix(prefix)]: _single(value) for key, value in file.metadata.items()
              if key.startswith(prefix) and key.removeprefix(prefix) in KEYS}  # fmt: skip
    out: dict[str, Value] = {"architecture": file.architecture, **ROTARY.get(file.architecture, {}), **stated}
    out.setdefault("n_kv_heads", out["n_heads"])
    out.setdefault("head_dim", int(out["width"]) // int(out["n_heads"]))
    if file.architecture in ROTARY:
        out.setdefault("rope_dim", out["head_dim"])
        out |= _scaling(stated, file.metadata.get(f"{prefix}rope.scale_linear"))
        if "rope_factors_long.weight" in file.tensors:
            out["rope_scaling"] = stated.get("rope_scaling", "longrope")
    own = out.pop("expert_ffn", None)
    if file.architecture not in MIXTURES:  # a count of none may be there
        out = {name: value for name, value in out.items() if not name.startswith("n_experts")}
    elif own is not None:
        out["ffn"] = own
    for none in ("window", "temperature"):
        if out.get(none) == 0:
            del out[none]
    out["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    out["tied_head"] = "output.weight" not in file.tensors
    return out


def _scaling(stated: dict[str, Value], older: Any) -> dict[str, Value]:
    """Kind and factor of rotary scaling: a factor alone means linear; with kind "none" there is no factor."""
    factor = stated.get("rope_factor", None if older is None else _single(older))
    if factor is None:
        return {}
    kind = stated.get("rope_scaling", "none" if factor == 1.0 else "linear")
    return {"rope_scaling": kind, "rope_factor": 1.0 if kind == "none" else factor}


def same(expected: Value, got: Value) -> bool:
    """Whether values are equal: numbers to float32's precision, others exactly; no number equals a bool."""
    if (
        isinstance(expected, bool)
        or isinstance(got, bool)
        or isinstance(expected, str)
        or isinstance(got, str)
    ):
        return type(expected) is type(got) and expected == got
    return abs(expected - got) <= 2.0**-23 * abs(expected)


def _single(value: Any) -> Value:
    """The value, or the first of a per-layer array whose entries are all equal."""
    if isinstance(value, list) or hasattr(value, "tolist"):
        values = list(value)
        return values[0] if values and all(v == values[0] for v in values) else str(values)
    return value  # type: ignore[no-any-return]
