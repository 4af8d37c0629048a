"""A file loads only if every key and tensor is what its architecture reads, and the pass uses them all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from prill_runtime.errors import ModelFileError, PrillError, UnsupportedModel
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import walks
from prill_runtime.models.base import Node
from prill_runtime.models.load import LoadReport, Wired, describe, examine
from prill_runtime.models.load import load as load_file
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.network import Head
from prill_runtime.models.nodes.norms import Norm
from prill_runtime.models.nodes.rope import Rope
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.run.model import Model

from .tiny_gguf import Edit, tiny

Floats = NDArray[np.float32]
ARCHS = ("llama", "gpt2")
U32, F32, STRING = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING
BOOL = gguf.GGUFValueType.BOOL


def key(name: str, value: Any, type: gguf.GGUFValueType) -> Callable[[gguf.GGUFWriter], None]:
    """Set one key, in the place of what the writer has; None removes it."""

    def change(writer: gguf.GGUFWriter) -> None:
        for shard in writer.kv_data:
            shard.pop(name, None)
        if value is not None:
            writer.add_key_value(name, value, type)

    return change


def load(path: Path) -> tuple[Wired, LoadReport]:
    with open_gguf(path) as file:
        return load_file(file, NumpyBackend())


def config(path: Path) -> dict[str, Any]:
    with open_gguf(path) as file:
        return walks.effective(examine(file)[0])


def logits(path: Path) -> Floats:
    with Model.load(path, dtype="float64") as model:
        return model.forward([(model.new_cache(), [5, 300, 7, 261, 9])])[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_effective_configuration_is_the_files(arch: str, tmp_path: Path) -> None:
    """Every name of the contract, with the file's value; what the architecture lacks is missing."""
    with Model.load(tiny(tmp_path / "m.gguf", arch)) as model:
        common = {"architecture": arch, "vocab_size": 320, "n_layers": 2, "head_dim": 16}
        common |= {"context_length": 64, "norm_eps": float(np.float32(1e-5))}
        own: dict[str, object] = {
            "llama": {
                "width": 64,
                "n_heads": 4,
                "n_kv_heads": 2,
                "ffn": 96,
                "tied_head": False,
                "rope_base": 10000.0,
                "rope_dim": 16,
                "rope_scaling": "none",
                "rope_factor": 1.0,
            },
            "gpt2": {"width": 48, "n_heads": 3, "n_kv_heads": 3, "ffn": 80, "tied_head": True},
        }[arch]
        assert model.config == {**common, **own}


LLAMA_KEYS = [
    ("embedding_length", None, U32, "no such key"),
    ("embedding_length", 0, U32, "an integer from 1"),
    ("embedding_length", 64.0, F32, "got 64.0"),
    ("block_count", None, U32, "no such key"),
    ("block_count", 1 << 31, U32, "an integer from 1 to 2147483647"),
    ("feed_forward_length", None, U32, "no such key"),
    ("context_length", 0, U32, "an integer from 1"),
    ("attention.head_count", None, U32, "no such key"),
    ("attention.head_count", 5, U32, "a divisor of 5, got 2|a divisor of 64, got 5"),
    ("attention.head_count_kv", 3, U32, "a divisor of 4, got 3"),
    ("attention.key_length", 0, U32, "an integer from 1"),
    ("attention.layer_norm_rms_epsilon", None, F32, "no such key"),
    ("attention.layer_norm_rms_epsilon", float("nan"), F32, "a finite number above 0, got nan"),
    ("attention.layer_norm_rms_epsilon", -1.0, F32, "a finite number above 0, got -1.0"),
    ("attention.layer_norm_rms_epsilon", "small", STRING, "a finite number above 0, got 'small'"),
    ("rope.freq_base", 0.0, F32, "a finite number above 0, got 0.0"),
    ("rope.freq_base", float("inf"), F32, "a finite number above 0, got inf"),
    ("rope.dimension_count", 15, U32, "an even number up to the head dimension 16, got 15"),
    ("rope.dimension_count", 18, U32, "an even number up to the head dimension 16, got 18"),
    ("rope.scaling.type", 1, U32, "a string, got 1"),
    ("vocab_size", 319, U32, "320, the rows of token_embd.weight, got 319"),
]


@pytest.mark.parametrize(("name", "value", "type", "sentence"), LLAMA_KEYS)
def test_a_bad_key_is_named_with_expected_and_got(
    name: str, value: Any, type: gguf.GGUFValueType, sentence: str, tmp_path: Path
) -> None:
    """Absent, of the wrong type, out of range, or at odds with another: one sentence that names the key."""
    with pytest.raises(ModelFileError, match=sentence) as error:
        load(tiny(tmp_path / "m.gguf", metadata=key(f"llama.{name}", value, type)))
    assert f"llama.{name}" in str(error.value)
    assert "\n" not in str(error.value)


