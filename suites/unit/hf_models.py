"""Random transformers models come out, truly float64, each beside the GGUF file of the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness.witness.published import NAMES

from .tiny_gguf import add_tokenizer, write_gguf

torch = pytest.importorskip("torch", reason="needs the extra hf")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

VOCAB = 320
Floats = NDArray[np.float32]


@pytest.fixture
def truly_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the three places where transformers computes in float32 whatever the model's dtype is."""
    from transformers.models.llama import modeling_llama as llama

    def rms_norm(self: Any, x: Any) -> Any:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Any, Any]:
        key = llama.repeat_kv(key, module.num_key_value_groups)
        value = llama.repeat_kv(value, module.num_key_value_groups)
        weights = torch.softmax(query @ key.transpose(2, 3) * scaling + attention_mask, dim=-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def rotary(self: Any, x: Any, position_ids: Any) -> tuple[Any, Any]:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        doubled = torch.cat((angles, angles), dim=-1)
        return doubled.cos() * self.attention_scaling, doubled.sin() * self.attention_scaling

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", rms_norm)
    monkeypatch.setattr(llama, "eager_attention_forward", attention)
    monkeypatch.setattr(llama.LlamaRotaryEmbedding, "forward", rotary)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(model: Any, seed: int) -> dict[str, Floats]:
    """Give every parameter random float32 values of a realistic scale; norm weights around one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * (0.15 if parameter.ndim == 2 else 0.2)
        is_norm = name.endswith("weight") and parameter.ndim == 1
        parameter.data = noise + 1 if is_norm else noise
        state[name] = parameter.data.numpy()
    return state


def permuted(weight: Floats, heads: int) -> Floats:
    """Rows of q or k from half-split to adjacent pairs, as llama.cpp's converter lays them out."""
    head_dim = weight.shape[0] // heads
    split = weight.reshape(heads, 2, head_dim // 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def llama_tensors(state: dict[str, Floats], config: Any) -> dict[str, Floats]:
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    for name, array in state.items():
        if not name.startswith("model.layers."):
            continue
        _, _, layer, rest = name.split(".", 3)
        module, part = rest.rsplit(".", 1)
        if module == "self_attn.q_proj":
            array = permuted(array, config.num_attention_heads)
        if module == "self_attn.k_proj":
            array = permuted(array, config.num_key_value_heads)
        tensors[f"blk.{layer}.{NAMES[module]}.{part}"] = array
    return tensors


def single(value: float) -> float:
    """The float32 that GGUF stores."""
    return float(np.float32(value))


LLAMAS = {
    "plain": {},
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 2, "eps": 1e-6, "theta": 500000.0},
    "head_dim": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "theta": 1e6},
    "tied_biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "eps": 1e-3},
    "linear": {"rope": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def llama(name: str, folder: Path) -> tuple[Any, Path]:
    """A LlamaForCausalLM with the options of LLAMAS[name], not yet in float64, and its file."""
    options: dict[str, Any] = dict(LLAMAS[name])
    eps, theta = single(options.pop("eps", 1e-5)), options.pop("theta", 10000.0)
    rope = options.pop("rope", {"rope_type": "default"})
    settings = {"num_attention_heads": 4, "num_key_value_heads": 4, **options}
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48 if name == "head_dim" else 64,
        intermediate_size=96,
        num_hidden_layers=3,
        max_position_embeddings=256,
        rms_norm_eps=eps,
        rope_parameters={**rope, "rope_theta": theta},
        attn_implementation="eager",
        **settings,
    )
    model = transformers.LlamaForCausalLM(config)
    tensors = llama_tensors(randomise(model, 3), config)
    head_dim = config.head_dim
    # Frequencies from the definition, in float64: transformers computes them in float32.
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    rotary = model.model.rotary_emb
    if name == "llama3":
        # The one thing taken over: how much each frequency is stretched, as float32, as a file stores it.
        factors = (frequencies / rotary.inv_freq.numpy().astype(np.float64)).astype(np.float32)
        assert factors.min() < 1.01
        assert factors.max() > 7.9
        tensors["rope_freqs.weight"] = factors
        frequencies = frequencies / factors.astype(np.float64)
    elif name == "linear":
        frequencies = frequencies / rope["factor"]
    np.testing.assert_allclose(rotary.inv_freq.numpy(), frequencies, rtol=1e-5)
    rotary.inv_freq = torch.tensor(frequencies)

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_context_length(256)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(3)
        writer.add_feed_forward_length(96)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(eps)
        writer.add_rope_freq_base(theta)
        writer.add_rope_dimension_count(head_dim)
        if name == "head_dim":
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        if name == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(4.0)
        add_tokenizer(writer, "llama", VOCAB)

    return model, write_gguf(folder / f"llama-{name}.gguf", "llama", tensors, [metadata])


def gpt2(heads: int, folder: Path) -> tuple[Any, Path]:
    """A GPT2LMHeadModel, not yet in float64, and its file."""
    eps = single(1e-5)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=256,
        n_embd=48,
        n_layer=3,
        n_head=heads,
        n_inner=112,
        layer_norm_epsilon=eps,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(config)
    state = randomise(model, 5)
    tensors = {
        "token_embd.weight": state["transformer.wte.weight"],
        "position_embd.weight": state["transformer.wpe.weight"],
        "output_norm.weight": state["transformer.ln_f.weight"],
        "output_norm.bias": state["transformer.ln_f.bias"],
    }
    for name, array in state.items():
        if name.startswith("transformer.h."):
            _, _, layer, rest = name.split(".", 3)
            module, part = rest.rsplit(".", 1)
            # Conv1D keeps (in, out).
            tensors[f"blk.{layer}.{NAMES[module]}.{part}"] = np.ascontiguousarray(array.T)

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_context_length(256)
        writer.add_embedding_length(48)
        writer.add_block_count(3)
        writer.add_feed_forward_length(112)
        writer.add_head_count(heads)
        writer.add_layer_norm_eps(eps)
        add_tokenizer(writer, "gpt2", VOCAB)

    return model, write_gguf(folder / f"gpt2-{heads}.gguf", "gpt2", tensors, [metadata])
