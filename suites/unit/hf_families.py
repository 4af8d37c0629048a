"""Random models of ten families come out of transformers in float64, each beside its GGUF file.

Every one has what makes its family: no option is at a value at which it could be left out.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness.witness.published import NAMES, OUTER

from .hf_models import VOCAB, permuted, single
from .tiny_gguf import add_tokenizer, write_gguf

torch = pytest.importorskip("torch", reason="needs the extra hf")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

Floats = NDArray[np.float32]
MODULES = ("gemma2", "gemma3", "gpt_neox", "gpt_oss", "ministral3", "phi3", "qwen2", "qwen3", "qwen3_moe")
SHORT, LONG = [1.0 + 0.03125 * n for n in range(6)], [1.5 + 0.5 * n for n in range(6)]
WIDTH, FFN, LAYERS, CONTEXT, BASE = 64, 96, 3, 256, 10000.0


class Double:
    """torch whose float32 is float64: transformers computes norms, softmax and rotations in it by name."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def float64_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every family's module, and the rotary scalings, made and run in float64."""
    names = [f"transformers.models.{name}.modeling_{name}" for name in MODULES]
    for name in (*names, "transformers.modeling_rope_utils"):
        monkeypatch.setattr(importlib.import_module(name), "torch", Double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # what a quotient of two whole numbers has
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def _common(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "max_position_embeddings": CONTEXT, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": single(1e-5), "attn_implementation": "eager", "pad_token_id": 0,
        "tie_word_embeddings": False, "experts_implementation": "eager", **more,
    }  # fmt: skip


def _yarn(original: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0,
            "original_max_position_embeddings": original, **more}  # fmt: skip


DEFAULT = {"rope_type": "default", "rope_theta": BASE}
TWO = {"sliding_attention": DEFAULT,
       "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0}}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": BASE, "short_factor": SHORT, "long_factor": LONG,
            "original_max_position_embeddings": 128, "partial_rotary_factor": 0.75,
            "attention_factor": single(1.19)}  # fmt: skip
# Name of a case -> architecture in GGUF, class in transformers, its configuration.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("qwen2", "Qwen2", _common(rope_parameters=DEFAULT, tie_word_embeddings=True)),
    "qwen2-yarn": ("qwen2", "Qwen2", _common(rope_parameters=_yarn(48))),
    "qwen3": ("qwen3", "Qwen3", _common(rope_parameters=DEFAULT, head_dim=24)),
    "qwen3moe": (
        "qwen3moe", "Qwen3Moe",
        _common(rope_parameters=DEFAULT, head_dim=24, num_experts=6, num_experts_per_tok=3,
                moe_intermediate_size=40, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
    ),
    "phi3": ("phi3", "Phi3", _common(rope_parameters=LONGROPE, sliding_window=50)),
    "gemma2": (
        "gemma2", "Gemma2",
        _common(rope_parameters=DEFAULT, head_dim=24, query_pre_attn_scalar=24, sliding_window=20,
                attn_logit_softcapping=2.0, final_logit_softcapping=4.0, tie_word_embeddings=True),
    ),
    "gemma3": (
        "gemma3", "Gemma3",
        _common(rope_parameters=TWO, head_dim=24, query_pre_attn_scalar=24, sliding_window=20,
                num_hidden_layers=7, tie_word_embeddings=True),
    ),
    "gemma3-capped": (
        "gemma3", "Gemma3",
        _common(rope_parameters=TWO, head_dim=24, query_pre_attn_scalar=24, sliding_window=20,
                num_hidden_layers=7, tie_word_embeddings=True, attention_bias=True,
                attn_logit_softcapping=2.0, final_logit_softcapping=4.0),
    ),
    "gptneox": (
        "gptneox", "GPTNeoX",
        {**_common(rope_parameters={**DEFAULT, "partial_rotary_factor": 0.25}, use_parallel_residual=True),
         "layer_norm_eps": single(1e-5)},
    ),
    "gptneox-sequential": (
        "gptneox", "GPTNeoX",
        {**_common(rope_parameters={**DEFAULT, "partial_rotary_factor": 0.25}, use_parallel_residual=False),
         "layer_norm_eps": single(1e-5)},
    ),
    "mistral3": (
        "mistral3", "Ministral3",
        _common(rope_parameters=_yarn(32, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=single(0.1)),
                head_dim=24, sliding_window=None),
    ),
    "gpt-oss": (
        "gpt-oss", "GptOss",
        _common(rope_parameters=_yarn(48, truncate=False), head_dim=24, sliding_window=20,
                num_local_experts=6, num_experts_per_tok=3),
    ),
}  # fmt: skip


def family(case: str, folder: Path) -> tuple[Any, Path]:
    """A model of FAMILIES, in float64, and its file."""
    arch, prefix, settings = FAMILIES[case]
    name = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, name)(**settings)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).double().eval()
    tensors = _randomised(model, config, arch)
    if arch == "phi3":
        tensors |= {f"rope_factors_{kind}.weight": np.array(values, np.float32)
                    for kind, values in (("short", SHORT), ("long", LONG))}  # fmt: skip

    def metadata(writer: gguf.GGUFWriter) -> None:
        for key, value in _keys(arch, config).items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
                   str: writer.add_string}[type(value)]  # fmt: skip
            add(f"{arch}.{key}", value)
        add_tokenizer(writer, "gpt2", VOCAB)

    return model, write_gguf(folder / f"{case}.gguf", arch, tensors, [metadata])


