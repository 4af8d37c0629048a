"""The second reading: logits that Hugging Face transformers computes from a file.

Transformers supplies a forward pass that is not prill's. Its own GGUF reader is not used: it silently drops
what it has no name for (a window, biases, frequency factors), which would then be blamed on the oracle.
Configuration and weights, dequantised by `gguf`, are passed in here; what its models cannot express is
refused by name.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.records.names import look_up
from prill_harness.witness.reading import Reading
from prill_runtime.errors import Inconclusive, UsageError

Floats = NDArray[np.float64]
NAMES = ("hf",)
SECOND_VARIABLE = "PRILL_SECOND"  # set by --second, so that every cell sees it
MOST_PARAMETERS = 1 << 28  # parameters of a model that is built in float64: 2 GiB


def ask(name: str) -> None:
    """Have every cell started from now on judge the oracle by a second reading.

    Raises:
        UsageError: no such reading, or its packages are not installed.
    """
    look_up(name, NAMES, "no such second reading", where="--second")
    missing = [package for package in ("torch", "transformers") if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            "the second reading needs packages that are not installed",
            where="--second",
            expected="torch and transformers",
            got=f"no {' and no '.join(missing)}",
            hint="pip install 'prill[hf]'",
        )
    os.environ[SECOND_VARIABLE] = name


def asked() -> str:
    """The second reading asked for; empty if none was."""
    return os.environ.get(SECOND_VARIABLE, "")


def knows(reading: Reading) -> bool:
    """Whether transformers has a model for the architecture."""
    return reading.architecture in MODELS


def parameters(reading: Reading) -> int:
    """Number of values in all tensors of a file."""
    return sum(int(np.prod(tensor.shape)) for tensor in reading.tensors.values())


def logits(reading: Reading, ids: Sequence[int]) -> Floats:
    """Row i predicts the token after ids[i]: (len(ids), vocabulary). Its norms and softmax are float32.

    Raises:
        Inconclusive: transformers has no model for the architecture, or lacks something the file declares.
    """
    if not knows(reading):
        raise Inconclusive(
            "no model of transformers stands for the architecture",
            expected=" or ".join(MODELS),
            got=reading.architecture,
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    try:
        model, names = MODELS[reading.architecture](reading)
    except Inconclusive:
        raise
    except Exception as error:  # its validators raise all kinds of errors
        said = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise Inconclusive("transformers refuses the model", got=said[0].strip()) from error
    state = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in names.items()}
    model = model.double().eval()
    lost, unknown = model.load_state_dict(state, strict=False)
    if unknown or [name for name in lost if not name.endswith("attn.bias")]:  # a causal mask, not a weight
        raise Inconclusive(
            "transformers' model has other tensors than the file", got=", ".join([*lost, *unknown][:4])
        )
    with torch.no_grad():
        mask = torch.from_numpy(_mask(len(ids), int(reading.key("attention.sliding_window", 0))))
        out = model(torch.tensor([list(ids)]), attention_mask=mask, use_cache=False).logits[0]
    return np.asarray(out.numpy(), np.float64)


def _mask(n: int, window: int) -> Floats:
    """The attention mask to add to scores: (1, 1, n, n), −inf where a query does not see a key."""
    query, key = np.arange(n)[:, None], np.arange(n)
    seen = (key <= query) & (key > query - (window or n))
    return np.where(seen, 0.0, np.finfo(np.float64).min)[None, None]


def _llama(r: Reading) -> tuple[Any, dict[str, Floats]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    if r.rope_size != r.head_size:
        raise Inconclusive(
            "transformers' Llama rotates whole heads", expected=r.head_size, got=f"{r.rope_size} components"
        )
    heads, base = int(r.key("attention.head_count")), float(r.key("rope.freq_base", 10000.0))
    config = LlamaConfig(
        vocab_size=r.count("token_embd.weight"),
        hidden_size=int(r.key("embedding_length")),
        intermediate_size=r.count("blk.0.ffn_up.weight"),
        num_hidden_layers=int(r.key("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=r.groups,
        head_dim=r.head_size,
        rms_norm_eps=float(r.key("attention.layer_norm_rms_epsilon")),
        max_position_embeddings=int(r.key("context_length")),
        attention_bias=any(r.has(f"blk.0.attn_{name}.bias") for name in ("q", "k", "v", "output")),
        mlp_bias=any(r.has(f"blk.0.ffn_{name}.bias") for name in ("gate", "up", "down")),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    model.model.rotary_emb.inv_freq = _frequencies(r, base)
    state = {
        "model.embed_tokens.weight": r.all("token_embd.weight"),
        "model.norm.weight": r.all("output_norm.weight"),
        "lm_head.weight": r.all("output.weight" if r.has("output.weight") else "token_embd.weight"),
    }
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LLAMA.items():
            for part in ("weight", "bias"):
                name, target = f"blk.{layer}.{ours}.{part}", f"model.layers.{layer}.{theirs}.{part}"
                pairs = {"attn_q": heads, "attn_k": r.groups}.get(ours)
                if r.has(name):
                    state[target] = _halves(r.all(name), pairs) if pairs else r.all(name)
                elif part == "bias" and getattr(config, BIASES.get(theirs.split(".")[0], ""), False):
                    state[target] = np.zeros(r.count(f"blk.{layer}.{ours}.weight"))
    return model, state


LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
BIASES = {"self_attn": "attention_bias", "mlp": "mlp_bias"}


def _halves(rows: Floats, heads: int) -> Floats:
    """Reorder rows of a query or key matrix from adjacent pairs to half-split pairs, head by head."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def _frequencies(r: Reading, base: float) -> Any:
    """Radians per position, by pair; transformers lacks scaling without a type, and a file's factors."""
    import torch

    bare = float(r.key("rope.scale_linear", 1.0))
    kind = r.key("rope.scaling.type", "none" if bare == 1.0 else "linear")
    if kind not in ("none", "linear"):
        raise Inconclusive("a scaling of rope that is not handed to transformers", got=str(kind))
    factor = float(r.key("rope.scaling.factor", bare)) if kind == "linear" else 1.0
    speeds = np.float64(base) ** (-np.arange(0, r.rope_size, 2) / r.rope_size) / factor
    if r.has("rope_freqs.weight"):
        speeds = speeds / r.all("rope_freqs.weight")
    return torch.from_numpy(speeds)


