"""Is the file read right, and every broken file refused? The engine's loader against gguf's own reader."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import prill_fixtures
from prill_fixtures import malformed
from prill_harness.checks import Observer, check
from prill_harness.engines import fixture_name, resolve_model
from prill_harness.engines.base import Engine
from prill_runtime.gguf import open_gguf
from prill_suites.common import FILE_READER, embedded, file_fields, refusal, weight_values

LARGEST_BASE = 32 << 20  # of a real file that is broken in a copy, bytes
EPS = {"llama": "layer_norm_rms_epsilon", "gpt2": "layer_norm_epsilon"}
FLOATS = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
OpenModel = Callable[[str, str], Engine]


@pytest.fixture(scope="module")
def reader(model_path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(model_path)


@check("file.digest", kills=("weight_flipped", "digest_of_header_alone"))
def test_digest(observe: Observer, model_spec: str) -> None:
    """A packaged fixture is byte for byte the recorded one; the engine names the digest of what it opened."""
    named = fixture_name(model_spec)
    try:
        path = resolve_model(model_spec)
    except prill_fixtures.FixtureError as error:
        observe.saw(1, oracle="digest recorded with the fixture")
        observe.fail(str(error))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with open_gguf(path) as opened:
        said = opened.sha256
    observe.saw(
        path.stat().st_size, oracle="digest recorded with the fixture" if named else "hashlib on the file"
    )
    observe.digests["model"] = found
    wanted = prill_fixtures.sha256(*named) if named else found
    observe.expect(found == wanted, f"{model_spec}: sha256 expected {wanted}, got {found}")
    observe.expect(said == found, f"{model_spec}: the loader names sha256 {said}, the file has {found}")
    observe.say(
        f"{path.stat().st_size} bytes, sha256 {found[:16]}…, as {'recorded' if named else 'the loader says'}"
    )


@check("file.engine_digest", kills=("file_swapped", "digest_of_header_alone"))
def test_engine_digest(observe: Observer, engine: Engine, model_path: Path) -> None:
    """The engine works on the file it was given."""
    with model_path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    observe.saw(1, oracle="hashlib on the file")
    said = engine.info.model_sha256
    observe.expect(said == found, f"the engine names sha256 {said or 'none'}, the file has {found}")
    observe.say(f"the engine opened sha256 {found[:16]}…")


def stated_configuration(fields: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Any]:
    """What the file itself says, by the names an engine reports; `shapes` as gguf writes them, reversed."""
    arch = fields["general.architecture"]

    def key(name: str, default: Any = None) -> Any:
        return fields.get(f"{arch}.{name}", default)

    heads, width = key("attention.head_count"), key("embedding_length")
    head_dim = key("attention.key_length", width // heads)
    stated = {
        "architecture": arch,
        "vocab_size": shapes["token_embd.weight"][1],
        "n_layers": key("block_count"),
        "width": width,
        "n_heads": heads,
        "n_kv_heads": key("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "ffn": key("feed_forward_length"),
        "context_length": key("context_length"),
        "norm_eps": key(f"attention.{EPS.get(arch, EPS['llama'])}"),
        "tied_head": "output.weight" not in shapes,
    }
    if arch == "llama":
        stated["rope_base"] = key("rope.freq_base", 10_000.0)
        stated["rope_dim"] = key("rope.dimension_count", head_dim)
    return stated


@check(
    "file.configuration",
    kills=("rms_eps_from_wrong_key", "head_not_tied", "context_length_halved"),
)
def test_configuration(observe: Observer, engine: Engine, model_path: Path, reader: gguf.GGUFReader) -> None:
    """The engine's configuration is complete, consistent, and the file's own."""
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    stated, config = stated_configuration(file_fields(model_path), shapes), engine.info.config
    for name, expected in stated.items():
        observe.saw(1, oracle=FILE_READER)
        observe.expect(name in config, f"the engine reports no {name}; the file says {expected}")
        got = config[name]
        observe.expect(got == expected, f"{name}: the file says {expected}, the engine works with {got}")
    sizes = ("vocab_size", "n_layers", "width", "n_heads", "n_kv_heads", "head_dim", "ffn", "context_length")
    for name in sizes:
        observe.expect(int(config[name]) > 0, f"{name}: expected above 0, got {config[name]}")
    heads, kv_heads = int(config["n_heads"]), int(config["n_kv_heads"])
    observe.expect(heads % kv_heads == 0, f"{heads} query heads are not a multiple of {kv_heads} cache heads")
    observe.say(
        f"{len(stated)} values, all as the file says: {', '.join(f'{k} {v}' for k, v in stated.items())}"
    )


def independent(tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    """A tensor's values as gguf reads and dequantises them, row-major."""
    if tensor.tensor_type in FLOATS:
        return np.asarray(tensor.data, np.float32)
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)