UNSUPPORTED = [
    ("llama", "expert_count", 8, U32, "expert_count.*mixtures of experts.*expected 0, got 8"),
    ("gpt2", "expert_count", 2, U32, "expert_count.*mixtures of experts"),
    ("llama", "rope.scaling.type", "dynamic", STRING, "rotary scaling.*linear or yarn, got 'dynamic'"),
    ("llama", "attention.value_length", 8, U32, "value_length.*different sizes.*expected 16, got 8"),
    ("gpt2", "attention.head_count_kv", 1, U32, "grouped queries.*expected 3, got 1"),
]


@pytest.mark.parametrize(("arch", "name", "value", "type", "sentence"), UNSUPPORTED)
def test_what_is_not_implemented_is_said(
    arch: str, name: str, value: Any, type: gguf.GGUFValueType, sentence: str, tmp_path: Path
) -> None:
    """A sound file that needs more than the forward pass has is refused, never run wrongly."""
    with pytest.raises(UnsupportedModel, match=sentence):
        load(tiny(tmp_path / "m.gguf", arch, metadata=key(f"{arch}.{name}", value, type)))


def test_per_layer_sizes_are_refused_unless_equal(tmp_path: Path) -> None:
    """An array of one value repeated is that value; different values are not implemented."""

    def sizes(second: int) -> Callable[[gguf.GGUFWriter], None]:
        def change(writer: gguf.GGUFWriter) -> None:
            key("llama.feed_forward_length", None, U32)(writer)
            writer.add_array("llama.feed_forward_length", [96, second])

        return change

    assert config(tiny(tmp_path / "same.gguf", metadata=sizes(96)))["ffn"] == 96
    with pytest.raises(UnsupportedModel, match=r"feed_forward_length.*different sizes.*\[96, 95\]"):
        load(tiny(tmp_path / "other.gguf", metadata=sizes(95)))


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    """The sentence says which architecture the file has and which ones there are."""
    metadata = key("general.architecture", "mamba", STRING)
    with pytest.raises(UnsupportedModel, match=r"expected gemma2 or .*gpt2 or .*llama or .*, got 'mamba'"):
        load(tiny(tmp_path / "m.gguf", metadata=metadata))


def drop(name: str) -> Edit:
    return lambda tensors: (tensors.pop(name), None)[1]


def put(name: str, *shape: int) -> Edit:
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


def required(arch: str, tmp_path: Path) -> list[str]:
    with open_gguf(tiny(tmp_path / "all.gguf", arch)) as file:
        return [name for name in walks.tensors(describe(file)) if name != "output.weight"]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_required_tensor_is_required(arch: str, tmp_path: Path) -> None:
    """Without any one of them the load fails and names it."""
    names = required(arch, tmp_path)
    assert len(names) == {"llama": 2 + 2 * 9, "gpt2": 4 + 2 * 12}[arch]
    for name in names:
        with pytest.raises(ModelFileError, match=re.escape(name)):
            load(tiny(tmp_path / "m.gguf", arch, edit=drop(name)))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tensor_has_its_shape(arch: str, tmp_path: Path) -> None:
    """One column more in any tensor fails with expected and got, also where the optional head is."""
    for name in [*required(arch, tmp_path), "output.weight"]:
        got: list[tuple[int, ...]] = []

        def widen(tensors: dict[str, Floats], name: str = name, got: list[Any] = got) -> None:
            old = tensors.get(name, tensors["token_embd.weight"])
            tensors[name] = np.ones((*old.shape[:-1], old.shape[-1] + 32), np.float32)
            got.append(tensors[name].shape)

        with pytest.raises(ModelFileError, match="shape") as error:
            load(tiny(tmp_path / "m.gguf", arch, edit=widen))
        assert str(got[0]) in str(error.value) or name == "token_embd.weight"


def test_a_transposed_matrix_is_refused(tmp_path: Path) -> None:
    """Swapped dimensions of a non-square matrix are a wrong shape, not a reshape."""

    def swap(tensors: dict[str, Floats]) -> None:
        tensors["blk.1.ffn_down.weight"] = np.ascontiguousarray(tensors["blk.1.ffn_down.weight"].T)

    with pytest.raises(ModelFileError, match=r"blk.1.ffn_down.weight.*expected \(64, 96\), got \(96, 64\)"):
        load(tiny(tmp_path / "m.gguf", edit=swap))