def _gpt2(r: Reading) -> tuple[Any, dict[str, Floats]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=r.count("token_embd.weight"),
        n_positions=r.count("position_embd.weight"),
        n_embd=int(r.key("embedding_length")),
        n_layer=int(r.key("block_count")),
        n_head=int(r.key("attention.head_count")),
        n_inner=r.count("blk.0.ffn_up.weight"),
        layer_norm_epsilon=float(r.key("attention.layer_norm_epsilon")),
        activation_function="gelu_new",
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    state = {
        "transformer.wte.weight": r.all("token_embd.weight"),
        "transformer.wpe.weight": r.all("position_embd.weight"),
        "transformer.ln_f.weight": r.all("output_norm.weight"),
        "transformer.ln_f.bias": r.all("output_norm.bias"),
        "lm_head.weight": r.all("output.weight" if r.has("output.weight") else "token_embd.weight"),
    }
    for layer in range(config.n_layer):
        for theirs, ours in GPT2.items():
            for part in ("weight", "bias"):
                values = r.all(f"blk.{layer}.{ours}.{part}")
                state[f"transformer.h.{layer}.{theirs}.{part}"] = values.T  # its matrices are (in, out)
    return GPT2LMHeadModel(config), state


GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}

MODELS: dict[str, Callable[[Reading], tuple[Any, dict[str, Floats]]]] = {"llama": _llama, "gpt2": _gpt2}
"""By `general.architecture`."""
