"""Is the file read right, and every broken file refused? The engine's loader against gguf's own reader."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import prill_fixtures
from prill_fixtures import malformed
from prill_harness.engines.base import Engine
from prill_harness.engines.models import fixture_name, resolve_model
from prill_harness.run.checks import Observer, check
from prill_runtime.gguf.file import open_gguf
from prill_suites.common import (
    FILE_READER,
    embedded,
    file_fields,
    file_parts,
    file_tensors,
    refusal,
    weight_values,
)
from prill_suites.file_values import RANGE, BadValues, Survey, constants, strips, survey, unused_tokens

LARGEST_BASE = 32 << 20  # of a real file that is broken in a copy, bytes
EPS = {"llama": "layer_norm_rms_epsilon", "gpt2": "layer_norm_epsilon", "gptneox": "layer_norm_epsilon"}
VOCABULARY = ("token_embd.weight", "output.weight")  # tensors with a row for each token
OpenModel = Callable[[str, str], Engine]


@pytest.fixture(scope="module")
def tensors(model_path: Path) -> list[gguf.ReaderTensor]:
    """Every tensor of the model, of all parts when it is split."""
    return file_tensors(model_path)


@pytest.fixture(scope="module")
def surveys(model_path: Path, tensors: list[gguf.ReaderTensor]) -> list[Survey]:
    """What one walk over all values of the file saw."""
    tables = {tensor.name: int(tensor.shape[1]) for tensor in tensors if tensor.name in VOCABULARY}
    unused = unused_tokens(file_fields(model_path), max(tables.values(), default=0))
    return [survey(t, unused[: tables[t.name]] if t.name in tables else None) for t in tensors]


def digest(path: Path) -> tuple[str, int]:
    """sha256 (hex) and size of a model, of all its parts one behind the other when it is split."""
    whole, size = hashlib.sha256(), 0
    for part in file_parts(path):
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: whole)
            size += file.tell()
    return whole.hexdigest(), size


@check("file.digest", kills=("weight_flipped", "digest_of_header_alone"))
def test_digest(observe: Observer, model_spec: str) -> None:
    """A packaged fixture is byte for byte the recorded one; the engine names the digest of what it opened."""
    named = fixture_name(model_spec)
    try:
        path = resolve_model(model_spec)
    except prill_fixtures.FixtureError as error:
        observe.saw(1, oracle="digest recorded with the fixture")
        observe.fail(str(error))
    found, size = digest(path)
    with open_gguf(path) as opened:
        said = opened.sha256
    observe.saw(size, oracle="digest recorded with the fixture" if named else "hashlib on the file")
    observe.digests["model"] = found
    wanted = prill_fixtures.sha256(*named) if named else found
    observe.expect(found == wanted, f"{model_spec}: sha256 expected {wanted}, got {found}")
    observe.expect(said == found, f"{model_spec}: the loader names sha256 {said}, the file has {found}")
    observe.say(f"{size} bytes, sha256 {found[:16]}…, as {'recorded' if named else 'the loader says'}")


@check("file.engine_digest", kills=("file_swapped", "digest_of_header_alone"))
def test_engine_digest(observe: Observer, engine: Engine, model_path: Path) -> None:
    """The engine works on the file it was given."""
    found, _ = digest(model_path)
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
        "ffn": key("expert_feed_forward_length", key("feed_forward_length")),
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
def test_configuration(
    observe: Observer, engine: Engine, model_path: Path, tensors: list[gguf.ReaderTensor]
) -> None:
    """The engine's configuration is complete, consistent, and the file's own."""
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in tensors}
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


@check(
    "file.tensors",
    kills=(
        "tensor_zero_filled",
        "qkv_bias_dropped",
        "ffn_down_not_wired",
        "file_zero_run",
        "file_zero_tail",
        "file_tensor_constant",
    ),
)
def test_tensors(
    observe: Observer, engine: Engine, tensors: list[gguf.ReaderTensor], surveys: list[Survey]
) -> None:
    """Every tensor of the file is loaded, and no matrix is zero, constant, or zero in a run without reason.

    What counts as such a run is defined in file_values.
    """
    model = embedded(engine)
    weights = model.weights
    names = {tensor.name for tensor in tensors}
    observe.saw(len(names), oracle=FILE_READER)
    observe.expect(bool(names), "the file holds no tensor")
    lost, invented = sorted(names - set(weights)), sorted(set(weights) - names)
    observe.expect(not lost, f"{len(lost)} tensors of the file were never loaded: {', '.join(lost[:5])}")
    observe.expect(not invented, f"{len(invented)} weights are not in the file: {', '.join(invented[:5])}")
    for seen in surveys:
        found = weight_values(model.backend, weights[seen.tensor])
        observe.expect(
            not seen.matrix or not seen.zero,
            f"{seen.tensor} is nothing but zeros, {seen.size} from index 0 on",
        )
        observe.expect(seen.zero or bool(found.any()), f"{seen.tensor} is loaded as nothing but zeros")
    runs = [seen.zero_run for seen in surveys if seen.zero_run]
    none_found(observe, [*runs, *constants(surveys)])
    observe.say(f"{len(names)} tensors loaded, none all zero, constant or zero in a run")


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
        "file_scale_not_a_number",
        "file_infinity",
    ),
)
def test_weights(
    observe: Observer, engine: Engine, tensors: list[gguf.ReaderTensor], surveys: list[Survey]
) -> None:
    """Every weight of the file is finite, and what the engine works with is the file's, bit for bit."""
    model = embedded(engine)
    none_found(observe, [seen.not_finite for seen in surveys if seen.not_finite])
    for tensor in tensors:
        held, shape = model.weights.get(tensor.name), tuple(int(n) for n in reversed(tensor.shape))
        observe.expect(held is not None, f"{tensor.name} was never loaded")
        got = weight_values(model.backend, held)
        observe.expect(got.shape == shape, f"{tensor.name}: expected shape {shape}, got {got.shape}")
        wrong, first = 0, ""
        for row, expected in strips(tensor):
            observe.saw(expected.size, oracle=f"{FILE_READER}, dequantised by gguf")
            strip = got.reshape(-1, shape[-1])[row : row + len(expected)]
            different = np.flatnonzero(strip.ravel() != expected.ravel())
            if different.size and not wrong:
                at = int(different[0])
                values = f"expected {expected.flat[at]:.9g}, got {strip.flat[at]:.9g}"
                first = f"the first at {row * shape[-1] + at}: {values}"
            wrong += different.size
        observe.expect(not wrong, f"{tensor.name}: {wrong} of {tensor.n_elements} weights differ, {first}")
    observe.say(f"{len(tensors)} tensors, {observe.observed} weights, all finite and equal to gguf's")


@check("file.scales", kills=("file_scale_times_4096",))
def test_scales(observe: Observer, surveys: list[Survey]) -> None:
    """No block's scale lies 10^3 above those of its row and of its column: a warning, it may be meant."""
    judged = sum(seen.judged for seen in surveys)
    observe.saw(judged or len(surveys), oracle="the blocks beside it, as gguf reads the file")
    none_found(observe, [seen.out_of_range for seen in surveys if seen.out_of_range])
    if not judged:
        observe.note(not_applicable=["blocks with neighbours"])
        observe.say(f"not to be told on this model: no block of its {len(surveys)} tensors has neighbours")
        return
    observe.say(f"{judged} blocks within {RANGE:.0e} of their neighbours")


def none_found(observe: Observer, findings: Sequence[BadValues]) -> None:
    """Fail with the first finding, and keep all of them."""
    if findings:
        more = f" (and {len(findings) - 1} more tensors)" if len(findings) > 1 else ""
        observe.fail(findings[0].sentence + more, findings=[asdict(finding) for finding in findings])


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
