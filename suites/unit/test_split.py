"""Split models: the first part brings the others, and everything reads the model as if it were one file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from prill_harness import open_engine
from prill_harness.plan.provenance import model_facts
from prill_harness.records.evidence import Status
from prill_harness.stages.subject import open_subject
from prill_harness.tokens.golden import golden_for
from prill_runtime.errors import ModelFileError, UnsupportedModel
from prill_runtime.gguf.file import open_gguf
from prill_runtime.run.model import require_loadable
from prill_suites.common import file_parts, file_tensors

from .commandline import child
from .test_suites import run
from .tiny_gguf import LLAMA, add_config, add_tokenizer, llama_tensors, tiny, write_gguf

COUNT = 3
IDS = [1, 260, 270, 300, 7]


def split(
    folder: Path,
    *,
    empty_first: bool = False,
    numbers: Mapping[int, int] | None = None,
    twice: str = "",
    promised: int | None = None,
) -> Path:
    """The model of tiny(), in three parts as llama.cpp's gguf-split writes them; the first part's path.

    Args:
        empty_first: the first part holds metadata alone. numbers: split.no of a part, where it lies.
        twice: a tensor that the last part holds as well. promised: tensors in all, where that lies.
    """
    tensors = llama_tensors(LLAMA, 320, np.random.default_rng(0))
    names = list(tensors)
    cuts = [0, 0 if empty_first else 9, 14, len(names)]
    for part in range(COUNT):

        def places(writer: gguf.GGUFWriter, part: int = part) -> None:
            if part:
                del writer.kv_data[0][gguf.Keys.General.ARCHITECTURE]
            writer.add_uint16("split.no", (numbers or {}).get(part, part))
            writer.add_uint16("split.count", COUNT)
            writer.add_int32("split.tensors.count", len(names) if promised is None else promised)

        steps: list[Callable[[gguf.GGUFWriter], None]] = [places]
        if part == 0:
            steps += [lambda w: add_config(w, "llama", LLAMA), lambda w: add_tokenizer(w, "llama", 320)]
        held = names[cuts[part] : cuts[part + 1]] + [twice] * (part == COUNT - 1 and bool(twice))
        write_gguf(folder / called(part), "llama", {name: tensors[name] for name in held}, steps)
    return folder / called(0)


def called(part: int) -> str:
    return f"barley-{part + 1:05}-of-{COUNT:05}.gguf"


@pytest.mark.parametrize("empty_first", [False, True])
def test_a_split_model_is_the_whole_one(empty_first: bool, tmp_path: Path) -> None:
    """Tensors, configuration, ids and logits are bit for bit those of the unsplit file."""
    first, whole = split(tmp_path, empty_first=empty_first), tiny(tmp_path / "whole.gguf")
    with open_gguf(first) as parts, open_gguf(whole) as one:
        assert list(parts.tensors) == list(one.tensors)
        assert len(parts.paths) == COUNT
        assert {info.part for info in parts.tensors.values()} == ({1, 2} if empty_first else {0, 1, 2})
        for name in one.tensors:
            assert parts.raw(name).tobytes() == one.raw(name).tobytes()
    with open_engine("numpy", first) as mine, open_engine("numpy", whole) as theirs:
        assert mine.info.config == theirs.info.config
        assert mine.tokenize("the mill") == theirs.tokenize("the mill")
        assert np.array_equal(mine.logits(IDS), theirs.logits(IDS))


def test_the_digest_covers_all_parts(tmp_path: Path) -> None:
    """It is that of the parts one behind the other, in the engine, the ledger and by hashlib alone."""
    first = split(tmp_path)
    parts = [tmp_path / called(part) for part in range(COUNT)]
    wanted = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    with open_gguf(first) as file:
        assert file.sha256 == wanted
        assert file.size == sum(part.stat().st_size for part in parts)
    assert model_facts(str(first)) == {
        "model_sha256": wanted, "architecture": "llama", "features": "gate,gqa,rms_norm,rope,silu",
    }  # fmt: skip
    assert file_parts(first) == tuple(parts)


def test_readers_apart_from_the_runtime_follow_the_parts(tmp_path: Path) -> None:
    """gguf's reader in the suites and the subject of bisect see every tensor, with its values."""
    first, whole = split(tmp_path), tiny(tmp_path / "whole.gguf")
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(whole).tensors}
    found = file_tensors(first)
    assert [tensor.name for tensor in found] == list(theirs)
    with open_subject(first) as subject:
        for tensor in found:
            assert np.array_equal(tensor.data, theirs[tensor.name])
            values = subject.weight(tensor.name)
            assert values is not None
            assert np.array_equal(values, theirs[tensor.name])


