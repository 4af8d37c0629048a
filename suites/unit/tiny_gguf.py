"""A path and a few sizes go in, a GGUF file with random weights of either family comes out: for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Edit = Callable[[dict[str, Floats]], None]

LLAMA = {"width": 64, "n_heads": 4, "n_kv_heads": 2, "ffn": 96, "n_layers": 2, "context": 64}
GPT2 = {"width": 48, "n_heads": 3, "n_kv_heads": 3, "ffn": 80, "n_layers": 2, "context": 64}


def spm_vocabulary(size: int = 320) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece-style vocabulary: 3 control, 256 bytes, words."""
    words = ["▁", "a", "b", "c", "d", "e", "▁a", "▁b", "ab", "▁ab", "cd", "▁cd", "de", "▁the", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokens += [f"▁w{number}" for number in range(size - len(tokens))]
    types = [2, 3, 3] + [6] * 256 + [1] * (size - 259)
    return tokens, [0.0 if index < 259 else -float(index) for index in range(size)], types


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in byte order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(byte if byte in kept else next(moved)) for byte in range(256)]


def add_tokenizer(writer: gguf.GGUFWriter, arch: str, vocab_size: int) -> None:
    """Tokenizer metadata of the architecture's usual kind."""
    if arch == "llama":
        tokens, scores, types = spm_vocabulary(vocab_size)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        return
    letters = byte_alphabet()
    merges = [f"{left} {right}" for left, right in (("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "b"))]
    tokens = [*letters, "th", "the", "Ġthe", "ab"]
    tokens += [f"<unused{number}>" for number in range(vocab_size - len(tokens) - 1)] + ["<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 260 + [5] * (vocab_size - 261) + [3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocab_size - 1)
    writer.add_eos_token_id(vocab_size - 1)


def llama_tensors(sizes: Mapping[str, int], vocab_size: int, rng: np.random.Generator) -> dict[str, Floats]:
    """Random weights of a Llama with a head of its own."""
    width, ffn = sizes["width"], sizes["ffn"]
    head_dim = sizes.get("head_dim", width // sizes["n_heads"])
    q, kv = sizes["n_heads"] * head_dim, sizes["n_kv_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, width)}
    for layer in range(sizes["n_layers"]):
        at = f"blk.{layer}."
        shapes |= {at + "attn_norm.weight": (width,), at + "ffn_norm.weight": (width,)}
        shapes |= {at + "attn_q.weight": (q, width), at + "attn_k.weight": (kv, width)}
        shapes |= {at + "attn_v.weight": (kv, width), at + "attn_output.weight": (width, q)}
        shapes |= {at + "ffn_gate.weight": (ffn, width), at + "ffn_up.weight": (ffn, width)}
        shapes |= {at + "ffn_down.weight": (width, ffn)}
    shapes |= {"output_norm.weight": (width,), "output.weight": (vocab_size, width)}
    return _random(shapes, rng)


def gpt2_tensors(sizes: Mapping[str, int], vocab_size: int, rng: np.random.Generator) -> dict[str, Floats]:
    """Random weights of a GPT-2 with a tied head."""
    width, ffn = sizes["width"], sizes["ffn"]
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, width)}
    shapes["position_embd.weight"] = (sizes["context"], width)
    for layer in range(sizes["n_layers"]):
        matrices = {"attn_qkv": (3 * width, width), "attn_output": (width, width)}
        matrices |= {"ffn_up": (ffn, width), "ffn_down": (width, ffn)}
        for name, shape in {"attn_norm": (width,), "ffn_norm": (width,), **matrices}.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
            shapes[f"blk.{layer}.{name}.bias"] = shape[:1]
    shapes |= {"output_norm.weight": (width,), "output_norm.bias": (width,)}
    return _random(shapes, rng)


def _random(shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, Floats]:
    """Matrices around 0, norm weights around 1, biases small."""
    return {
        name: ((1.0 if "norm.weight" in name else 0.0) + 0.15 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def add_config(writer: gguf.GGUFWriter, arch: str, sizes: Mapping[str, int]) -> None:
    """The architecture's required metadata."""
    writer.add_context_length(sizes["context"])
    writer.add_embedding_length(sizes["width"])
    writer.add_block_count(sizes["n_layers"])
    writer.add_feed_forward_length(sizes["ffn"])
    writer.add_head_count(sizes["n_heads"])
    if arch == "llama":
        writer.add_head_count_kv(sizes["n_kv_heads"])
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
    else:
        writer.add_layer_norm_eps(1e-5)


def write_gguf(
    path: Path,
    arch: str,
    tensors: Mapping[str, Floats],
    configure: Iterable[Callable[[gguf.GGUFWriter], None]],
    type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write tensors with the metadata that `configure` adds; matrices in `type`, vectors in F32."""
    writer = gguf.GGUFWriter(path, arch)
    for add in configure:
        add(writer)
    for name, array in tensors.items():
        if array.ndim == 1 or type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(
    path: Path,
    arch: str = "llama",
    *,
    seed: int = 0,
    vocab_size: int = 320,
    edit: Edit | None = None,
    metadata: Callable[[gguf.GGUFWriter], None] | None = None,
    type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **sizes: int,
) -> Path:
    """A small random model; `edit` changes its tensors, `metadata` its keys, `sizes` its sizes."""
    full: dict[str, Any] = {**{"llama": LLAMA, "gpt2": GPT2}[arch], **sizes}
    make = {"llama": llama_tensors, "gpt2": gpt2_tensors}[arch]
    tensors = make(full, vocab_size, np.random.default_rng(seed))
    if edit:
        edit(tensors)

    def override(writer: gguf.GGUFWriter) -> None:
        if metadata:
            metadata(writer)

    steps = (
        lambda writer: add_config(writer, arch, full),
        lambda writer: add_tokenizer(writer, arch, vocab_size),
        override,
    )
    return write_gguf(path, arch, tensors, steps, type)
