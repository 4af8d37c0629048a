"""The stage table: what every stage is computed from, and what other engines call it."""

from __future__ import annotations

import re
from dataclasses import dataclass

HIDDEN = "hidden"


@dataclass(frozen=True)
class Stage:
    """One named point of a forward pass.

    Attributes:
        name: full name, `blk.3.q_rope`.
        layer: block number, None outside the blocks.
        kind: name without the block, `q_rope`.
        inputs: full names of the stages it is computed from.
        tensors: stems of the weights it reads, without `.weight` or `.bias`.
    """

    name: str
    layer: int | None
    kind: str
    inputs: tuple[str, ...]
    tensors: tuple[str, ...]


# kind -> (inputs within the block; HIDDEN is the block's input, tensor stems)
_LLAMA: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attn_norm": ((HIDDEN,), ("attn_norm",)),
    "q": (("attn_norm",), ("attn_q",)),
    "k": (("attn_norm",), ("attn_k",)),
    "v": (("attn_norm",), ("attn_v",)),
    "q_rope": (("q",), ()),
    "k_rope": (("k",), ()),
    "attn": (("q_rope", "k_rope", "v"), ()),
    "attn_out": (("attn",), ("attn_output",)),
    "ffn_in": ((HIDDEN, "attn_out"), ()),
    "ffn_norm": (("ffn_in",), ("ffn_norm",)),
    "gate": (("ffn_norm",), ("ffn_gate",)),
    "up": (("ffn_norm",), ("ffn_up",)),
    "act": (("gate", "up"), ()),
    "down": (("act",), ("ffn_down",)),
    "out": (("ffn_in", "down"), ()),
}
_GPT2 = {kind: entry for kind, entry in _LLAMA.items() if kind not in ("q_rope", "k_rope", "gate")} | {
    "q": (("attn_norm",), ("attn_qkv",)),
    "k": (("attn_norm",), ("attn_qkv",)),
    "v": (("attn_norm",), ("attn_qkv",)),
    "attn": (("q", "k", "v"), ()),
    "act": (("up",), ()),
}
BLOCKS = {"llama": _LLAMA, "gpt2": _GPT2}
_EMBED = {"llama": ("token_embd",), "gpt2": ("token_embd", "position_embd")}


def stage_table(architecture: str, n_layers: int) -> dict[str, Stage]:
    """Every stage of a model by name, in execution order.

    Raises:
        KeyError: an architecture without a table.
    """
    table = {"embed": Stage("embed", None, "embed", (), _EMBED[architecture])}
    hidden = "embed"
    for layer in range(n_layers):
        prefix = f"blk.{layer}."
        for kind, (inputs, tensors) in BLOCKS[architecture].items():
            sources = tuple(hidden if name == HIDDEN else prefix + name for name in inputs)
            stems = tuple(prefix + stem for stem in tensors)
            table[prefix + kind] = Stage(prefix + kind, layer, kind, sources, stems)
        hidden = f"{prefix}out"
    table["output_norm"] = Stage("output_norm", None, "output_norm", (hidden,), ("output_norm",))
    table["logits"] = Stage("logits", None, "logits", ("output_norm",), ("output", "token_embd"))
    return table


# Names that llama.cpp's eval callback prints (before `-N`), and module paths of transformers.
_LLAMA_CPP = {
    "inp_embd": "embed", "attn_norm": "attn_norm", "Qcur": "q", "Kcur": "k", "Vcur": "v",
    "Qcur_rope": "q_rope", "Kcur_rope": "k_rope", "kqv_out": "attn", "attn_out": "attn_out",
    "ffn_inp": "ffn_in", "ffn_norm": "ffn_norm", "ffn_gate": "gate", "ffn_up": "up",
    "ffn_swiglu": "act", "ffn_gelu": "act", "ffn_gate_par": "act", "ffn_out": "down", "l_out": "out",
    "result_norm": "output_norm", "result_output": "logits",
}  # fmt: skip
_TRANSFORMERS = {
    "model.embed_tokens": "embed", "input_layernorm": "attn_norm", "self_attn.q_proj": "q",
    "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "gate", "mlp.up_proj": "up",
    "mlp.down_proj": "down", "model.norm": "output_norm", "lm_head": "logits",
    "transformer.drop": "embed", "ln_1": "attn_norm", "attn.c_proj": "attn_out", "ln_2": "ffn_norm",
    "mlp.c_fc": "up", "mlp.act": "act", "mlp.c_proj": "down", "transformer.ln_f": "output_norm",
}  # fmt: skip
_BLOCK_PATH = re.compile(r"^(?:model\.layers|transformer\.h)\.(\d+)(?:\.(.+))?$")
_CPP_SUFFIX = re.compile(r"^(.+?)-(\d+)$")


def canonical(name: str) -> str | None:
    """cupel's name for a stage as cupel, llama.cpp or transformers call it; None when no table has it."""
    if name in ("embed", "output_norm", "logits"):
        return name
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", name):
        return name if match[2] in _LLAMA else None
    if match := _BLOCK_PATH.match(name):
        kind = "out" if match[2] is None else _TRANSFORMERS.get(match[2])
        return f"blk.{match[1]}.{kind}" if kind else None
    if match := _CPP_SUFFIX.match(name):
        kind = _LLAMA_CPP.get(match[1])
        return f"blk.{match[2]}.{kind}" if kind else None
    return _LLAMA_CPP.get(name) or _TRANSFORMERS.get(name)
