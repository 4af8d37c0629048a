"""Whole models in types of few bits, mixed as in files of real models, on the emulator against float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_harness import open_engine
from prill_harness.engines.embedded import Embedded
from prill_harness.numbers import lanes
from prill_runtime.device.model import DeviceModel
from prill_runtime.quants.layouts import BlockFormat, dequantize
from prill_suites import ops_models
from prill_suites.ops_bench import BOUND

from . import tiny_gguf

SIZES = {"width": 256, "n_heads": 4, "n_kv_heads": 2, "ffn": 512, "n_layers": 2, "context": 64}
VOCABULARY, PROMPT, TOKENS = 320, 33, 6
# The file's own type, then those of tensors that llama.cpp gives another, by a part of their names.
MIXES: dict[str, tuple[T, Mapping[str, T]]] = {
    "q2_k": (T.Q2_K, {"attn_v": T.Q4_K, "attn_output": T.Q3_K, "ffn_down": T.Q3_K, "output.weight": T.Q6_K}),
    "q3_k": (T.Q3_K, {"attn_v": T.Q5_K, "ffn_down": T.Q4_K, "output.weight": T.Q6_K}),
    "mxfp4": (T.MXFP4, {"attn": T.Q8_0, "token_embd": T.Q8_0, "output.weight": T.Q8_0}),
    "pure_q2_k": (T.Q2_K, {}),
    "pure_q3_k": (T.Q3_K, {}),
    "pure_mxfp4": (T.MXFP4, {}),
    "gate_apart": (T.Q2_K, {"ffn_gate": T.MXFP4}),
}


def matrix(random: np.random.Generator, kind: T, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Random blocks (rows, bytes), weights about 1 / sqrt(row length) in size: no score is huge."""
    raw = ops_models.random_blocks(random, kind, shape)
    factor = shape[1] ** -0.5 / dequantize(raw, kind, shape).std()
    fields = raw.view(BlockFormat.registry[kind].layout)
    for name in {"d", "dmin"} & set(fields.dtype.names or ()):
        fields[name] = (fields[name] * factor).astype(np.float16)
    if kind == T.MXFP4:
        fields["e"] += np.rint(np.log2(factor)).astype(np.int8).view(np.uint8)
    return raw.reshape(shape[0], -1)


def write(path: Path, mix: str) -> Path:
    """A small Llama of random blocks; norms are ordinary."""
    base, others = MIXES[mix]
    random = np.random.default_rng(ops_models.SEED)
    writer = gguf.GGUFWriter(path, "llama")
    tiny_gguf.add_config(writer, "llama", SIZES)
    tiny_gguf.add_tokenizer(writer, "llama", VOCABULARY)
    for name, array in tiny_gguf.llama_tensors(SIZES, VOCABULARY, random).items():
        if array.ndim == 1:
            writer.add_tensor(name, array)
            continue
        kind = next((kind for part, kind in others.items() if part in name), base)
        writer.add_tensor(name, matrix(random, kind, (array.shape[0], array.shape[1])), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("engine", ["emu", "emu:fast"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_model_in_few_bits(mix: str, engine: str, tmp_path: Path) -> None:
    """A prompt and the captured graph's own tokens are what the oracle says of them, within the bound of
    their arithmetic; every node of the graph is fused but a gate and an up of different types."""
    file = write(tmp_path / f"{mix}.gguf", mix)
    ids = np.random.default_rng(3).integers(3, VOCABULARY, PROMPT).tolist()
    with open_engine(engine, file) as candidate, open_engine("numpy64", file) as oracle:
        assert isinstance(candidate, Embedded)
        assert isinstance(candidate.model, DeviceModel)
        assert isinstance(oracle, Embedded)
        got = candidate.logits(ids).astype(np.float64)
        done = candidate.generate(ids, max_tokens=TOKENS, ignore_eos=True)
        decoder, arithmetic = candidate.model.captured, candidate.info.arithmetic
        rows = oracle.logits([*ids, *done.ids])
    assert decoder is not None
    kinds = {type(node).__name__ for node in decoder.lowered.recorded}
    assert kinds == ({"Dense"} if mix == "gate_apart" else set())
    assert arithmetic == ("int8" if engine == "emu:fast" else "float32")

    lane = lanes.lane_for(MIXES[mix][0].name, arithmetic)
    prompt, after = rows[:PROMPT], rows[PROMPT - 1 : -1]
    noise = ops_models.noise(file, lane, [*ids, *done.ids], after)
    bound = max(BOUND[arithmetic], lane.ratio * noise)
    assert np.mean((got - prompt) ** 2) <= bound * np.mean(prompt.var(axis=-1))
    chosen = ops_models.logprobs(after)[np.arange(TOKENS), list(done.ids)]
    error = np.mean((chosen - done.logprobs) ** 2) / np.mean(after.var(axis=-1))
    assert error <= bound
    assert (error > 1e-10) == (arithmetic == "int8")
