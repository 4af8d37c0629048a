"""Sizes go in; the network that a description makes of a file with these sizes, and no bytes, comes out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gguf import GGMLQuantizationType as T

from prill_runtime.gguf.tensors import TensorInfo
from prill_runtime.models.load import describe
from prill_runtime.models.nodes.network import Network


def network(
    arch: str = "llama",
    *,
    vocab: int = 320,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    ffn: int = 96,
    context: int = 64,
    tied: bool = True,
    window: int = 0,
    **more: Any,
) -> Network:
    """A Llama's or a GPT-2's; `more`: further keys of the architecture, `__` for a dot."""
    said: dict[str, Any] = {
        "embedding_length": width, "block_count": layers, "feed_forward_length": ffn,
        "context_length": context, "attention.head_count": heads,
        "attention.key_length": size, "attention.value_length": size,
    }  # fmt: skip
    if arch == "gpt2":
        said["attention.layer_norm_epsilon"] = 1e-5
    else:
        said |= {"attention.head_count_kv": kv_heads, "attention.layer_norm_rms_epsilon": 1e-5,
                 "attention.sliding_window": window}  # fmt: skip
    said |= {name.replace("__", "."): value for name, value in more.items()}
    names = ["token_embd.weight", *(f"blk.{number}" for number in range(layers))]
    names += [] if tied else ["output.weight"]
    tensors = {name: TensorInfo(name, (vocab, width), T.F32) for name in names}
    metadata = {f"{arch}.{name}": value for name, value in said.items()}
    file: Any = SimpleNamespace(path=Path("made.gguf"), architecture=arch, metadata=metadata, tensors=tensors)
    return describe(file)
