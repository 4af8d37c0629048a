"""Damaged values in files: each is named with tensor, index and count, and nothing is said of sound ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prill_harness.records.evidence import Status
from prill_runtime.quants.layouts import supported_types
from prill_suites.file_values import BlockPeaks, Survey, constants, survey, unused_tokens

from .commandline import child
from .test_suites import run
from .tiny_gguf import Floats, tiny

QUANTISED = (T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1)
SCALE_AT = {  # bytes of the block that are a half-precision scale
    T.Q8_0: 0, T.Q4_0: 0, T.Q4_1: 0, T.Q5_0: 0, T.Q5_1: 0, T.Q2_K: 80, T.Q3_K: 108, T.Q4_K: 0, T.Q5_K: 0,
    T.Q6_K: 208,
}  # fmt: skip
CHECKS = ("file.tensors", "file.weights", "file.scales")
NAN = b"\x00\x7e"


def read(path: Path) -> list[gguf.ReaderTensor]:
    return list(gguf.GGUFReader(path).tensors)


def written(path: Path, *matrices: NDArray[np.generic], type: T = T.F32) -> list[gguf.ReaderTensor]:
    """Matrices through a file; bytes (row, byte) of a quantised type as they are."""
    writer = gguf.GGUFWriter(path, "llama")
    for number, matrix in enumerate(matrices):
        writer.add_tensor(f"m{number}", matrix, raw_dtype=None if matrix.dtype == np.float32 else type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read(path)


def seen(path: Path, matrix: NDArray[np.generic], type: T = T.F32) -> Survey:
    return survey(written(path, matrix, type=type)[0])


def random(rows: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def quiet(found: Survey) -> bool:
    return found.not_finite is None and found.zero_run is None and found.out_of_range is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("values")


@pytest.mark.parametrize("type", supported_types(), ids=lambda t: t.name)
def test_a_value_that_is_not_finite_is_named_in_every_type(type: T, tmp_path: Path) -> None:
    """One block of NaN, in each type that is decoded: tensor, first index and count; without it nothing."""
    per_block, nbytes = GGML_QUANT_SIZES[type]
    step = max(per_block, 32)
    raw = np.random.default_rng(1).integers(0, 100, (6, 4 * step // per_block * nbytes), np.uint8)
    if type in SCALE_AT:  # scales of ordinary size, whatever the random bytes say
        blocks = raw.reshape(-1, nbytes)
        blocks[:, SCALE_AT[type] : SCALE_AT[type] + 2] = 0x00, 0x20
    assert seen(tmp_path / "sound.gguf", raw, type).not_finite is None
    block = raw.reshape(-1, nbytes)[2 * len(raw.reshape(-1, nbytes)) // 3]
    if type == T.MXFP4:
        block[0] = 0xFF
    elif type in SCALE_AT:
        block[SCALE_AT[type] : SCALE_AT[type] + 2] = np.frombuffer(NAN, np.uint8)
    else:
        block[:] = 0xFF
    found = seen(tmp_path / "nan.gguf", raw, type).not_finite
    assert found is not None
    assert (found.tensor, found.first, found.count) == ("m0", 4 * 4 * step, per_block)
    assert "m0" in found.sentence
    assert "finite" in found.sentence


def test_an_infinity_in_a_minimum_is_found(tmp_path: Path) -> None:
    """The second scale of a block counts as well: the minimum of Q4_1."""
    raw = gguf.quants.quantize(random(4, 64), T.Q4_1)
    raw.reshape(-1, 20)[5, 2:4] = 0x00, 0x7C
    found = seen(tmp_path / "m.gguf", raw, T.Q4_1).not_finite
    assert found is not None
    assert (found.first, found.count) == (160, 32)


@pytest.mark.parametrize("type", [T.F32, T.F16, T.BF16, *QUANTISED], ids=lambda t: t.name)
@pytest.mark.parametrize(("start", "end"), [(0.4, 1.0), (0.9, 1.0), (0.0, 0.3), (0.45, 0.6), (0.02, 1.0)])
def test_a_write_that_stopped_is_found(type: T, start: float, end: float, tmp_path: Path) -> None:
    """Zero bytes from anywhere to anywhere, cut inside rows and blocks: found, with its place."""
    raw = gguf.quants.quantize(random(96, 160), type)
    flat = raw.view(np.uint8).reshape(-1)
    low, high = int(start * flat.size) | 1, int(end * flat.size)
    flat[low:high] = 0
    found = seen(tmp_path / "m.gguf", raw, type).zero_run
    assert found is not None
    per_byte = 96 * 160 / flat.size
    assert abs(found.first - low * per_byte) <= 32  # quantised weights beside the cut may be zero as well
    assert abs(found.count - (high - low) * per_byte) <= 64
    if type == T.F32:
        assert (found.first, found.count) == (-(-low // 4), high // 4 - -(-low // 4))


def test_rows_pruned_at_random_lie_together_now_and_then(tmp_path: Path) -> None:
    """Five neighbours of 10 zero rows in 304, and 15 of 17 in 32: chance gives that in some 10^4 matrices."""
    matrix = random(304, 64)
    matrix[np.random.default_rng(672821).random(304) < 0.02] = 0
    assert not matrix[57:62].any()
    assert seen(tmp_path / "a.gguf", matrix).zero_run is None
    matrix = random(32, 64)
    matrix[np.random.default_rng(2176911972).random(32) < 0.5] = 0
    assert not matrix[14:28].any()
    assert seen(tmp_path / "b.gguf", matrix).zero_run is None


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.5, 0.75])
def test_what_is_called_chance_is_no_less(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 matrices with rows and blocks zero at random, at most as many give a run as CHANCE allows."""
    monkeypatch.setattr("prill_suites.file_values.CHANCE", 0.05)
    rng = np.random.default_rng(int(100 * rate))
    found = 0
    for _ in range(1000):
        peaks = np.ones((96, 4), np.float32)
        peaks[rng.random(peaks.shape) < 0.05] = 0
        peaks[rng.random(96) < rate] = 0
        found += BlockPeaks("m", 96, 64, 16, peaks).zero_run() is not None
    assert 0 < found <= 50


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_scattered_zeros_are_sound(folder: Path, data: st.DataObject) -> None:
    """Pruned rows, blocks and columns at any rate up to a half give no finding; neither do equal rows."""
    rows, columns = (
        data.draw(st.sampled_from([2, 5, 32, 96, 304])),
        data.draw(st.sampled_from([8, 33, 64, 160])),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    matrix = random(rows, columns, data.draw(st.integers(0, 1000)))
    matrix[rng.random(rows) < data.draw(st.sampled_from([0, 0.02, 0.2, 0.5]))] = 0
    for block in range(0, columns, 16):
        matrix[rng.random(rows) < data.draw(st.sampled_from([0, 0.05, 0.5])), block : block + 16] = 0
    matrix[:, : data.draw(st.sampled_from([0, columns // 2]))] = 0
    matrix[rng.integers(rows, size=3)] = matrix[0]
    assert quiet(seen(folder / "m.gguf", matrix))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_magnitudes_of_rows_and_columns_are_sound(folder: Path, data: st.DataObject) -> None:
    """Rows and columns that differ by factors up to 10^8 give no finding, in floats and in blocks."""
    rows, columns = data.draw(st.sampled_from([3, 40])), data.draw(st.sampled_from([32, 64, 256]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    matrix = random(rows, columns, data.draw(st.integers(0, 1000)))
    matrix *= (10.0 ** rng.uniform(-4, 4 * data.draw(st.booleans()), (rows, 1))).astype(np.float32)
    if data.draw(st.booleans()):
        matrix[rng.integers(rows)] *= 5000
    type = data.draw(st.sampled_from([T.F32, T.Q8_0]))
    raw = matrix if type == T.F32 else gguf.quants.quantize(matrix.clip(-6e4, 6e4), type)
    assert quiet(seen(folder / "m.gguf", raw, type))


@pytest.mark.parametrize("type", QUANTISED, ids=lambda t: t.name)
def test_a_scale_out_of_range_is_a_finding(type: T, tmp_path: Path) -> None:
    """A scale of 4096 times its size stands out by a thousand; the same of 100 times does not."""
    for factor, stands_out in ((4096, True), (100, False)):
        raw = gguf.quants.quantize(random(40, 256) * np.float32(0.01), type)
        block = raw.reshape(-1, GGML_QUANT_SIZES[type][1])[77]
        block[:2].view(np.float16)[:] *= factor
        found = seen(tmp_path / f"{factor}.gguf", raw, type).out_of_range
        assert (found is not None) is stands_out
        if found:
            assert (found.first, found.count) == (77 * 32, 32)


def test_a_constant_matrix_is_a_finding_among_others(tmp_path: Path) -> None:
    """One filled matrix beside varying ones is named; vectors, and files that are constant whole, are not."""
    filled, vector = np.full((8, 64), 0.25, np.float32), np.ones(64, np.float32)
    mixed = [survey(t) for t in written(tmp_path / "a.gguf", random(8, 64), filled, vector)]
    assert [(f.tensor, f.count) for f in constants(mixed)] == [("m1", 512)]
    assert "constant, 0.25 throughout" in constants(mixed)[0].sentence
    pruned = filled * (np.arange(8) % 3 > 0)[:, None]
    toy = [survey(t) for t in written(tmp_path / "b.gguf", filled, 2 * filled, pruned, vector)]
    assert constants(toy) == []


def test_rows_of_tokens_that_nobody_uses_may_be_zero(tmp_path: Path) -> None:
    """Zero rows of filling are explained; a run that goes on into words is not, and counts without them."""
    names = [
        "a",
        "b",
        "<unused3>",
        "[PAD4]",
        "<|reserved_special_token_5|>",
        "[control_6]",
        "<pad>",
        "pad",
        "<s>",
    ]
    fields = {"tokenizer.ggml.tokens": [*names, "z"], "tokenizer.ggml.token_type": [1] * 9 + [5]}
    assert unused_tokens(fields, 11).tolist() == [False] * 2 + [True] * 5 + [False] * 2 + [True] * 2
    assert not unused_tokens({}, 3).any()
    matrix, unused = random(300, 64), np.arange(300) >= 200
    matrix[200:] = 0
    (tensor,) = written(tmp_path / "a.gguf", matrix)
    assert survey(tensor).zero_run is not None
    assert survey(tensor, unused).zero_run is None
    matrix[190:] = 0
    found = survey(written(tmp_path / "b.gguf", matrix)[0], unused).zero_run
    assert found is not None
    assert found.first == 190 * 64


def test_a_large_tensor_is_walked_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Findings do not depend on how many rows are dequantised at a time."""
    raw = gguf.quants.quantize(random(50, 96), T.Q8_0)
    raw[30:45] = 0
    raw[3, :2] = np.frombuffer(NAN, np.uint8)
    path = tmp_path / "m.gguf"
    whole = seen(path, raw, T.Q8_0)
    monkeypatch.setattr("prill_suites.file_values.STRIP", 1)
    assert survey(read(path)[0]) == whole
    assert whole.zero_run is not None
    assert whole.not_finite is not None


def nan(tensors: dict[str, Floats]) -> None:
    tensors["blk.1.ffn_down.weight"][3, 5] = np.nan


def infinite_norm(tensors: dict[str, Floats]) -> None:
    tensors["output_norm.weight"][7] = np.inf


def cut(tensors: dict[str, Floats]) -> None:
    tensors["blk.0.attn_output.weight"].reshape(-1)[1000:] = 0


def filled(tensors: dict[str, Floats]) -> None:
    tensors["blk.1.attn_k.weight"][:] = 0.5


DAMAGE: list[tuple[Callable[[dict[str, Floats]], None], str]] = [
    (nan, r"blk.1.ffn_down.weight: 1 of 6144 weights are not finite .*at index 293"),
    (infinite_norm, r"output_norm.weight: 1 of 64 weights are not finite .*at index 7"),
    (cut, r"blk.0.attn_output.weight: 3096 of 4096 weights are zero in a run .*at index 1000"),
    (filled, r"blk.1.attn_k.weight: 2048 of 2048 weights are constant, 0.5"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE, ids=lambda d: getattr(d, "__name__", ""))
def test_a_damaged_model_fails_one_check(
    damage: Callable[[dict[str, Floats]], None], says: str, tmp_path: Path
) -> None:
    """The suite is red on a damaged model, and names tensor, first index and count."""
    path = tiny(tmp_path / "m.gguf", edit=damage)
    evidence = run(tmp_path, "file", *CHECKS, model=str(path))
    (failed,) = [record for record in evidence.values() if record.status is not Status.PASSED]
    assert failed.status is Status.FAILED
    assert re.search(says, failed.sentence), failed.sentence


def test_the_command_tells_of_a_damaged_model(tmp_path: Path) -> None:
    """`prill run` exits 1, and says what is damaged in place of "expected nan, got nan"."""
    path = tiny(tmp_path / "m.gguf", edit=nan)
    done = child("run", "--model", str(path), "file.tensors", "file.weights", cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"^failed +file.weights .*not finite", done.stdout, re.MULTILINE)


def odd_but_sound(tensors: dict[str, Floats]) -> None:
    """What training and pruning leave: dead norms, biases of 0, zero rows, equal rows, rows of any size."""
    tensors["blk.0.attn_norm.weight"][:] = 1
    tensors["blk.1.ffn_norm.weight"][:] = 0
    for name, array in tensors.items():
        if name.endswith("bias"):
            array[:] = 0
        elif array.ndim == 2:
            array[::7] = 0
            array[1] = array[3]
            array[5] *= 3000


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_sound_model_is_green(arch: str, tmp_path: Path) -> None:
    """Nothing of what is odd but sound turns the suite red."""
    path = tiny(tmp_path / "m.gguf", arch, edit=odd_but_sound)
    evidence = run(tmp_path, "file", *CHECKS, model=str(path))
    assert {record.base: record.status for record in evidence.values()} == dict.fromkeys(
        CHECKS, Status.PASSED
    )
