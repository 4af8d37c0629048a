"""Mutated real files either open or give one sentence; nothing else ever happens."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import prill_fixtures
from prill_fixtures import malformed
from prill_runtime.errors import PrillError
from prill_runtime.gguf.file import open_gguf

SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MODELS = sorted((Path(prill_fixtures.__file__).parent / "models").glob("*.gguf"))
INTERESTING = [0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 31, 32, 63, 64, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file by gguf's own writer."""
    path = tmp_path_factory.mktemp("fuzz") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_bool("some.truth", True)
    writer.add_array("some.numbers", [0.5, 1.5])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "<0x0A>", "é"])
    writer.add_token_scores([0.0, 0.0, 0.0, 0.0, -1.0])
    writer.add_token_types([2, 3, 3, 6, 1])
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.ones((5, 32), np.float32))
    writer.add_tensor("output.weight", np.ones((5, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@cache
def head_of(model: Path) -> tuple[bytes, int]:
    """The first 64 KB of a packaged model, and the size of the whole."""
    with model.open("rb") as file:
        return file.read(1 << 16), model.stat().st_size


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One edit: flip a bit, write a telling integer, cut, insert, repeat or drop a slice."""
    kind = draw(st.sampled_from(["flip", "integer", "cut", "insert", "repeat", "drop"]))
    # Half of the edits go to the first 200 bytes, where the counts and types are dense.
    where = draw(st.one_of(st.integers(0, 200), st.integers(0, 1 << 16)))
    length = draw(st.integers(1, 40))
    width = draw(st.sampled_from([1, 4, 8]))
    number = draw(st.sampled_from(INTERESTING)) % 256**width
    inserted = draw(st.binary(min_size=1, max_size=16))
    bit = draw(st.integers(0, 7))

    def edit(data: bytes) -> bytes:
        at = where % max(len(data), 1)
        event(kind)
        if kind == "flip":
            return data[:at] + bytes(byte ^ (1 << bit) for byte in data[at : at + 1]) + data[at + 1 :]
        if kind == "integer":
            return data[:at] + number.to_bytes(width, "little") + data[at + width :]
        if kind == "cut":
            return data[:at]
        if kind == "insert":
            return data[:at] + inserted + data[at:]
        if kind == "repeat":
            return data[: at + length] + data[at:]
        return data[:at] + data[at + length :]

    return edit


def opened(path: Path, data: bytes, size: int | None = None) -> bool:
    """Whether the file opens; if not, its error was one printable sentence with exit code 4."""
    path.write_bytes(data)
    if size is not None:
        os.truncate(path, max(size, len(data)))
    try:
        file = open_gguf(path)
    except PrillError as error:
        refused = error
    else:
        with file:
            for info in file.tensors.values():
                assert file.raw(info.name).nbytes == info.nbytes
        return True
    assert refused.exit_code == 4
    assert str(refused).isprintable()
    return False


def mutated(data: bytes, edits: list[Callable[[bytes], bytes]]) -> bytes:
    for edit in edits:
        data = edit(data)
    return data


@SETTINGS
@given(edits=st.lists(mutations(), min_size=1, max_size=4))
def test_mutations_of_a_written_file(
    written: bytes, tmp_path: Path, edits: list[Callable[[bytes], bytes]]
) -> None:
    """A file of gguf's writer, mutated up to four times, opens or is refused in one sentence."""
    event(f"opened: {opened(tmp_path / 'f.gguf', mutated(written, edits))}")


@SETTINGS
@given(edits=st.lists(mutations(), min_size=1, max_size=4))
def test_mutations_of_a_handmade_file(tmp_path: Path, edits: list[Callable[[bytes], bytes]]) -> None:
    """The corpus's own sound file, mutated likewise."""
    event(f"opened: {opened(tmp_path / 'f.gguf', mutated(malformed.sound(), edits))}")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.stem)
@settings(SETTINGS, max_examples=100)
@given(edits=st.lists(mutations(), min_size=1, max_size=3))
def test_mutations_of_packaged_models(
    model: Path, tmp_path: Path, edits: list[Callable[[bytes], bytes]]
) -> None:
    """The head of a packaged model, mutated, over a sparse rest of the right size."""
    head, size = head_of(model)
    event(f"opened: {opened(tmp_path / 'f.gguf', mutated(head, edits), size)}")


@settings(SETTINGS, max_examples=100)
@given(data=st.binary(max_size=400))
def test_arbitrary_bytes_after_the_magic(tmp_path: Path, data: bytes) -> None:
    """Noise behind a valid magic and version never opens: it has no architecture to name."""
    assert not opened(tmp_path / "f.gguf", b"GGUF\3\0\0\0" + data)


def test_every_single_byte_damaged(written: bytes, tmp_path: Path) -> None:
    """Each byte in turn set to 0 and to its complement: a damaged magic, version or count never opens."""
    path = tmp_path / "f.gguf"
    assert opened(path, written)
    end = written.index(b"output.weight") + 64
    outcomes = {
        (at, value): opened(path, written[:at] + bytes([value]) + written[at + 1 :])
        for at in range(end)
        for value in {0, written[at] ^ 255} - {written[at]}
    }
    assert not any(ok for (at, _), ok in outcomes.items() if at < 24)
    # Most damage in names and weights is legal, most in counts is not: both kinds were seen.
    assert {True, False} == set(outcomes.values())
    assert len(outcomes) > end
