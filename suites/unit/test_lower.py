"""What a model's nodes are lowered to computes what they say, on the emulator against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from prill_harness.engines.embedded import Embedded
from prill_harness.faults.opening import open_engine
from prill_runtime.device.model import DeviceModel
from prill_runtime.device.steps import lower
from prill_runtime.models.nodes.attention import Attention

from .decoded import decoded
from .families import FAMILIES, described, write
from .tiny_gguf import add_config, add_tokenizer, gpt2_tensors, llama_tensors, tiny

WIDE = {"width": 64, "n_heads": 4, "n_kv_heads": 4, "ffn": 96, "n_layers": 2, "context": 64}
IDS = [5, 300, 7, 261, 9, 9, 30, 301, 77]
FLOAT32 = 1e-10  # NMSE beside float64, as in docs/adr/0002-lanes.md
INTEGERS = 2e-3  # of a whole model in a lane of 8 bits


def biases(tensors: dict[str, Any]) -> None:
    """Random biases of every projection, and divisors of the rotary frequencies."""
    random = np.random.default_rng(3)
    tensors["rope_freqs.weight"] = np.linspace(1, 2, 8, dtype=np.float32)
    for name in [name for name in tensors if name.startswith("blk.") and "norm" not in name]:
        shape = len(tensors[name])
        tensors[name.replace("weight", "bias")] = random.standard_normal(shape).astype(np.float32)


def of_types(path: Path, arch: str, kinds: dict[str, T], edit: Callable[[dict[str, Any]], None]) -> Path:
    """A model whose matrices are F32 but those of these names' endings."""
    writer, random = gguf.GGUFWriter(path, arch), np.random.default_rng(5)
    tensors = {"llama": llama_tensors, "gpt2": gpt2_tensors}[arch](WIDE, 320, random)
    edit(tensors)
    add_config(writer, arch, WIDE)
    add_tokenizer(writer, arch, 320)
    for name, array in tensors.items():
        kind = next((kind for end, kind in kinds.items() if name.endswith(f"{end}.weight")), None)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def steps(model: Any, ids: list[int]) -> np.ndarray:
    """Logits (id, vocab) of ids that are fed one by one behind the first two."""
    cache = model.new_cache(len(ids))
    if not isinstance(model, DeviceModel):
        return np.asarray(model.forward([(cache, ids)])[0][2:], np.float64)
    model.prefill(cache, ids[:2])
    rows = [decoded(model, cache, token) for token in ids[2:]]
    cache.close()
    return np.array(rows, np.float64)


def both(path: Path, engine: str = "emu") -> tuple[float, set[str]]:
    """NMSE of the captured graph's steps, and the kinds of nodes that have no fused piece."""
    with open_engine(engine, path) as device, open_engine("numpy64", path) as oracle:
        assert isinstance(device, Embedded)
        assert isinstance(oracle, Embedded)
        assert isinstance(device.model, DeviceModel)
        got, expected = steps(device.model, IDS), steps(oracle.model, IDS)
        recorded = {type(node).__name__ for node in device.model.decoder.lowered.recorded}
    return float(np.mean((got - expected) ** 2) / np.mean(expected**2)), recorded


MODELS: dict[str, Callable[[Path], Path]] = {
    "biases": lambda path: tiny(path, edit=biases),
    "biases, types apart": lambda path: of_types(
        path, "llama", {"attn_k": T.Q8_0, "attn_v": T.Q4_0, "attn_output": T.F16}, biases
    ),
    "learned positions, fused q, k and v, GELU": lambda path: tiny(path, "gpt2", **WIDE),
    "tables of two types": lambda path: of_types(path, "gpt2", {"token_embd": T.Q8_0}, lambda _: None),
    "q8_0": lambda path: tiny(path, "gpt2", type=T.Q8_0, **WIDE),
    "experts, sinks, YaRN's factor, pairs half a head apart": lambda path: write("gpt-oss", path),
    "experts of MXFP4": lambda path: write("gpt-oss", path, T.Q8_0, T.MXFP4),
    "experts of halves": lambda path: write("gpt-oss", path, T.BF16, T.F16),
    "all experts": lambda path: write("gpt-oss", path, expert_used_count=6),
    "pairs half a head apart, biases, YaRN": lambda path: write("qwen2", path),
    "norms of heads": lambda path: write("qwen3", path),
    "norms of heads, experts, a softmax over all, plain SwiGLU": lambda path: write("qwen3moe", path),
    "norms of heads and behind branches, two bases, GEGLU": lambda path: write("gemma3", path),
    "capped scores": lambda path: write("gemma2", path),
    "late queries": lambda path: write("mistral3", path),
    "a part of each head turned, q, k and v in one matrix, gate and up in one": lambda path: write(
        "phi3", path
    ),
    "the same of Q8_0": lambda path: write("phi3", path, T.Q8_0),
    "branches side by side, LayerNorm, GELU by erf": lambda path: write("gptneox", path),
}


