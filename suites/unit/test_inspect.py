"""`prill inspect`: digests of tensors, and two files compared tensor by tensor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from prill_fixtures import path as fixture
from prill_harness.measure import filediff
from prill_harness.numbers.compare import nmse
from prill_runtime.gguf.file import open_gguf

from .commandline import emitted, invoke
from .test_split import split
from .tiny_gguf import Floats, tiny

WIDE = {"width": 64, "ffn": 96}


def compared(a: Path, b: Path) -> dict[str, Any]:
    result = invoke("inspect", str(a), str(b), "--json")
    assert result.exit_code == 0, result.stderr
    shown: dict[str, Any] = emitted(result.stdout)
    return shown


def by_name(shown: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {tensor["name"]: tensor for tensor in shown["tensors"]}


def test_each_tensor_has_a_digest(tmp_path: Path) -> None:
    """--sha shows sha256 of the tensor's bytes as gguf's reader finds them, for people and machines."""
    path = tiny(tmp_path / "m.gguf", type=T.Q8_0)
    wanted = {t.name: hashlib.sha256(t.data.tobytes()).hexdigest() for t in gguf.GGUFReader(path).tensors}
    shown = emitted(invoke("inspect", str(path), "--sha", "--json").stdout)
    assert {t["name"]: t["sha256"] for t in shown["tensors"]} == wanted
    told = invoke("inspect", str(path), "--sha").stdout
    assert all(digest in told for digest in wanted.values())
    assert not any(digest in invoke("inspect", str(path)).stdout for digest in wanted.values())


@pytest.mark.parametrize(("model", "features"), [
    ("fixture:llama-tiny", ["gate", "gqa", "rms_norm", "rope", "silu"]),
    ("fixture:gpt2-tiny", ["bias", "fused_qkv", "gelu_tanh", "layer_norm", "learned_positions", "tied"]),
    ("fixture:llama-window", ["bias", "gate", "gqa", "rms_norm", "rope", "silu", "window"]),
    ("fixture:gpt-oss-tiny", ["bias", "clamped", "expert_bias", "experts", "gate", "gqa", "rms_norm", "rope",
                              "sinks", "window", "yarn"]),
])  # fmt: skip
def test_a_model_has_features(model: str, features: list[str]) -> None:
    """Those by which checklist items and faults are chosen, for people and machines."""
    assert emitted(invoke("inspect", model, "--json").stdout)["features"] == features
    assert f"features      {', '.join(features)}\n" in invoke("inspect", model).stdout


@pytest.mark.parametrize("kind", [T.F16, T.Q8_0, T.Q4_0], ids=lambda t: t.name)
def test_a_quantisation_is_held_against_its_source(kind: T, tmp_path: Path) -> None:
    """Types, and NMSE after dequantising: as gguf dequantises both, tensor by tensor and over all."""
    a, b = tiny(tmp_path / "a.gguf"), tiny(tmp_path / "b.gguf", type=kind)
    shown, error, energy = compared(a, b), 0.0, 0.0
    mine, theirs = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (a, b))
    for name, tensor in by_name(shown).items():
        x = gguf.quants.dequantize(mine[name].data, T.F32).astype(np.float64)
        y = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type).astype(np.float64)
        assert tensor["nmse"] == pytest.approx(nmse(x, y), rel=1e-9)
        assert tensor["largest"] == pytest.approx(np.abs(x - y).max(), rel=1e-9)
        assert tensor["same"] is (x.ndim == 1)
        assert (tensor["a"]["type"], tensor["b"]["type"]) == ("F32", "F32" if x.ndim == 1 else kind.name)
        error, energy = error + float(np.sum((x - y) ** 2)), energy + float(np.sum(x**2))
    assert shown["nmse"] == pytest.approx(error / energy, rel=1e-9)
    assert shown["metadata"] == []
    assert shown["same"] is False


def test_a_file_is_the_same_as_itself(tmp_path: Path) -> None:
    """Equal bytes, NMSE 0, no key; a split model is the same as the whole one but for its three keys."""
    whole = tiny(tmp_path / "whole.gguf")
    shown = compared(whole, whole)
    assert (shown["same"], shown["nmse"], shown["metadata"]) == (True, 0.0, [])
    parts = compared(whole, split(tmp_path))
    assert all(tensor["same"] for tensor in parts["tensors"])
    assert [key["key"] for key in parts["metadata"]] == ["split.no", "split.count", "split.tensors.count"]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    """A tensor of one file alone, another shape, a value that is not finite: each in its row."""

    def edit(tensors: dict[str, Floats]) -> None:
        del tensors["blk.1.ffn_up.weight"]
        tensors["extra"] = np.ones(3, np.float32)
        tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:50]
        tensors["blk.0.attn_q.weight"][0, 0] = np.nan

    a, b = tiny(tmp_path / "a.gguf"), tiny(tmp_path / "b.gguf", edit=edit)
    rows = by_name(compared(a, b))
    assert (rows["blk.1.ffn_up.weight"]["b"], rows["blk.1.ffn_up.weight"]["note"]) == (None, "only in A")
    assert (rows["extra"]["a"], rows["extra"]["note"]) == (None, "only in B")
    assert (rows["blk.0.ffn_up.weight"]["nmse"], rows["blk.0.ffn_up.weight"]["note"]) == (
        None,
        "another shape",
    )
    assert (rows["blk.0.attn_q.weight"]["nmse"], rows["blk.0.attn_q.weight"]["note"]) == ("inf", "not finite")
    told = invoke("inspect", str(a), str(b)).stdout
    assert "only in B" in told
    assert "96 x 64 / 50 x 64" in told


def test_types_without_decoder_are_compared_by_bytes(tmp_path: Path) -> None:
    """Equal bytes are the same; others have no figure, and the row says why."""
    paths = []
    for number in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"{number}.gguf", "llama")
        for name, fill in (("same", 7), ("other", number)):
            writer.add_tensor(name, np.full((2, 110), fill, np.uint8), raw_dtype=T.IQ3_S)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(tmp_path / f"{number}.gguf")
    rows = by_name(compared(*paths))
    assert (rows["same"]["same"], rows["same"]["nmse"]) == (True, 0.0)
    assert (rows["other"]["nmse"], rows["other"]["note"]) == (None, "no decoder for IQ3_S")


def test_metadata_that_differ_are_named(tmp_path: Path) -> None:
    """A value, a key of one file alone, the element at which two arrays part, 1 beside true."""

    def other(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["llama.rope.freq_base"].value = 5e5
        writer.kv_data[0]["tokenizer.ggml.tokens"].value[310] = "wheat"
        writer.add_string("general.author", "nobody")
        writer.add_bool("test.flag", True)

    a = tiny(tmp_path / "a.gguf", metadata=lambda writer: writer.add_uint32("test.flag", 1))
    b = tiny(tmp_path / "b.gguf", metadata=other)
    found = {key["key"]: key for key in compared(a, b)["metadata"]}
    assert set(found) == {"llama.rope.freq_base", "tokenizer.ggml.tokens", "general.author", "test.flag"}
    assert (found["llama.rope.freq_base"]["a"], found["llama.rope.freq_base"]["b"]) == (10000.0, 500000.0)
    assert (found["general.author"]["a"], found["general.author"]["b"]) == (None, "nobody")
    assert found["tokenizer.ggml.tokens"]["first_difference"] == 310
    told = invoke("inspect", str(a), str(b)).stdout
    assert "320 values, at 310: 'wheat'" in told
    assert told.rstrip().endswith(
        "21 tensors, 21 with the same bytes, NMSE 0 over all weights; 4 metadata keys differ"
    )


def test_strips_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are dequantised at a time, the figures are the same."""
    with open_gguf(fixture("gpt2-tiny")) as a, open_gguf(fixture("gpt2-tiny", "q4_k")) as b:
        whole = filediff.compare(a, b)
        monkeypatch.setattr(filediff, "STRIP_WEIGHTS", 4096)
        pieces = filediff.compare(a, b)
    assert whole.nmse is not None
    assert 1e-4 < whole.nmse < 1e-1
    assert pieces.nmse == pytest.approx(whole.nmse, rel=1e-12)
    assert [t.largest for t in pieces.tensors] == [t.largest for t in whole.tensors]


def test_a_file_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    """Exit 4 whichever of the two it is; digests of two files are a usage error."""
    good, bad = tiny(tmp_path / "m.gguf"), tmp_path / "bad.gguf"
    bad.write_bytes(b"GARBAGE" * 10)
    for args in ((good, bad), (bad, good), (good, tmp_path / "none.gguf"), (good, good, "--sha")):
        result = invoke("inspect", *map(str, args))
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1)