@check(
    "file.tensors",
    kills=("tensor_zero_filled", "qkv_bias_dropped", "ffn_down_not_wired"),
)
def test_tensors(observe: Observer, engine: Engine, reader: gguf.GGUFReader) -> None:
    """Every tensor of the file is loaded, and no matrix is nothing but zeros."""
    model = embedded(engine)
    weights = model.adapter.weights
    names = {tensor.name for tensor in reader.tensors}
    observe.saw(len(names), oracle=FILE_READER)
    observe.expect(bool(names), "the file holds no tensor")
    lost, invented = sorted(names - set(weights)), sorted(set(weights) - names)
    observe.expect(not lost, f"{len(lost)} tensors of the file were never loaded: {', '.join(lost[:5])}")
    observe.expect(not invented, f"{len(invented)} weights are not in the file: {', '.join(invented[:5])}")
    for name, weight in weights.items():
        found = weight_values(model.backend, weight)
        observe.expect(bool(found.any()), f"{name} is nothing but zeros")
    observe.say(f"{len(names)} tensors loaded, none all zero")


@check(
    "file.weights",
    kills=(
        "tensor_offset_by_one_alignment",
        "tensor_zero_filled",
        "q8_0_scale_bf16",
        "q4_k_min_sign",
        "q6_k_high_bits",
        "f32_norm_read_as_f16",
        "matrix_transposed",
        "tensors_exchanged",
    ),
)
def test_weights(observe: Observer, engine: Engine, reader: gguf.GGUFReader) -> None:
    """Every weight the engine works with is the file's, bit for bit."""
    model = embedded(engine)
    for tensor in reader.tensors:
        held, expected = model.adapter.weights.get(tensor.name), independent(tensor)
        observe.expect(held is not None, f"{tensor.name} was never loaded")
        got = weight_values(model.backend, held)
        observe.expect(
            got.shape == expected.shape, f"{tensor.name}: expected shape {expected.shape}, got {got.shape}"
        )
        observe.saw(expected.size, oracle=f"{FILE_READER}, dequantised by gguf")
        wrong = np.flatnonzero(got.ravel() != expected.ravel())
        if wrong.size:
            at = int(wrong[0])
            observe.fail(
                f"{tensor.name}: {wrong.size} of {expected.size} weights differ, the first at {at}: "
                f"expected {expected.ravel()[at]!r}, got {got.ravel()[at]!r}"
            )
    observe.say(f"{len(reader.tensors)} tensors, {observe.observed} weights, all equal to gguf's")


@check(
    "file.malformed",
    kills=(
        "count_unchecked",
        "truncation_unchecked",
        "duplicate_accepted",
        "alignment_unchecked",
        "overlap_unchecked",
        "unknown_type_as_f16",
    ),
)
def test_malformed(
    observe: Observer, pytestconfig: pytest.Config, open_model: OpenModel, model_path: Path, tmp_path: Path
) -> None:
    """Every malformed file is refused with one sentence that names its defect; the sound one is not."""
    spec, bad = pytestconfig.getoption("prill_engine"), tmp_path / "malformed.gguf"
    bad.write_bytes(malformed.sound())
    with open_gguf(bad) as file:
        observe.expect(bool(file.tensors), "the control failed: the sound file has no tensor")
    base = model_path.read_bytes() if model_path.stat().st_size <= LARGEST_BASE else None
    kinds = 0
    for defect in malformed.corpus(base):
        kinds += 1
        bad.write_bytes(defect.data)
        refusal(observe, defect.name, lambda: open_model(spec, str(bad)), 4)
        refusal(observe, f"{defect.name} (header alone)", lambda: open_gguf(bad), 4, defect.expects)
    observe.metric("malformed kinds", kinds, at_least=40)
    observe.say(f"{kinds} malformed files refused, each with one sentence naming its defect")
