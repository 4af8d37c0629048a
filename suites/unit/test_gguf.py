"""The GGUF reader: sound files read back equal, malformed ones give one sentence."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from prill_fixtures import malformed
from prill_fixtures.malformed import Malformed
from prill_runtime.errors import InvalidParameter, ModelFileError, PrillError
from prill_runtime.gguf.file import check_tokenizer, open_gguf
from prill_runtime.quants.layouts import dequantize, supported_types

CORPUS = list(malformed.corpus(malformed.sound()))
VALUES: list[tuple[str, Any, GGUFValueType]] = [
    ("v.u8", 255, GGUFValueType.UINT8),
    ("v.i8", -128, GGUFValueType.INT8),
    ("v.u16", 65_535, GGUFValueType.UINT16),
    ("v.i16", -32_768, GGUFValueType.INT16),
    ("v.u32", 2**32 - 1, GGUFValueType.UINT32),
    ("v.i32", -(2**31), GGUFValueType.INT32),
    ("v.u64", 2**64 - 1, GGUFValueType.UINT64),
    ("v.i64", -(2**63), GGUFValueType.INT64),
    ("v.f32", 0.5, GGUFValueType.FLOAT32),
    ("v.f64", 0.1, GGUFValueType.FLOAT64),
    ("v.true", True, GGUFValueType.BOOL),
    ("v.false", False, GGUFValueType.BOOL),
    ("v.text", "é\n漢字 🎉", GGUFValueType.STRING),
    ("v.empty_text", "", GGUFValueType.STRING),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A file by gguf's own writer: every value type, arrays, and a tensor of every type there is."""
    path = tmp_path_factory.mktemp("gguf") / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value, type in VALUES:
        writer.add_key_value(key, value, type)
    arrays = {
        "a.int": [1, -2, 3],
        "a.float": [0.5, -1.5],
        "a.bool": [True, False, True],
        "a.text": ["", "é", "x" * 3000, "漢"],
    }
    for key, array in arrays.items():
        writer.add_array(key, array)
    rng = np.random.default_rng(1)
    for type, (per_block, nbytes) in GGML_QUANT_SIZES.items():
        raw = rng.integers(0, 256, (2, 3, 256 // per_block * nbytes), np.uint8)
        writer.add_tensor(f"t.{type.name}", raw, raw_dtype=type)
    writer.add_tensor("one", np.array([1.5], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, {key: value for key, value, _ in VALUES} | arrays


def test_metadata_reads_back(written: tuple[Path, dict[str, Any]]) -> None:
    """Every value type and array of gguf's writer comes back equal and of the right Python type."""
    path, expected = written
    with open_gguf(path) as file:
        assert (file.version, file.alignment, file.architecture) == (3, 32, "llama")
        for key, value in expected.items():
            assert file.metadata[key] == value
            assert type(file.metadata[key]) is type(value)
            if isinstance(value, list):
                got = file.metadata[key]
                assert isinstance(got, list)
                assert [type(element) for element in got] == [type(element) for element in value]
        assert set(file.metadata) == {"general.architecture", *expected}


def test_agrees_with_another_reader(written: tuple[Path, dict[str, Any]]) -> None:
    """Names, types, shapes, offsets and bytes of all tensors are those that gguf's reader finds."""
    path, _ = written
    theirs = gguf.GGUFReader(path).tensors
    assert len(theirs) == len(GGML_QUANT_SIZES) + 1
    with open_gguf(path) as file:
        assert list(file.tensors) == [tensor.name for tensor in theirs]
        for tensor in theirs:
            info = file.tensors[tensor.name]
            assert info.type == tensor.tensor_type
            assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            raw = file.raw(tensor.name)
            assert raw.shape == (info.nbytes,)
            assert raw.tobytes() == tensor.data.tobytes()


def test_tensors_decode_as_by_gguf(written: tuple[Path, dict[str, Any]]) -> None:
    """From the file to float32: each supported type equals gguf's decoding of gguf's reading."""
    path, _ = written
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_gguf(path) as file:
        for kind in supported_types():
            info = file.tensors[f"t.{kind.name}"]
            got = dequantize(file.raw(info.name), info.type, info.shape)
            with np.errstate(all="ignore"):
                want = gguf.dequantize(theirs[info.name].data, kind)
            assert got.shape == want.shape == (2, 3, 256)
            assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


def test_version_2_and_other_alignments(tmp_path: Path) -> None:
    """Version 2 reads as version 3 does; a tensor follows the file's own alignment."""
    path = tmp_path / "two.gguf"
    pair = malformed.pair(b"general.alignment", malformed.U32, malformed.u32(8))
    table = malformed.Parts(
        pairs=(malformed.ARCHITECTURE, pair),
        tensors=(malformed.tensor(b"a", (2,), malformed.TYPE_F32, 0),),
        data=np.array([1, 2], "<f4").tobytes(),
        version=malformed.u32(2),
        alignment=8,
    )
    path.write_bytes(table.build())
    with open_gguf(path) as file:
        assert (file.version, file.alignment) == (2, 8)
        assert file.raw("a").view("<f4").tolist() == [1, 2]


def test_raw_is_read_only_and_close_is_final(written: tuple[Path, dict[str, Any]]) -> None:
    """Weights cannot be written; after close, reading is refused, while a view already held stays valid."""
    path, _ = written
    with open_gguf(path) as file:
        view = file.raw("one")
        assert not view.flags.writeable
        with pytest.raises(ModelFileError, match="'nowhere' is missing"):
            file.raw("nowhere")
    file.close()
    assert view.view("<f4").tolist() == [1.5]
    with pytest.raises(InvalidParameter, match="closed"):
        file.raw("one")
    with pytest.raises(InvalidParameter, match="closed"):
        _ = file.sha256


def test_no_descriptor_or_mapping_stays(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Neither a closed file nor a refused one leaves a descriptor or a mapping behind."""
    path, _ = written
    refused = tmp_path / "refused.gguf"
    refused.write_bytes(malformed.sound()[:-30])

    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        return len(list(Path("/proc/self/fd").iterdir())), maps.count(str(path)) + maps.count(str(refused))

    before = held()
    with open_gguf(path):
        assert held() > before
    for _ in range(3):
        with pytest.raises(ModelFileError):
            open_gguf(refused)
    assert held() == before


def refusal(path: Path) -> PrillError:
    """The error that opening gives, after the promises that every one of them keeps."""
    with pytest.raises(PrillError) as caught:
        open_gguf(path)
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    assert sentence.isprintable()
    assert caught.value.exit_code == 4
    return caught.value


def test_the_corpus_is_wide_and_made_from_a_sound_file(tmp_path: Path) -> None:
    """At least 60 kinds under distinct names, all different files, and their common origin opens."""
    kinds = [case for case in CORPUS if not case.name.startswith("cut in ")]
    assert len(kinds) >= 60
    assert len({case.name for case in CORPUS}) == len(CORPUS)
    assert all(case.expects for case in CORPUS)
    path = tmp_path / "sound.gguf"
    path.write_bytes(malformed.sound())
    with open_gguf(path) as file:
        assert file.metadata["tokenizer.ggml.tokens"] == ["<unk>", "<s>", "</s>", "<0x0A>"]
        assert {name: info.shape for name, info in file.tensors.items()} == {
            "a.weight": (2, 32),
            "b.weight": (2, 32),
        }
    assert all(case.data != malformed.sound() for case in CORPUS)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_malformed_files_give_one_sentence(case: Malformed, tmp_path: Path) -> None:
    """Each defect is refused with its own words and an offset, exit code 4."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(case.data)
    sentence = str(refusal(path))
    assert case.expects in sentence
    assert f"{path}, byte " in sentence


def test_malformed_files_allocate_little(tmp_path: Path) -> None:
    """No defect makes the reader allocate 64 MB, whatever its counts claim."""
    path = tmp_path / "bad.gguf"
    peaks = {}
    for case in CORPUS:
        path.write_bytes(case.data)
        tracemalloc.start()
        refusal(path)
        peaks[case.name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(peaks) == len(CORPUS)
    assert max(peaks.values()) < 64 << 20, max(peaks, key=lambda name: peaks[name])


SPARSE = """
import json, resource, sys, time
from pathlib import Path
from prill_runtime.errors import ModelFileError
from prill_runtime.gguf.file import open_gguf
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
results = []
for name in sys.argv[1:]:
    begun = time.process_time()
    try:
        open_gguf(name)
        sentence = "accepted"
    except ModelFileError as error:
        sentence = str(error)
    results.append((sentence, time.process_time() - begun))
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"results": results, "growth_kb": growth}))
"""


def test_huge_sparse_files_cost_nothing(tmp_path: Path) -> None:
    """Terabyte files whose counts do fit: a fresh process grows by less than 64 MB, each below 1 s of CPU."""
    pairs = {
        "strings": malformed.array(malformed.STRING, [], 2**34),
        "most": malformed.array(malformed.STRING, [], 1_572_000),
        "numbers": malformed.array(malformed.F64, [], 2**34),
        "bytes": malformed.array(malformed.U8, [], 2**39),
        "text": malformed.u64(2**39),
    }
    made: dict[str, bytes] = {}
    for name, value in pairs.items():
        kind = malformed.STRING if name == "text" else malformed.ARRAY
        pair = malformed.pair(b"k", kind, value)
        # a second pair that never comes, so that the array allowed by its count is refused in the end
        made[name] = malformed.Parts(pairs=(pair,), tensors=(), data=b"", alignment=1, n_pairs=2).build()
    made["tensors"] = malformed.Parts(n_tensors=2**34).build()
    made["pairs"] = malformed.Parts(n_pairs=2**34).build()
    paths = []
    for name, data in made.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        os.truncate(path, 1 << 40)
        paths.append(str(path))
    done = subprocess.run([sys.executable, "-c", SPARSE, *paths], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert len(report["results"]) == len(paths)
    for path, (sentence, seconds) in zip(paths, report["results"], strict=True):
        assert sentence.startswith("invalid model file"), path
        assert seconds < 1, path
    assert report["growth_kb"] < 64 << 10


def test_a_large_vocabulary_is_not_refused(tmp_path: Path) -> None:
    """200,000 tokens with scores and 450,000 merges, are within the limits and read back equal."""
    path = tmp_path / "large.gguf"
    arrays = {
        "tokens": [f"t{i}" for i in range(200_000)],
        "merges": [f"{i} {i + 1}" for i in range(450_000)],
    }
    scores = np.arange(0, -200_000, -1, np.float32)
    pairs = [
        malformed.pair(
            f"tokenizer.ggml.{name}".encode(), malformed.ARRAY, malformed.strings(*map(str.encode, texts))
        )
        for name, texts in arrays.items()
    ]
    packed = malformed.array(malformed.F32, [scores.tobytes()], len(scores))
    pairs.append(malformed.pair(b"tokenizer.ggml.scores", malformed.ARRAY, packed))
    made = malformed.Parts(pairs=(malformed.ARCHITECTURE, *pairs), tensors=(), data=b"", alignment=1)
    path.write_bytes(made.build())
    with open_gguf(path) as file:
        for name, texts in arrays.items():
            assert file.metadata[f"tokenizer.ggml.{name}"] == texts
        assert file.metadata["tokenizer.ggml.scores"] == scores.tolist()


def test_missing_and_irregular_paths(tmp_path: Path) -> None:
    """What is not a readable regular file is refused at once: no hang on a pipe, no traceback."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for name, expects in (
            ("missing.gguf", "No such file"),
            ("two\nlines\u2028.gguf", "No such file"),
            ("nul\0.gguf", "null"),
            ("n" * 300, "too long"),
            ("loop", "cannot be opened"),
            ("pipe", "not a file"),
            ("s", "not a file"),
            (".", "got a directory"),
        ):
            assert expects in str(refusal(tmp_path / name))
    assert "not a file" in str(refusal(Path("/dev/zero")))


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not be read is refused with the system's reason."""
    path = tmp_path / "secret.gguf"
    path.write_bytes(malformed.sound())

    def forbidden(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    assert "Permission denied" in str(refusal(path))


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    """A link to a sound file opens as the file does."""
    (tmp_path / "real.gguf").write_bytes(malformed.sound())
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real.gguf")
    with open_gguf(str(tmp_path / "link.gguf")) as file:
        assert len(file.tensors) == 2


def test_a_tokenizer_without_types_is_not_judged_by_them() -> None:
    """Metadata without any tokenizer pass, and so does a spelling that only a byte token may not have."""
    check_tokenizer({})
    check_tokenizer({"tokenizer.ggml.tokens": ["a", "", "", "<0x-1>"]})


def test_check_tokenizer_reads_lists_and_places_the_fault() -> None:
    """The check works on plain lists, and names key, path and offset."""
    metadata = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.0]}
    with pytest.raises(ModelFileError, match=r"in x, byte 7: tokenizer\.ggml\.scores .* expected 2, got 1"):
        check_tokenizer(metadata, path="x", offsets={"tokenizer.ggml.scores": 7})


def test_a_type_known_only_by_name_still_opens(tmp_path: Path) -> None:
    """A sound file of a type without decoder opens: inspecting it is fine, decoding is refused later."""
    path = tmp_path / "iq.gguf"
    entry = malformed.tensor(b"a", (256,), int(GGMLQuantizationType.IQ2_XS), 0)
    path.write_bytes(malformed.Parts(tensors=(entry,), data=bytes(74)).build())
    with open_gguf(path) as file:
        assert file.tensors["a"].nbytes == 74
