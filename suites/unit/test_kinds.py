"""What is no model, or none that can be judged, is refused before anything runs: one sentence, exit 4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from prill_harness import open_engine
from prill_harness.commands.shared import door
from prill_runtime.errors import PrillError

from .commandline import invoke
from .tiny_gguf import Floats, tiny

Keys = Callable[[gguf.GGUFWriter], None]


def ones(*shape: int) -> Floats:
    return np.ones(shape, np.float32)


def write(path: Path, arch: str, keys: Keys, tensors: dict[str, Floats]) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    keys(writer)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def typed(kind: str) -> Keys:
    return lambda writer: writer.add_type(kind)


def untyped(writer: gguf.GGUFWriter) -> None:
    """Files older than general.type."""


def vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"])


LORA = {"blk.0.attn_q.weight.lora_a": ones(4, 64), "blk.0.attn_q.weight.lora_b": ones(64, 4)}
PROJECTOR = {"mm.0.weight": ones(8, 8), "v.blk.0.attn_q.weight": ones(8, 8)}
MATRIX = {"blk.0.attn_q.weight.in_sum2": ones(1, 64), "blk.0.attn_q.weight.counts": ones(1, 1)}
FILES: dict[str, tuple[str, Keys, dict[str, Floats], str]] = {
    "adapter": ("llama", typed("adapter"), LORA, "is a LoRA adapter"),
    "adapter by its tensors": ("llama", untyped, LORA, "is a LoRA adapter"),
    "adapter by its type": ("llama", typed("adapter"), {"x": ones(4, 4)}, "is a LoRA adapter"),
    "projector": ("clip", typed("mmproj"), PROJECTOR, "is a multimodal projector"),
    "projector by its architecture": ("clip", untyped, {"x": ones(4, 4)}, "is a multimodal projector"),
    "projector by its tensors": ("llama", untyped, PROJECTOR, "is a multimodal projector"),
    "imatrix": ("llama", typed("imatrix"), MATRIX, "is an importance matrix"),
    "imatrix by its tensors": ("imatrix", untyped, MATRIX, "is an importance matrix"),
    "control vector": ("controlvector", untyped, {"direction.1": ones(64)}, "is a control vector"),
    "vocabulary": ("llama", vocabulary, {}, "is a vocabulary only"),
    "another type": (
        "llama",
        typed("poem"),
        {"x": ones(4, 4)},
        "not a model by its general.type: expected model",
    ),
    "architecture": (
        "lemma",
        typed("model"),
        {"x": ones(4, 4)},
        "unknown architecture: expected gemma2 or gemma3 or gpt-oss or gpt2 or",
    ),
}


def lacking(tensors: dict[str, Floats]) -> None:
    del tensors["blk.1.ffn_up.weight"]


def of_type(path: Path, type: gguf.GGMLQuantizationType) -> Path:
    """A small model in which one matrix has another type."""
    writer = gguf.GGUFWriter(path, "llama")
    source = gguf.GGUFReader(tiny(path.with_suffix(".whole"), width=256, ffn=256))
    from .tiny_gguf import LLAMA, add_config, add_tokenizer

    add_config(writer, "llama", LLAMA | {"width": 256, "ffn": 256})
    add_tokenizer(writer, "llama", 320)
    for tensor in source.tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            nbytes = 256 // gguf.GGML_QUANT_SIZES[type][0] * gguf.GGML_QUANT_SIZES[type][1]
            writer.add_tensor(tensor.name, np.zeros((256, nbytes), np.uint8), raw_dtype=type)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path, says: str) -> None:
    """The door and the loader refuse the file with the same sentence."""
    with pytest.raises(PrillError) as asked:
        door.examine(["numpy"], [str(path)])
    with pytest.raises(PrillError) as loader:
        open_engine("numpy", path)
    sentence = str(asked.value)
    assert (asked.value.exit_code, sentence) == (4, str(loader.value))
    assert says in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named(kind: str, tmp_path: Path) -> None:
    """By what it says of itself, or by what it holds, and the sentence names the file."""
    arch, keys, tensors, says = FILES[kind]
    path = write(tmp_path / "thing.gguf", arch, keys, tensors)
    refused(path, says)
    refused(path, "thing.gguf")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """Before anything runs, with the tensor's name."""
    refused(tiny(tmp_path / "m.gguf", edit=lacking), "blk.1.ffn_up.weight")


@pytest.mark.parametrize("name", ["IQ3_S", "Q8_1", "TQ1_0", "IQ2_XXS", "F64"])
def test_a_tensor_type_without_decoder_is_named(name: str, tmp_path: Path) -> None:
    """Tensor and type, in the sentence."""
    path = of_type(tmp_path / "m.gguf", gguf.GGMLQuantizationType[name])
    refused(path, "the type of tensor blk.1.ffn_down.weight is not implemented")
    refused(path, f"got {name}")


def test_a_model_says_that_it_is_one(tmp_path: Path) -> None:
    """general.type "model", or none at all, is a model; a negative control of the refusals above."""
    for number, keys in enumerate((typed("model"), untyped)):
        path = tiny(tmp_path / f"{number}.gguf", metadata=keys)
        door.examine(["numpy"], [str(path)])


COMMANDS = {
    "generate": ("generate", "--prompt", "a", "--model"),
    "run": ("run", "file", "--model"),
    "gate": ("gate", "--model"),
    "golden record": ("golden", "record"),
    "golden show": ("golden", "show"),
    "golden compare": ("golden", "compare", "--model"),
    "bisect": ("bisect", "--tokens", "4", "--model"),
    "trace": ("trace", "--ids", "1,2", "--model"),
    "leak": ("leak", "--model"),
    "bench": ("bench", "--model"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_same_door(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence on stderr, exit 4, nothing on stdout and nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "thing.gguf"
    for arch, keys, tensors, says in FILES.values():
        write(path, arch, keys, tensors)
        result = invoke(*COMMANDS[command], str(path))
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1), result.stderr
        assert says in result.stderr
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", FILES)
def test_inspect_shows_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    """To look at a file it need not be a model."""
    arch, keys, tensors, _ = FILES[kind]
    result = invoke("inspect", str(write(tmp_path / "thing.gguf", arch, keys, tensors)))
    assert result.exit_code == 0, result.stderr
    assert f"{len(tensors)} tensors" in result.stdout