def test_a_tensor_that_nothing_reads_fails_the_load(tmp_path: Path) -> None:
    """Up to five names are listed, the rest counted."""

    def extra(tensors: dict[str, Floats]) -> None:
        tensors |= {f"blk.0.extra_{number}.weight": np.ones(2, np.float32) for number in range(7)}

    with pytest.raises(ModelFileError, match=r"7 tensors would not be used.*extra_4.weight and 2 more"):
        load(tiny(tmp_path / "m.gguf", edit=extra))
    with pytest.raises(ModelFileError, match=r"1 tensors would not be used.*got blk.2.attn_q.weight$"):
        load(tiny(tmp_path / "m.gguf", edit=put("blk.2.attn_q.weight", 64, 64)))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tensor_changes_the_logits(arch: str, tmp_path: Path) -> None:
    """No tensor is loaded and left unwired: a change in any one of them is seen in the logits."""

    def every_optional(tensors: dict[str, Floats]) -> None:
        tensors.setdefault("output.weight", tensors["token_embd.weight"][::-1].copy())
        if arch == "llama":
            tensors["rope_freqs.weight"] = np.linspace(1, 2, 8, dtype=np.float32)
            for name in [name for name in tensors if name.startswith("blk.") and "norm" not in name]:
                tensors[name.replace("weight", "bias")] = np.full(len(tensors[name]), 0.1, np.float32)

    path = tmp_path / "m.gguf"
    with Model.load(tiny(path, arch, edit=every_optional), dtype="float64") as model:
        ids = [5, 300, 7, 261, 9]
        clean = model.forward([(model.new_cache(), ids)])[0]
        weights = model.weights
        assert len(weights) == {"llama": 4 + 2 * 16, "gpt2": 5 + 2 * 12}[arch]
        for name, weight in weights.items():
            kept = weight.copy()
            weight[...] = weight[..., ::-1] * 1.25 + 0.05
            changed = model.forward([(model.new_cache(), ids)])[0]
            weight[...] = kept
            # A bias on keys alone moves all scores of a row alike, but for the rotation.
            assert np.abs(changed - clean).max() > 1e-6, name
        np.testing.assert_array_equal(model.forward([(model.new_cache(), ids)])[0], clean)


@pytest.mark.parametrize(
    ("field", "kind", "changes"),
    [
        ("norm_eps", Norm, {"eps": 1e-3}),
        ("rope_base", Rope, {"base": 500.0}),
        ("rope_factor", Rope, {"factor": 2.0}),
        ("rope_dim", Rope, {"dim": 8}),
        ("window", Attention, {"window": 2}),
        ("tied_head", Head, {"tied": True, "name": "token_embd"}),
    ],
)
def test_the_pass_reads_its_nodes(
    field: str, kind: type[Node], changes: dict[str, Any], tmp_path: Path
) -> None:
    """Replacing one value in all nodes of a kind changes the logits and what is reported."""
    with Model.load(tiny(tmp_path / "m.gguf"), dtype="float64") as model:
        ids = [5, 300, 7, 261, 9]
        clean = model.forward([(model.new_cache(), ids)])[0]
        model._wired = Wired(changed(model.network, kind, changes), model.weights)
        assert np.abs(model.forward([(model.new_cache(), ids)])[0] - clean).max() > 1e-6
        assert model.config[field] == next(iter(changes.values()))


def changed(node: Any, kind: type[Node], values: dict[str, Any]) -> Any:
    """The node with other values in all its parts of a kind."""

    def part(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(part, value))
        return changed(value, kind, values) if isinstance(value, Node) else value

    inner = {field.name: part(getattr(node, field.name)) for field in fields(node)}
    return replace(node, **(inner | values if isinstance(node, kind) else inner))