@pytest.mark.parametrize("name", MODELS)
def test_fused_is_what_the_nodes_say(name: str, tmp_path: Path) -> None:
    """Every node is fused, and a graph's steps are float64's to float32's rounding."""
    error, recorded = both(MODELS[name](tmp_path / "m.gguf"))
    assert not recorded
    assert error < FLOAT32


@pytest.mark.parametrize(
    ("engine", "type", "bound"),
    [("emu", T.Q8_0, FLOAT32), ("emu:fast", T.F32, FLOAT32), ("emu:fast", T.Q8_0, INTEGERS)],
)
@pytest.mark.parametrize("arch", ["qwen3moe", "gemma3"])
def test_fused_is_what_the_single_ops_say(
    arch: str, engine: str, type: T, bound: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same graph with attention through single ops, in both arithmetics: apart by rounding alone,
    which in the fast one is that of integers where the file has blocks."""
    path, lowered, rows = write(arch, tmp_path / "m.gguf", type), lower.lower, list[np.ndarray]()
    for single in (Attention, ()):
        choice = lambda node, on, kinds=single: None if isinstance(node, kinds) else lowered(node, on)  # noqa: E731
        monkeypatch.setattr(lower, "lower", choice)
        with open_engine(engine, path) as opened:
            model = opened.model  # type: ignore[attr-defined]
            rows.append(steps(model, IDS))
            recorded = {node.__class__.__name__ for node in model.decoder.lowered.recorded}
            assert recorded == ({"Attention"} if single else set())
            assert model.decoder.lowered.any_reach is not bool(single)
    error = np.mean((rows[0] - rows[1]) ** 2) / np.mean(rows[0] ** 2)
    assert 0 < error < bound


@pytest.mark.parametrize(
    ("experts", "used", "fused"), [(256, 16, True), (257, 16, False), (256, 17, False), (17, 17, False)]
)
def test_more_experts_than_there_is_room_for_are_recorded(experts: int, used: int, fused: bool) -> None:
    """A block has places for 256 logits and for 16 chosen experts, and no node with more gets its kernels."""
    keys, optional = FAMILIES["qwen3moe"]
    node = described("qwen3moe", keys | {"expert_count": experts, "expert_used_count": used}, optional)
    device = SimpleNamespace(module=lambda name: None)
    on: Any = SimpleNamespace(
        weights={}, matrix=lambda linear: SimpleNamespace(kind="f16"), ops=SimpleNamespace(device=device)
    )
    assert isinstance(lower.lower(node.layers[0].dense, on), lower.FusedExperts) is fused


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_node_without_a_fused_piece_sits_beside_fused_ones(arch: str, tmp_path: Path) -> None:
    """A feed-forward layer whose width fills no block of 32 goes through ops; attention does not."""
    error, recorded = both(tiny(tmp_path / "m.gguf", arch, **{**WIDE, "ffn": 88}))
    assert recorded == {"Dense"}
    assert error < FLOAT32


def test_a_width_that_fills_no_block_records_everything(tmp_path: Path) -> None:
    """No kernel is given rows that it does not cover: all but the embedding goes through ops."""
    error, recorded = both(tiny(tmp_path / "m.gguf", "gpt2"))
    assert recorded == {"Attention", "Dense", "LayerNorm", "Head"}
    assert error < FLOAT32


@pytest.mark.parametrize("name", [".bias", "attn_q.bias", "attn_k.bias", "attn_v.bias", "ffn_gate.bias"])
def test_every_bias_is_read(name: str, tmp_path: Path) -> None:
    """The graph of a file whose biases of one kind are zero is another's: no hook is left out."""

    def without(tensors: dict[str, Any]) -> None:
        biases(tensors)
        for each in tensors:
            if each.endswith(name):
                tensors[each][...] = 0

    rows = []
    for edit in (biases, without):
        with open_engine("emu", tiny(tmp_path / f"{len(rows)}.gguf", edit=edit)) as engine:
            rows.append(steps(engine.model, IDS))  # type: ignore[attr-defined]
    assert np.mean((rows[0] - rows[1]) ** 2) > 1e-6 * np.mean(rows[0] ** 2)


@pytest.mark.parametrize("kind", [T.Q8_0, T.Q4_0])
def test_fast_hooks_round_as_their_lane(kind: T, tmp_path: Path) -> None:
    """Integers leave more than float32 and no more than a lane of 8 bits may."""
    error, recorded = both(tiny(tmp_path / "m.gguf", "gpt2", type=kind, **WIDE), "emu:fast")
    assert not recorded
    assert 1e-9 < error < INTEGERS