def test_the_suite_is_green_on_a_split_model(tmp_path: Path) -> None:
    """Every check of the file suite that reads it passes, and what was observed lies in all parts."""
    first = split(tmp_path)
    checks = ("digest", "engine_digest", "configuration", "tensors", "weights", "scales")
    evidence = run(tmp_path, "file", *(f"file.{check}" for check in checks), model=str(first))
    wrong = {check: r.sentence for check, r in evidence.items() if r.status is not Status.PASSED}
    assert not wrong
    assert len(evidence) == 6
    with open_gguf(first) as file:
        weights = sum(int(np.prod(info.shape)) for info in file.tensors.values())
    assert evidence["file.weights"].observed == weights


def test_a_damaged_tensor_of_a_later_part_is_found(tmp_path: Path) -> None:
    """Zeros at the end of the last part turn the suite red, with the tensor's name."""
    first, last = split(tmp_path), tmp_path / called(2)
    data = bytearray(last.read_bytes())
    data[-20_000:] = bytes(20_000)
    last.write_bytes(data)
    (record,) = run(tmp_path, "file", "file.tensors", model=str(first)).values()
    assert record.status is Status.FAILED
    assert "output.weight: 5000 of 20480 weights are zero in a run" in record.sentence


def test_links_to_parts_are_followed_by_their_own_names(tmp_path: Path) -> None:
    """As in a Hugging Face cache: the folder holds links, and what they point to has other names."""
    blobs, links = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    links.mkdir()
    split(blobs)
    for number in range(COUNT):
        (blobs / called(number)).rename(blobs / f"{number}f7c")
        (links / called(number)).symlink_to(blobs / f"{number}f7c")
    with open_gguf(links / called(0)) as file:
        assert len(file.tensors) == 21


def test_a_golden_is_that_of_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another later part is another model: it gets a golden of its own."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    first = split(tmp_path)
    before = golden_for(first).fingerprint.model_sha256
    last = tmp_path / called(2)
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    assert golden_for(first).fingerprint.model_sha256 != before


def lost(folder: Path) -> None:
    split(folder)
    (folder / called(1)).unlink()


def renamed(folder: Path) -> None:
    split(folder).rename(folder / "first.gguf")


def exchanged(folder: Path) -> None:
    split(folder, numbers={1: 2})


def repeated(folder: Path) -> None:
    split(folder, twice="token_embd.weight")


def too_few(folder: Path) -> None:
    split(folder, promised=25)


def damaged_later(folder: Path) -> None:
    split(folder)
    (folder / called(2)).write_bytes((folder / called(2)).read_bytes()[:-200])


def out_of_range(folder: Path) -> None:
    split(folder, numbers={0: 3})


WRONG: list[tuple[Callable[[Path], None], str]] = [
    (lost, r"part 2 of 3 of the split model is missing: expected barley-00002-of-00003.gguf in"),
    (
        renamed,
        r"part 2 of 3 .* cannot be found by this name: expected a name that ends in -00001-of-00003.gguf",
    ),
    (exchanged, r"part 2 of 3 .* is another file: expected split.no 1 and split.count 3, got 2 and 3"),
    (repeated, r"part 3 of 3 .* repeats a tensor: .* got 'token_embd.weight'"),
    (too_few, r"tensors of the split model are missing: expected 25, got 21"),
    (damaged_later, r"barley-00003-of-00003.gguf.* runs past the end of the file"),
    (out_of_range, r"split.no is out of range: expected 0 to 2, got 3"),
]


@pytest.mark.parametrize(("spoil", "says"), WRONG, ids=lambda s: getattr(s, "__name__", ""))
def test_parts_that_make_no_model_are_one_sentence(
    spoil: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    """A lost, renamed, exchanged, repeated or damaged part is named; nothing is read as half a model."""
    spoil(tmp_path)
    first = tmp_path / ("first.gguf" if spoil is renamed else called(0))
    with pytest.raises(ModelFileError, match=says):
        open_gguf(first)


def test_a_later_part_is_no_model(tmp_path: Path) -> None:
    """It can be looked at, and is refused as a model with the name of the first part."""
    split(tmp_path)
    second = tmp_path / called(1)
    with open_gguf(second) as file:
        assert file.place == (1, 3)
        assert len(file.tensors) == 5
        assert file.architecture == ""
    with pytest.raises(UnsupportedModel, match=r"part 2 of 3 of a split model.*barley-00001-of-00003.gguf"):
        require_loadable(second)
    assert child("inspect", str(second)).returncode == 0


def test_a_missing_architecture_is_still_a_defect_of_a_whole_file(tmp_path: Path) -> None:
    """Only a later part may lack it."""

    def without(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0][gguf.Keys.General.ARCHITECTURE]
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 1)

    path = tiny(tmp_path / "m.gguf", metadata=without)
    with pytest.raises(ModelFileError, match=r"general\.architecture is missing"):
        open_gguf(path)
