"""prill's names for the stages as llama.cpp and transformers call them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

# Every kind of stage that prill names; the nodes of a model say what each is computed from.
KINDS = (
    "attn_norm", "q", "k", "v", "q_norm", "k_norm", "q_rope", "k_rope", "attn", "attn_out", "post_attn_norm",
    "ffn_in", "ffn_norm", "gate", "up", "act", "down", "post_ffn_norm",
    "router", "routed", "expert_gate", "expert_up", "expert_act", "expert_down", "experts", "out",
)  # fmt: skip
OUTER = ("embed", "output_norm", "logits")

# What llama.cpp's eval callback prints before `-N` (src/models/{llama,gpt2}.cpp, src/llama-graph.cpp).
FUSED = "qkv"
_LLAMA_CPP = {
    "inp_embd": "embed", "embd": "embed", "inpL": "embed", "attn_norm": "attn_norm", "Qcur": "q", "Kcur": "k",
    "Vcur": "v", "Qcur_rope": "q_rope", "Kcur_rope": "k_rope", "wqkv_b": FUSED, "bqkv": FUSED,
    "kqv_out": "attn", "kqv_merged_cont": "attn", "attn_out": "attn_out", "ffn_inp": "ffn_in",
    "ffn_norm": "ffn_norm", "ffn_gate": "gate", "ffn_gate_b": "gate", "ffn_up": "up", "ffn_up_b": "up",
    "ffn_swiglu": "act", "ffn_gelu": "act", "ffn_gate_par": "act", "ffn_out": "down", "l_out": "out",
    "Qcur_normed": "q_norm", "Kcur_normed": "k_norm", "attn_post_norm": "post_attn_norm", "sa_out": "ffn_in",
    "ffn_post_norm": "post_ffn_norm", "ffn_moe_logits": "router", "ffn_moe_logits_biased": "router",
    "ffn_moe_out": "experts",
    "result_norm": "output_norm", "result_output": "logits",
}  # fmt: skip
# The array before the bias, the weight or the learned positions, and the one after: the stage is the second.
_WHOLE = {"inp_embd": "inpL", "embd": "inpL", "ffn_up": "ffn_up_b", "ffn_gate": "ffn_gate_b",
          "ffn_moe_logits": "ffn_moe_logits_biased", "norm": "result_norm"}  # fmt: skip
# What llama.cpp names differently in one architecture than in the next, or not at all, has a known parameter.
_PARAMETERS = {"attn_output": "attn_out", "ffn_gate_inp": "router"}
_PARAMETER = re.compile(rf"blk\.(\d+)\.({'|'.join(_PARAMETERS)})\.(?:weight|bias)")
_COMPUTED = re.compile(r"(.+) = (\w+)\((.*)\)", re.DOTALL)
_SUMS = {"embed", "ffn_in", "out", "experts"}  # kinds that add no bias but one stage to another
_ROTATED = {"Qcur": "q_rope", "Kcur": "k_rope"}
# Until 2024 `kqv_out` was the projection's result, and its input had a name of its own.
_OLD_ATTENTION = "kqv_merged_cont"
# Where neither of these is there, the norm behind attention is the one before the feed-forward layer.
_OTHER_NORMS = ("ffn_norm", "ffn_post_norm")
# Paths of transformers' modules below the block, for the arrays they return; `.input` for their input.
_TRANSFORMERS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "q", "self_attn.k_proj": "k",
    "self_attn.v_proj": "v", "self_attn.o_proj.input": "attn", "self_attn.o_proj": "attn_out",
    "self_attn": "attn_out", "post_attention_layernorm.input": "ffn_in",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "gate", "mlp.up_proj": "up",
    "mlp.down_proj.input": "act", "mlp.down_proj": "down",
    "ln_1": "attn_norm", "attn.c_attn": FUSED, "attn.c_proj.input": "attn", "attn.c_proj": "attn_out",
    "attn": "attn_out", "ln_2.input": "ffn_in", "ln_2": "ffn_norm", "mlp.c_fc": "up", "mlp.act": "act",
    "mlp.c_proj.input": "act", "mlp.c_proj": "down", "mlp": "down", "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm", "pre_feedforward_layernorm.input": "ffn_in",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffn_norm",
    "attention.dense.input": "attn", "attention.dense": "attn_out", "attention": "attn_out",
    "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h.input": "act", "mlp.dense_4h_to_h": "down",
}  # fmt: skip
# Where there is a norm before the feed-forward layer too, that behind attention has the other's name.
_BEFORE = "pre_feedforward_layernorm"
_SANDWICH = {"post_attention_layernorm.input": "attn_out", "post_attention_layernorm": "post_attn_norm"}
_OUTER = {
    "embed_tokens": "embed", "embed_in": "embed", "drop": "embed", "norm": "output_norm",
    "ln_f": "output_norm", "final_layer_norm": "output_norm", "lm_head": "logits", "embed_out": "logits",
}  # fmt: skip
_BLOCK_PATH = re.compile(r"(?:(?:model|transformer|gpt_neox)\.)*(?:layers|h)\.(\d+)(?:\.(.+))?")
_OUTER_PATH = re.compile(r"(?:(?:model|transformer|gpt_neox)\.)*(\w+)")
_CPP_SUFFIX = re.compile(r"(\w+)-(\d+)")


@dataclass(frozen=True)
class Origin:
    """Where an array comes from.

    Attributes:
        name: to be looked up: its own, or that of the parameter that tells more.
        said: its own name. op: what computed it, where that is told.
    """

    name: str
    said: str
    op: str = ""

    @classmethod
    def read(cls, text: str) -> Origin:
        """Of a name, or of `NAME = OP(SOURCE, …)`, much as llama.cpp's eval callback prints it.

        Forks use names again: where the op says that it is no such stage, the name is in no table.
        """
        if (found := _COMPUTED.fullmatch(text)) is None:
            return cls(text, text)
        said, op, sources = found[1], found[2], found[3].split(", ")
        parameters = [source for source in sources if source.endswith((".weight", ".bias"))]
        if (known := next(filter(_PARAMETER.fullmatch, parameters), None)) is not None:
            return cls(known, said, op)
        kind = (canonical(said) or "").rpartition(".")[2]
        if op == "ADD" and not parameters and kind not in _SUMS:
            return cls(f"{said} ({op})", said, op)
        return cls(said, said, op)


def canonical(name: str, among: Collection[str] = ()) -> str | None:
    """prill's name for a stage by its name in prill, llama.cpp or transformers; None if no table has it.

    Args:
        among: all names of the trace, which tell the versions of llama.cpp, and places of norms, apart.

    Returns:
        A name of the stage table, or `blk.N.qkv` for queries, keys and values in one array.
    """
    if name in OUTER:
        return name
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", name):
        return name if match[2] in KINDS else None
    if match := _PARAMETER.fullmatch(name):
        return f"blk.{match[1]}.{_PARAMETERS[match[2]]}"
    if match := _CPP_SUFFIX.fullmatch(name):
        kind = _LLAMA_CPP.get(match[1])
        if match[1] == "kqv_out" and f"{_OLD_ATTENTION}-{match[2]}" in among:
            kind = "attn_out"
        others = {f"{each}-{match[2]}" for each in _OTHER_NORMS}
        if kind == "post_attn_norm" and among and others.isdisjoint(among):
            kind = "ffn_norm"
        return f"blk.{match[2]}.{kind}" if kind else None
    if match := _BLOCK_PATH.fullmatch(name):
        sandwich = any(other.endswith(_BEFORE) for other in among)
        named = _TRANSFORMERS | _SANDWICH if sandwich else _TRANSFORMERS
        kind = "out" if match[2] is None else named.get(match[2])
        return f"blk.{match[1]}.{kind}" if kind else None
    if match := _OUTER_PATH.fullmatch(name):
        return _LLAMA_CPP.get(name) or _OUTER.get(match[1])
    return None


def preferred(names: Collection[str]) -> frozenset[str]:
    """The names of a trace that stand for a stage, leaving out arrays that still lack a bias or positions."""
    given = frozenset(names)
    partial = {name for name in given for stem, dash, layer in (name.partition("-"),)
               if f"{_WHOLE.get(stem)}{dash}{layer}" in given}  # fmt: skip
    whole = {name.removesuffix(".bias") for name in given if _PARAMETER.fullmatch(name) and ".bias" in name}
    return given - partial - {f"{stem}.weight" for stem in whole}


def rotated(name: str, stage: str) -> str | None:
    """The stage after rotation, for names that llama.cpp uses for both a projection and its rotation."""
    kind = _ROTATED.get(name.partition("-")[0])
    return f"{stage.rpartition('.')[0]}.{kind}" if kind else None