def _keys(arch: str, config: Any) -> dict[str, Any]:
    """What a converter says of a model of these families."""
    size = getattr(config, "head_dim", None) or WIDTH // 4
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    said: dict[str, Any] = {
        "block_count": config.num_hidden_layers, "context_length": CONTEXT, "embedding_length": WIDTH,
        "feed_forward_length": FFN, "attention.head_count": 4, "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(size * rope.get("partial_rotary_factor", 1.0)),
    }  # fmt: skip
    if arch == "gptneox":
        parallel = config.use_parallel_residual
        return said | {"attention.layer_norm_epsilon": single(1e-5), "use_parallel_residual": parallel}
    said |= {"attention.head_count_kv": 2, "attention.key_length": size, "attention.value_length": size,
             "attention.layer_norm_rms_epsilon": single(1e-5)}  # fmt: skip
    if rope["rope_type"] in ("yarn", "linear"):
        said |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if "original_max_position_embeddings" in rope:
        said["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if getattr(config, "sliding_window", None):
        said["attention.sliding_window"] = config.sliding_window
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        said |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok,
                 "expert_feed_forward_length": getattr(config, "moe_intermediate_size", FFN)}  # fmt: skip
    caps = {name: getattr(config, name, None) or 0.0
            for name in ("attn_logit_softcapping", "final_logit_softcapping")}  # fmt: skip
    own: Mapping[str, dict[str, Any]] = {
        "phi3": {"rope.scaling.attn_factor": single(1.19)},
        "gemma2": caps,
        "gemma3": {"rope.freq_base_swa": BASE, **caps},
        "mistral3": {"attention.temperature_scale": single(0.1), "rope.scaling.yarn_log_multiplier": 1.0},
    }
    return said | own.get(arch, {})


def _randomised(model: Any, config: Any, arch: str) -> dict[str, Floats]:
    """Random weights, the very same in the model and in the file, there as converters name and lay them."""
    random, tensors = np.random.default_rng(3), dict[str, Floats]()
    for name, parameter in model.named_parameters():
        values = random.standard_normal(tuple(parameter.shape))
        values *= 0.15 if values.ndim > 1 else 1.0 if name.endswith("sinks") else 0.2
        values *= 5.0 if arch == "gpt-oss" and name.endswith("gate_up_proj") else 1.0  # beyond its clamp
        norm = "norm" in name and name.endswith("weight")
        values = (values + norm).astype(np.float32)
        offset = norm and arch.startswith("gemma")
        parameter.data = torch.from_numpy(values.astype(np.float64) - offset)
        tensors |= dict(_placed(name, values, config, arch))
    return tensors


def _placed(name: str, values: Floats, config: Any, arch: str) -> Iterator[tuple[str, Floats]]:
    """A parameter's tensors, by their names in the file."""
    path = name.removeprefix("model.").removeprefix("gpt_neox.")
    if not path.startswith("layers."):
        module, part = path.rsplit(".", 1)
        yield f"{OUTER[module]}.{part}", values
        return
    _, layer, rest = path.split(".", 2)
    at = f"blk.{layer}."
    if rest.startswith("mlp.experts."):
        yield from ((at + given, array) for given, array in _experts(rest.split(".")[-1], values, arch))
        return
    module, part = rest.rsplit(".", 1)
    part = "weight" if part == "sinks" else part
    ours = NAMES[module]
    if module == "post_attention_layernorm" and arch in ("gemma2", "gemma3", "gpt-oss"):
        ours = "post_attention_norm"
    if arch == "mistral3" and ours in ("attn_q", "attn_k"):
        values = permuted(values, 4 if ours == "attn_q" else 2)
    if arch == "gptneox" and ours == "attn_qkv":  # head by head q, k and v -> all of q, all of k, all of v
        apart = values.reshape(4, 3, WIDTH // 4, *values.shape[1:])
        values = np.ascontiguousarray(apart.swapaxes(0, 1).reshape(values.shape))
    yield f"{at}{ours}.{part}", values


def _experts(name: str, values: Floats, arch: str) -> Iterator[tuple[str, Floats]]:
    """Matrices (expert, out, in) and biases (expert, out) of gate, up and down."""
    part = "bias" if name.endswith("bias") else "weight"
    if arch == "gpt-oss" and part == "weight":  # (expert, in, out), gate and up in turn
        values = values.swapaxes(1, 2)
    if name.startswith("down"):
        yield f"ffn_down_exps.{part}", np.ascontiguousarray(values)
        return
    half = values.shape[1] // 2
    first, second = slice(half), slice(half, None)
    if arch == "gpt-oss":
        first, second = slice(0, None, 2), slice(1, None, 2)
    yield f"ffn_gate_exps.{part}", np.ascontiguousarray(values[:, first])
    yield f"ffn_up_exps.{part}", np.ascontiguousarray(values[:, second])


def expected_logprobs(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """What transformers says: (id, vocabulary)."""
    with torch.no_grad():
        # Gemma 3 has the number here and leaves it out; attention that is told it caps as Google's code does.
        cap = model.config.attn_logit_softcapping if model.config.model_type == "gemma3_text" else None
        more = {"softcap": cap} if cap else {}
        logits = model(torch.tensor(ids)[None], use_cache=False, **more).logits[0]
        assert logits.dtype == torch.float64
        found = torch.log_softmax(logits, dim=-1).numpy()
    assert found.shape == (len(ids), VOCAB)
    assert math.isfinite(float(found.sum()))
    return np.asarray(found, np.float64)
