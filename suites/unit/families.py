"""The name of a family comes in; a small random file of it, with every option of the family in use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.models import walks
from prill_runtime.models.load import describe
from prill_runtime.models.nodes.network import Network

from .tiny_gguf import add_tokenizer

VOCAB = 320
COMMON = {
    "embedding_length": 64, "feed_forward_length": 96, "context_length": 96, "block_count": 2,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 20000.0,
}  # fmt: skip
HEADS = {"attention.key_length": 64, "attention.value_length": 64}  # a size that the tensor cores have
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 12}  # fmt: skip
EXPERTS = {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 32}
QKV = tuple(f"blk.{n}.attn_qkv.weight" for n in range(2))
# Architecture -> its keys, and those of its tensors that a file may lack.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "qwen2": ({**COMMON, **YARN}, ()),
    "qwen3": ({**COMMON, **HEADS}, ("output.weight",)),
    "qwen3moe": ({**COMMON, **HEADS, **EXPERTS}, ("output.weight",)),
    "phi3": (
        {**COMMON, "attention.sliding_window": 16, "rope.dimension_count": 12,
         "rope.scaling.attn_factor": 1.2, "rope.scaling.original_context_length": 26},
        ("output.weight", "rope_factors_long.weight", "rope_factors_short.weight", *QKV),
    ),
    "gemma2": (
        {**COMMON, **HEADS, "attention.sliding_window": 7, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 4.0},
        (),
    ),
    "gemma3": (
        {**COMMON, "block_count": 7, "attention.sliding_window": 7, "rope.freq_base_swa": 10000.0,
         "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        (),
    ),
    "gptneox": (
        {key: value for key, value in COMMON.items() if "kv" not in key and "rms" not in key}
        | {"attention.layer_norm_epsilon": 1e-5, "use_parallel_residual": True, "rope.dimension_count": 4},
        ("output.weight", *QKV),
    ),
    "mistral3": (
        {**COMMON, **YARN, "rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1},
        ("output.weight",),
    ),
    "gpt-oss": ({**COMMON, **HEADS, **YARN, **EXPERTS, "attention.sliding_window": 7}, ("output.weight",)),
}  # fmt: skip


def described(arch: str, keys: dict[str, Any], optional: tuple[str, ...]) -> Network:
    """The network of such a file, which need not exist."""
    wide = int(keys["embedding_length"])
    names = ["token_embd.weight", *optional, *(f"blk.{n}" for n in range(keys["block_count"]))]
    tensors = {name: TensorInfo(name, (VOCAB, wide), T.F32) for name in names}
    metadata = {f"{arch}.{key}": value for key, value in keys.items()}
    file: Any = SimpleNamespace(path=Path("made.gguf"), architecture=arch, metadata=metadata, tensors=tensors)
    return describe(file)


def write(
    arch: str,
    path: Path,
    type: T = T.F32,
    experts: T | None = None,
    edit: Callable[[dict[str, NDArray[np.float32]]], None] = lambda tensors: None,
    **more: Any,
) -> Path:
    """The file; `type`: of its matrices, `experts`: of those of experts. `edit`: changes of its tensors.
    `more`: other values of keys, `__` for a dot."""
    keys, optional = FAMILIES[arch]
    keys = keys | {name.replace("__", "."): value for name, value in more.items()}
    random = np.random.default_rng(5)

    def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        drawn = random.standard_normal(shape) * (0.15 if len(shape) > 1 else 0.2)
        drawn *= 5.0 if "gate_exps.w" in name or "up_exps.w" in name else 1.0  # beyond the clamp of gpt-oss
        around = 2.0 if "factors_long" in name else 1.0 if "norm.weight" in name or "factors" in name else 0.0
        return (around + drawn).astype(np.float32)

    table = walks.tensors(described(arch, keys, optional))
    tensors = {name: values(name, tensor.shape) for name, tensor in table.items()}
    edit(tensors)

    def configure(writer: gguf.GGUFWriter) -> None:
        for key, value in keys.items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
                   str: writer.add_string}[value.__class__]  # fmt: skip
            add(f"{arch}.{key}", value)
        add_tokenizer(writer, "gpt2", VOCAB)

    writer = gguf.GGUFWriter(path, arch)
    configure(writer)
    for name, array in tensors.items():
        kind = experts or type if "_exps.weight" in name else type
        if array.ndim == 1 or kind == T.F32 or name.endswith(".bias"):
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
