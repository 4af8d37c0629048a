"""A reading of a file comes in; transformers' model of its architecture goes out, with the file's weights.

Its configuration and weights come from the file alone. Every tensor of the file has to find its place in the
model, and every one of the model its values in the file: what transformers has no name for is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from prill_harness.witness.reading import Float, Reading
from prill_runtime.errors import Inconclusive

# Module of a layer in transformers -> tensor of a block in the file.
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn": "attn_sinks",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up", "mlp.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp",
    "post_attention_layernorm": "ffn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
# Module outside the layers -> tensor of the file.
OUTER = {
    "embed_tokens": "token_embd", "embed_in": "token_embd", "wte": "token_embd", "wpe": "position_embd",
    "norm": "output_norm", "final_layer_norm": "output_norm", "ln_f": "output_norm", "lm_head": "output",
    "embed_out": "output",
}  # fmt: skip
LAYER = re.compile(r"\w+\.(?:layers|h)\.(\d+)\.(.+)\.(\w+)$")
POST_NORM = ("gemma2", "gemma3", "gpt-oss")  # what follows attention is called post_attention_norm there
NEIGHBOURS = ("llama", "mistral3")  # the file's rows of q and k have a pair's halves side by side
DIVISORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
BESIDE = {DIVISORS, LONG, SHORT}  # tensors of a file that are no weights in transformers
Settings = dict[str, Any]


class Family(NamedTuple):
    """How transformers calls a family, and what it wants to know that not every family has.

    Attributes:
        prefix: of its classes. partial: whether it can rotate a part of each head.
    """

    prefix: str
    settings: Callable[[Reading], Settings]
    partial: bool = False


def present(r: Reading) -> list[str]:
    """The tensors of a file that belong to its layers, as many as it says that it has, or to none."""
    layers = int(r.key("block_count"))
    return [
        name
        for name in r.tensors
        if r.has(name) and not (name[:4] == "blk." and int(name.split(".")[1]) >= layers)
    ]


def build(r: Reading) -> Any:
    """The model in float64.

    Raises:
        Inconclusive: it has no place for a tensor of the file, or lacks something that the file declares.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    family = FAMILIES[r.architecture]
    if r.rope_size != r.head_size and not family.partial:
        raise Inconclusive(
            f"transformers' {family.prefix} rotates whole heads",
            expected=r.head_size,
            got=f"{r.rope_size} components",
        )
    head = "LMHeadModel" if family.prefix == "GPT2" else "ForCausalLM"
    text = "Text" if family.prefix == "Gemma3" else ""
    config = getattr(transformers, f"{family.prefix}{text}Config")(**{**_common(r), **family.settings(r)})
    model = getattr(transformers, f"{family.prefix}{head}")(config)
    state, used = {}, set[str]()
    for name, parameter in model.named_parameters():
        values, taken = _values(r, name, tuple(parameter.shape))
        state[name], used = torch.from_numpy(np.ascontiguousarray(values)), used | taken
    if left := set(present(r)) - used - BESIDE:
        raise Inconclusive(
            "transformers' model has other tensors than the file", got=", ".join(sorted(left)[:4])
        )
    model = model.double().eval()
    model.load_state_dict(state, strict=False)
    rotary: Any = getattr(model.base_model, "rotary_emb", None)
    if r.has(DIVISORS):
        rotary.inv_freq = rotary.inv_freq.double() / torch.from_numpy(r.all(DIVISORS))
    if _kind(r) == "yarn":
        rotary.attention_scaling *= float(r.key("rope.scaling.attn_factor", 1.0))
    return model


def _values(r: Reading, name: str, shape: tuple[int, ...]) -> tuple[Float, set[str]]:
    """The values of a parameter, and the tensors that they are of; a bias that the file lacks is zero."""
    found = LAYER.match(name)
    if not found:
        module, part = name.split(".")[-2:]
        tensor = f"{OUTER[module]}.{part}"
        tensor = "token_embd.weight" if tensor == "output.weight" and not r.has(tensor) else tensor
        return r.all(tensor) - _offset(r, module), {tensor}
    layer, module, part = found.groups()
    at = f"blk.{layer}."
    if module == "mlp.experts":
        return _experts(r, at, part)
    ours = NAMES[module]
    if module == "post_attention_layernorm" and r.architecture in POST_NORM:
        ours = "post_attention_norm"
    part = "weight" if part == "sinks" else part
    tensor = f"{at}{ours}.{part}"
    qkv = [f"{at}attn_{each}.{part}" for each in "qkv"]
    if ours == "attn_qkv" and not r.has(tensor) and r.has(qkv[0]):
        return np.concatenate([r.all(each) for each in qkv]), set(qkv)
    if tensor in qkv and not r.has(tensor) and r.has(f"{at}attn_qkv.{part}"):
        counts = [int(r.key("attention.head_count")), r.groups, r.groups]
        ends = np.cumsum(counts)[:2] * r.head_size
        return np.split(r.all(f"{at}attn_qkv.{part}"), ends)[qkv.index(tensor)], {f"{at}attn_qkv.{part}"}
    if part == "bias" and not r.has(tensor):
        return np.zeros(shape), set()
    return _laid(r, ours, r.all(tensor)) - _offset(r, module), {tensor}