def test_optional_metadata_reaches_the_pass(tmp_path: Path) -> None:
    """Rope base, linear scaling (both spellings), window and head size of the file are what the pass uses."""
    plain = logits(tiny(tmp_path / "plain.gguf"))

    def scaled(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    older = logits(tiny(tmp_path / "old.gguf", metadata=key("llama.rope.scale_linear", 2.0, F32)))
    newer = logits(tiny(tmp_path / "new.gguf", metadata=scaled))
    np.testing.assert_array_equal(older, newer)
    bare = logits(tiny(tmp_path / "bare.gguf", metadata=key("llama.rope.scaling.factor", 2.0, F32)))
    np.testing.assert_array_equal(bare, newer)  # a factor without its type is linear
    changed = [
        newer,
        logits(tiny(tmp_path / "base.gguf", metadata=key("llama.rope.freq_base", 5e5, F32))),
        logits(tiny(tmp_path / "window.gguf", metadata=key("llama.attention.sliding_window", 2, U32))),
        logits(tiny(tmp_path / "dim.gguf", metadata=key("llama.rope.dimension_count", 8, U32))),
    ]
    assert all(np.abs(one - plain).max() > 1e-6 for one in changed)
    same = logits(tiny(tmp_path / "default.gguf", metadata=key("llama.rope.freq_base", None, F32)))
    np.testing.assert_array_equal(same, plain)  # 10000 when absent
    wide = tiny(
        tmp_path / "wide.gguf",
        head_dim=24,
        metadata=lambda w: (w.add_key_length(24), w.add_value_length(24))[0],
    )
    assert config(wide)["head_dim"] == 24


def test_without_a_head_the_embedding_is_the_head(tmp_path: Path) -> None:
    """A file without output.weight gives what a file with a copy of the embedding gives, and says so."""

    def copied(tensors: dict[str, Floats]) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"].copy()

    tied = tiny(tmp_path / "tied.gguf", edit=drop("output.weight"))
    np.testing.assert_array_equal(logits(tied), logits(tiny(tmp_path / "copied.gguf", edit=copied)))
    assert np.abs(logits(tied) - logits(tiny(tmp_path / "own.gguf"))).max() > 1e-3
    assert load(tied)[1].tied_head
    assert config(tied)["tied_head"]


def test_the_report_counts_and_names(tmp_path: Path) -> None:
    """Tensors, parameters and bytes are the file's; zero matrices and unread keys are named."""

    def zero(tensors: dict[str, Floats]) -> None:
        tensors["blk.1.ffn_down.weight"][...] = 0
        tensors["blk.0.attn_q.bias"] = np.zeros(64, np.float32)  # a zero vector is ordinary

    path = tiny(tmp_path / "m.gguf", edit=zero)
    report = load(path)[1]
    with open_gguf(path) as file:
        elements = sum(int(np.prod(info.shape)) for info in file.tensors.values())
        assert (report.tensors, report.parameters) == (len(file.tensors), elements)
    assert report.nbytes == 4 * elements
    assert report.zero_tensors == ("blk.1.ffn_down.weight",)


@pytest.mark.parametrize(
    ("arch", "name", "value", "type"),
    [
        ("llama", "residual_scale", 2.0, F32),
        ("llama", "attention.clamp_kqv", 8.0, F32),
        ("llama", "attention.causal", False, BOOL),
        ("llama", "attention.layer_norm_epsilon", 1e-6, F32),
        ("gpt2", "rope.freq_base", 1e6, F32),
        ("gpt2", "attention.sliding_window", 128, U32),
        ("llama", "something_new", "a", STRING),
    ],
)
def test_a_key_that_nothing_reads_is_an_error(
    arch: str, name: str, value: Any, type: gguf.GGUFValueType, tmp_path: Path
) -> None:
    """What may change the result and is not read would give wrong numbers: the error names key and value."""
    with pytest.raises(UnsupportedModel, match="may change the result is not read") as error:
        load(tiny(tmp_path / "m.gguf", arch, metadata=key(f"{arch}.{name}", value, type)))
    assert f"{arch}.{name} = {value}"[:24] in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "type"),
    [
        ("residual_scale", 1.0, F32),
        ("attention.causal", True, BOOL),
        ("rope.scaling.original_context_length", 64, U32),
        ("expert_used_count", 2, U32),
    ],
)
def test_a_key_that_changes_nothing_is_left_unread(
    name: str, value: Any, type: gguf.GGUFValueType, tmp_path: Path
) -> None:
    """Keys that only describe, or that say what holds anyway, keep no file from loading or change it."""
    said = tiny(tmp_path / "said.gguf", metadata=key(f"llama.{name}", value, type))
    np.testing.assert_array_equal(logits(said), logits(tiny(tmp_path / "plain.gguf")))


@pytest.mark.parametrize("arch", ARCHS)
def test_quantised_files_load_as_their_dequantised_values(arch: str, tmp_path: Path) -> None:
    """A Q8_0 file gives bit for bit the logits of an F32 file with the same values."""
    kind = gguf.GGMLQuantizationType.Q8_0
    sizes = {"width": 64, "n_heads": 4, "n_kv_heads": 4 if arch == "gpt2" else 2, "ffn": 96}

    def through(tensors: dict[str, Floats]) -> None:
        for name, array in tensors.items():
            if array.ndim == 2:
                tensors[name] = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)

    quantised = logits(tiny(tmp_path / "q.gguf", arch, type=kind, **sizes))
    np.testing.assert_array_equal(quantised, logits(tiny(tmp_path / "f.gguf", arch, edit=through, **sizes)))


def test_no_embedding_table_is_a_sentence(tmp_path: Path) -> None:
    """The table decides the vocabulary, so a file without one, or with a vector, stops there."""
    for edit in (drop("token_embd.weight"), put("token_embd.weight", 64)):
        with pytest.raises(PrillError, match=r"token_embd.weight \(vocab, width\)"):
            load(tiny(tmp_path / "m.gguf", edit=edit))
