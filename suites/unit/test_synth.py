"""Synthetic files: the real shapes and types, weights as meant, the same bytes again, and refusals."""

from __future__ import annotations

import hashlib
import shutil
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from prill_fixtures import FixtureError, synth, synth_blocks, synth_vocab
from prill_harness.engines.models import resolve_model
from prill_runtime.errors import ModelFileError, UsageError
from prill_runtime.models import walks
from prill_runtime.run.model import Model

from .networks import network

SHAPE = "llama-micro"
SHAPES = {quant: "gpt-oss-micro" if quant in synth.EXPERT_QUANTS else SHAPE for quant in synth.QUANTS}
DIGESTS = {  # of the whole file; another NumPy, gguf or machine gives the same bytes
    "f16": "ee04581db3c4414bc6629d541e02c7675fb118ee591fbd9ba8753cebb9365d4d",
    "bf16": "4f2d34f6f2805e46fabb518965c1f6a46b425d3e29cf0f624366f817f0cbdbc7",
    "q8_0": "8e7d5ac9fc8a2be15464d8d5e6e931b468317c074a54883a29f503a353b85e60",
    "q4_0": "bf62f93bcf05d0fb696c7ccad6741806fe169cbfe0cc31f40e4433e6fdbddae7",
    "q4_k": "9953370ee11335989a958c8e932eb118146b7be2964f56bc2307999223dc9370",
    "mxfp4": "12f245920ef11806ad378408e6cd28f74a3459f04a255a46aa135f7062fbffbf",
}
KINDS = {
    "Q8_0": ({Type.Q8_0}, {Type.Q8_0}),
    "F16": ({Type.F16}, {Type.F16}),
    "BF16": ({Type.BF16}, {Type.BF16}),
    "Q4_0": ({Type.Q4_0}, {Type.Q6_K}),
    "Q4_K": ({Type.Q4_K, Type.Q6_K}, {Type.Q6_K}),
    "MXFP4": ({Type.MXFP4, Type.Q8_0, Type.F32}, {Type.Q8_0}),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that no other test and no user writes to."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("quant", synth.QUANTS)
def test_the_same_bytes_come_out_everywhere(quant: str) -> None:
    """A file has the recorded digest; another seed gives another file, as large, under another name."""
    file = synth.path(SHAPES[quant], quant)
    other = synth.path(SHAPES[quant], quant, seed=synth.SEED + 1)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == DIGESTS[quant]
    assert file != other
    assert file.stat().st_size == other.stat().st_size
    assert file.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("quant", synth.QUANTS)
def test_gguf_reads_types_and_centred_weights_of_the_right_size(quant: str) -> None:
    """gguf's own dequantiser finds mean 0 and standard deviation 1/sqrt(in), every row with a mean near 0."""
    reader = gguf.GGUFReader(synth.path(SHAPES[quant], quant))
    sizes = synth.SHAPES[SHAPES[quant]]
    assert {t.name for t in reader.tensors} == set(synth.tensors(sizes, quant))
    blocks, head = KINDS[quant.upper()]
    assert {
        t.tensor_type for t in reader.tensors if t.name.startswith("blk") and "norm" not in t.name
    } == blocks
    assert {t.tensor_type for t in reader.tensors if t.name == "output.weight"} == head
    matrices = 0
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        if tensor.name.endswith((".bias", "sinks.weight")):
            assert tensor.tensor_type == Type.F32
            assert 0.3 < weights.std() * np.sqrt(weights.shape[-1]) < 3, tensor.name
            assert abs(weights.mean()) < weights.std(), tensor.name
            continue
        if tensor.data.ndim == 1:
            assert tensor.tensor_type == Type.F32
            assert weights.min() >= np.float32(0.9)
            assert weights.max() <= np.float32(1.1)
            assert weights.std() > 0.04
            continue
        matrices += 1
        row = weights.shape[-1]
        assert weights.std() * np.sqrt(row) == pytest.approx(1, abs=0.05), tensor.name
        standing_out = weights.mean(axis=-1) * row  # in units of the mean's own deviation: 1 for free weights
        assert standing_out.std() < 2.5, tensor.name
        assert len(np.unique(weights)) > (18 if tensor.tensor_type == Type.MXFP4 else 250)
    assert matrices == 2 + (8 if sizes.experts else 7) * sizes.layers


@pytest.mark.parametrize("quant", synth.QUANTS)
def test_activations_neither_explode_nor_vanish(quant: str) -> None:
    """Every stage of a forward pass has values of ordinary size, and logits of different ids differ."""
    seen = {}
    with Model.load(synth.path(SHAPES[quant], quant)) as model:
        ids = np.random.default_rng(1).integers(0, model.vocab_size, 48).tolist()
        logits = model.forward([(model.new_cache(64), ids)], lambda stage, x: seen.update({stage: x.std()}))[
            0
        ]
        assert not model.report.zero_tensors
    assert len(seen) > 30
    spread = {stage: size for stage, size in seen.items() if stage != "embed" and "routed" not in stage}
    assert all(0.2 < size < 3 for size in spread.values()), seen
    assert len(set(logits.argmax(-1).tolist())) > 20


def test_text_survives_the_made_vocabulary() -> None:
    """Every byte has a token, merges apply, special tokens are whole, and the text comes back."""
    with Model.load(synth.path(SHAPE, "q8_0")) as model:
        tokenizer = model.tokenizer
        text = "Grüße, 世界! \x00\n" + "".join(synth_vocab.SPECIAL)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == "Grüße, 世界! \x00\n".encode()
        assert ids[0] == tokenizer.bos_id == model.vocab_size - 3
        assert ids[-1] == model.vocab_size - 1
        assert len(tokenizer.encode("!!", add_special=False)) == 1
        assert {model.vocab_size - 2, model.vocab_size - 1} <= tokenizer.eog_ids


@pytest.mark.parametrize(("name", "parameters"), [("llama-1b", 1.2358e9), ("llama-8b", 8.0303e9)])
@pytest.mark.parametrize("quant", [quant for quant in synth.QUANTS if quant not in synth.EXPERT_QUANTS])
def test_the_real_shapes_have_the_parameters_of_the_models(name: str, parameters: float, quant: str) -> None:
    """The tensors are those the model reads, with as many weights as the published models have."""
    s = synth.SHAPES[name]
    table = synth.tensors(s, quant)
    assert sum(np.prod(shape) for shape, _ in table.values()) == pytest.approx(parameters, rel=1e-4)
    made = network(
        vocab=s.vocab, layers=s.layers, width=s.width, heads=s.heads, kv_heads=s.kv_heads, size=s.head_dim,
        ffn=s.ffn, context=s.context, tied=s.tied, rope__freq_base=s.rope_base,
    )  # fmt: skip
    wanted = walks.tensors(made)
    assert set(table) == set(wanted)
    assert ("output.weight" in table) is not s.tied
    assert all(shape == wanted[tensor].shape for tensor, (shape, _) in table.items())


def test_gpt_oss_has_the_parameters_of_the_published_model() -> None:
    """20.9 billion weights, of which those of experts are in MXFP4 and every other matrix in Q8_0 or F32."""
    table = synth.tensors(synth.SHAPES["gpt-oss-20b"], "mxfp4")
    assert sum(np.prod(shape) for shape, _ in table.values()) == pytest.approx(20.9148e9, rel=1e-4)
    assert {type for name, (_, type) in table.items() if "_exps.weight" in name} == {Type.MXFP4}
    assert {type for name, (_, type) in table.items() if "attn_q.w" in name or "output.w" in name} == {
        Type.Q8_0
    }


@pytest.mark.parametrize("layers", [16, 32])
def test_half_of_the_layers_have_more_bits(layers: int) -> None:
    """As llama.cpp's Q4_K_M: the first and last eighth, and every third between."""
    chosen = [n for n in range(layers) if synth.more_bits(n, layers)]
    assert len(chosen) == layers // 2
    eighth = layers // 8
    assert chosen[:eighth] == list(range(eighth))
    assert chosen[-eighth:] == list(range(layers - eighth, layers))


@pytest.mark.parametrize("type", sorted(synth_blocks.BLOCKS))
def test_pieces_join_without_a_seam(type: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes do not depend on how many are made at a time."""

    def made() -> bytes:
        pieces = synth_blocks.pieces(np.random.SFC64(3), (33, 512), type)
        return b"".join(piece.tobytes() for piece in pieces)

    whole = made()
    monkeypatch.setattr(synth_blocks, "CHUNK", len(whole) // 3)
    assert len(list(synth_blocks.pieces(np.random.SFC64(3), (33, 512), type))) > 2
    assert made() == whole
    assert len(whole) == synth_blocks.nbytes((33, 512), type)


def test_a_model_spec_finds_the_file_whatever_the_case() -> None:
    """`synth:SHAPE:TYPE` resolves to one file, made once."""
    file = resolve_model(f"synth:{SHAPE}:Q8_0")
    stamp = file.stat().st_mtime_ns
    assert resolve_model(f"synth:{SHAPE}:q8_0") == file
    assert file.stat().st_mtime_ns == stamp
    assert not [p for p in file.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("synth:llama-9b:q8_0", UsageError, "unknown shape.*llama-8b.*'llama-9b'"),
        ("synth:llama-1b", UsageError, "unknown block type.*q4_k"),
        ("synth:llama-1b:q9", UsageError, "unknown block type.*'q9'"),
        ("synth:gpt-oss-20b:q8_0", ModelFileError, "no type 'q8_0': expected one of mxfp4"),
        ("synth:llama-1b:mxfp4", ModelFileError, "no type 'mxfp4': expected one of f16"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(spec: str, error: type[Exception], words: str) -> None:
    """Unknown names list the known ones; a shape without its architecture is refused by name."""
    with pytest.raises(error, match=words) as caught:
        resolve_model(spec)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 8B file on a disk with 1 GiB free: one sentence with both figures, and no file."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**30, 2**30))
    with pytest.raises(ModelFileError, match=r"8\.0 GiB free, got 1\.0.*PRILL_CACHE") as caught:
        resolve_model("synth:llama-8b:q8_0")
    assert caught.value.exit_code == 4
    folder = synth.cache_folder() / "synth"
    assert {p.suffix for p in folder.iterdir()} <= {".lock"}


def test_an_interrupted_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file appears whole or not at all."""

    def broken(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synth_blocks, "pieces", broken)
    with pytest.raises(FixtureError, match="No space left on device; point PRILL_CACHE"):
        synth.path(SHAPE, "q8_0")
    assert {p.suffix for p in (synth.cache_folder() / "synth").iterdir()} <= {".lock"}


def test_a_vocabulary_without_room_for_a_merge_is_refused(tmp_path: Path) -> None:
    """Below 260 tokens there is none."""
    with pytest.raises(ValueError, match="at least 260"):
        synth_vocab.describe(gguf.GGUFWriter(tmp_path / "x", "llama"), 259)