def _offset(r: Reading, module: str) -> float:
    """The file's norms have what Gemma's code adds to them."""
    return float("norm" in module and r.architecture.startswith("gemma"))


def _laid(r: Reading, ours: str, values: Float) -> Float:
    """A tensor as transformers lays it."""
    heads = int(r.key("attention.head_count"))
    if r.architecture in NEIGHBOURS and ours in ("attn_q", "attn_k"):
        pairs = values.reshape(heads if ours == "attn_q" else r.groups, -1, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)
    if r.architecture == "gptneox" and ours == "attn_qkv":  # head by head, each with its q, k and v
        return values.reshape(3, heads, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)
    return values.T if r.architecture == "gpt2" and not ours.endswith("norm") else values


def _experts(r: Reading, at: str, name: str) -> tuple[Float, set[str]]:
    """Matrices of all experts; gpt-oss has them (expert, in, out), with gate and up in turn."""
    own, kind = r.architecture == "gpt-oss", "bias" if name.endswith("bias") else "weight"
    tensors = [f"{at}ffn_{each}_exps.{kind}" for each in (("down",) if "down" in name else ("gate", "up"))]
    parts = [r.all(tensor) for tensor in tensors]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    if own and len(parts) == 2:
        values = np.stack(parts, axis=2).reshape(values.shape)
    return values.swapaxes(1, 2) if own and kind == "weight" else values, set(tensors)


def _common(r: Reading) -> Settings:
    """What every configuration asks for; names that one does not know, it keeps and does not read."""
    eps = {"layer_norm_rms_epsilon": "rms_norm_eps", "layer_norm_epsilon": "layer_norm_eps"}
    stated = {theirs: float(r.key(f"attention.{ours}")) for ours, theirs in eps.items()
              if r.key(f"attention.{ours}") is not None}  # fmt: skip
    return {
        **stated, "vocab_size": r.count("token_embd.weight"), "hidden_size": int(r.key("embedding_length")),
        "intermediate_size": int(r.key("feed_forward_length")), "num_key_value_heads": r.groups,
        "num_hidden_layers": int(r.key("block_count")), "tie_word_embeddings": False,
        "num_attention_heads": int(r.key("attention.head_count")),
        "max_position_embeddings": int(r.key("context_length")),
        "attn_implementation": "eager", "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip


def _kind(r: Reading) -> str:
    """The scaling of rotary positions, as the format has it where the file is silent."""
    if r.has(LONG):
        return str(r.key("rope.scaling.type", "longrope"))
    bare = float(r.key("rope.scaling.factor", r.key("rope.scale_linear", 1.0)))
    return str(r.key("rope.scaling.type", "none" if bare == 1.0 else "linear"))


def _original(r: Reading) -> int:
    """Positions that the model was trained on, before its scaling."""
    return int(r.key("rope.scaling.original_context_length", r.key("context_length")))


def _rope(r: Reading, **more: Any) -> Settings:
    """`rope_parameters` of a configuration."""
    kind, base = _kind(r), float(r.key("rope.freq_base", 10000.0))
    theirs = {"none": "default", "linear": "linear", "yarn": "yarn", "longrope": "longrope"}
    if kind not in theirs or (kind == "longrope") != r.has(LONG):
        raise Inconclusive("a scaling of rope that is not handed to transformers", got=kind)
    said: Settings = {"rope_type": theirs[kind], "rope_theta": base, **more}
    if r.rope_size != r.head_size:
        said["partial_rotary_factor"] = r.rope_size / r.head_size
    if kind in ("linear", "yarn"):
        said["factor"] = float(r.key("rope.scaling.factor", r.key("rope.scale_linear", 1.0)))
    if kind in ("yarn", "longrope"):
        said["original_max_position_embeddings"] = _original(r)
    if kind == "yarn":
        said |= {f"beta_{each}": float(r.key(f"rope.scaling.yarn_beta_{each}", usual))
                 for each, usual in (("fast", 32.0), ("slow", 1.0))}  # fmt: skip
        if (shared := float(r.key("rope.scaling.yarn_log_multiplier", 0.0))) != 0:
            said |= {"mscale": 1.0, "mscale_all_dim": shared}
    if kind == "longrope":
        said |= {"attention_factor": float(r.key("rope.scaling.attn_factor", 1.0)),
                 "short_factor": r.all(SHORT).tolist(), "long_factor": r.all(LONG).tolist()}  # fmt: skip
    return said


def _modern(r: Reading, **more: Any) -> Settings:
    """What came after GPT-2: a rotation, heads of any size, biases where the file has them."""
    biased = {f"{theirs}_bias": any(r.has(f"blk.0.{ours}_{each}.bias") for each in parts)
              for theirs, ours, parts in (("attention", "attn", ("q", "k", "v", "output")),
                                          ("mlp", "ffn", ("gate", "up", "down")))}  # fmt: skip
    return {"rope_parameters": _rope(r), "head_dim": r.head_size, "sliding_window": None, **biased, **more}


def _gpt2(r: Reading) -> Settings:
    return {
        "n_embd": int(r.key("embedding_length")), "n_layer": int(r.key("block_count")),
        "n_head": int(r.key("attention.head_count")), "n_positions": r.count("position_embd.weight"),
        "n_inner": int(r.key("feed_forward_length")), "activation_function": "gelu_new",
        "layer_norm_epsilon": float(r.key("attention.layer_norm_epsilon")),
    }  # fmt: skip


def _gptneox(r: Reading) -> Settings:
    return {"rope_parameters": _rope(r), "use_parallel_residual": bool(r.key("use_parallel_residual"))}


def _mixture(r: Reading, **more: Any) -> Settings:
    """A mixture of experts in each layer."""
    ffn = int(r.key("expert_feed_forward_length", r.key("feed_forward_length")))
    return _modern(
        r, num_experts_per_tok=int(r.key("expert_used_count")), experts_implementation="eager", **more,
        **{"moe_intermediate_size" if r.architecture == "qwen3moe" else "intermediate_size": ffn},
    )  # fmt: skip


def _qwen3moe(r: Reading) -> Settings:
    count = int(r.key("expert_count"))
    return _mixture(r, num_experts=count, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])


def _gptoss(r: Reading) -> Settings:
    rope = _rope(r, truncate=False)
    window = int(r.key("attention.sliding_window"))
    return _mixture(
        r, num_local_experts=int(r.key("expert_count")), sliding_window=window, rope_parameters=rope
    )


def _phi3(r: Reading) -> Settings:
    window = int(r.key("attention.sliding_window", 0)) or None
    return _modern(r, sliding_window=window, original_max_position_embeddings=_original(r))


def _gemma(r: Reading, cap: float, scores: float, **more: Any) -> Settings:
    """Scores are scaled by the head, in the 27B by its share of the width; no key says it. cap, scores: of
    logits and of scores, where the file is silent."""
    heads, width = int(r.key("attention.head_count")), int(r.key("embedding_length"))
    large = (heads, r.head_size) == (32, 128)
    return _modern(
        r, query_pre_attn_scalar=width / heads if large else r.head_size,
        final_logit_softcapping=float(r.key("final_logit_softcapping", cap)) or None,
        attn_logit_softcapping=float(r.key("attn_logit_softcapping", scores)) or None, **more,
    )  # fmt: skip


def _gemma2(r: Reading) -> Settings:
    return _gemma(r, 30.0, 50.0, sliding_window=int(r.key("attention.sliding_window", 4096)))


def _gemma3(r: Reading) -> Settings:
    local = {"rope_type": "default", "rope_theta": float(r.key("rope.freq_base_swa", 10000.0))}
    rope = {"full_attention": _rope(r), "sliding_attention": local}
    window = int(r.key("attention.sliding_window"))
    return _gemma(r, 0.0, 0.0, sliding_window=window, rope_parameters=rope)


def _mistral3(r: Reading) -> Settings:
    beta = float(r.key("attention.temperature_scale", 0.0))
    rope = _rope(r, llama_4_scaling_beta=beta, original_max_position_embeddings=_original(r))
    return _modern(r, rope_parameters=rope)


FAMILIES = {
    "llama": Family("Llama", _modern), "gpt2": Family("GPT2", _gpt2), "qwen2": Family("Qwen2", _modern),
    "qwen3": Family("Qwen3", _modern), "qwen3moe": Family("Qwen3Moe", _qwen3moe),
    "phi3": Family("Phi3", _phi3, partial=True), "gemma2": Family("Gemma2", _gemma2),
    "gemma3": Family("Gemma3", _gemma3), "gptneox": Family("GPTNeoX", _gptneox, partial=True),
    "mistral3": Family("Ministral3", _mistral3), "gpt-oss": Family("GptOss", _gptoss),
}  # fmt: skip
"""By `general.architecture`."""
