"""`llamacpp:FOLDER` without a package: what is no libllama is refused in one sentence; nothing crashes."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.engines.others.llamacpp.library import SIGNATURES, Layout
from prill_harness.engines.others.llamacpp.tap import joined
from prill_harness.faults.opening import open_engine
from prill_runtime.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidParameter,
    MissingCapability,
    UsageError,
)

from .commandline import child, invoke

MODEL = "fixture:llama-tiny"
STUB = Path(__file__).with_name("stub_llama.c")


def built(folder: Path, *macros: str, without: str = "") -> str:
    """The spec of a folder with a libllama of the tests' own; every function that it lacks returns 0."""
    source = STUB.read_text()
    rest = [name for name in SIGNATURES if f"{name}(" not in source and name != without]
    stubs = "".join(f"long {name}(void) {{ return 0; }}\n" for name in rest)
    words = ["gcc", "-O1", "-w", "-shared", "-fPIC", "-xc", "-", *(f"-D{macro}" for macro in macros)]
    (folder / "lib").mkdir()
    library = str(folder / "lib" / "libllama.so.0")
    subprocess.run([*words, "-o", library], input=source + stubs, text=True, check=True)
    return f"llamacpp:{folder}"


def test_one_that_obeys_is_opened(tmp_path: Path) -> None:
    """A library whose structs are known is opened, computes what it is given, shows its tensors, and ends;
    its context is as long as was asked for, though it rounds that up."""
    before = set(psutil.Process().children(recursive=True))
    with open_engine(f"{built(tmp_path)},ctx=20", MODEL) as engine:
        assert engine.info.version == "llama 9.8.7"
        assert engine.info.config["served_context"] == 20
        np.testing.assert_array_equal(engine.logits([3, 0, 7]), np.eye(8, dtype=np.float32)[[3, 0, 7]])
        ((name, rows),) = engine.trace([3, 0, 7])
        assert name == "result_output = MUL_MAT(cache_k_l0)"
        np.testing.assert_array_equal(rows, np.eye(8)[[3, 0, 7]])
        with pytest.raises(ContextLengthExceeded, match="21 positions of 20"):
            engine.logits([1] * 21)
        for ids, words in (([], "no ids"), ([1 << 31], "outside the vocabulary")):
            with pytest.raises(InvalidParameter, match=words):
                engine.logits(ids)
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize(
    ("macro", "words"),
    [
        ("REORDERED", r"params structs are laid out in no known way.*version llama 9\.8\.7.*got bhh1"),
        ("SEEDED", "params structs are laid out in no known way"),
        ("MOVED", r"ggml_tensor is laid out in no known way.*expected the name at byte 256, got 264"),
        ("DEAF", r"not what was asked for.*expected batches of 64.*got \[2048, 64, \d+\]"),
        ("SILENT", "not what was asked for.*, 0 tensors"),
        ("ROUNDS", r"not what was asked for.*got .*cache types \[1\]"),
        ("FLASH", "not what was asked for.*no FLASH_ATTN_EXT"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, macro: str, words: str) -> None:
    """Structs of another layout, and a library that does not do what was written into them, are refused."""
    with pytest.raises(UsageError, match=words) as caught:
        open_engine(built(tmp_path, macro), MODEL)
    assert "\n" not in str(caught.value)


def test_a_library_without_a_function_is_refused(tmp_path: Path) -> None:
    """The function that is lacking is named, with the version."""
    with pytest.raises(UsageError, match=r"lacks functions.*9\.8\.7.*got llama_memory_clear"):
        open_engine(built(tmp_path, without="llama_memory_clear"), MODEL)


def test_one_that_dies_is_an_error_of_the_engine(tmp_path: Path) -> None:
    """An abort in the library ends the child and not its judge."""
    with pytest.raises(EngineError, match="was ended by SIGABRT"):
        open_engine(built(tmp_path, "ABORTS"), MODEL)


def test_half_precision_is_left_to_the_library(tmp_path: Path) -> None:
    """Declared to be half, caches and flash attention stay as the library has them; the lane is another."""
    spec = built(tmp_path, "ROUNDS")
    with open_engine(f"{spec},arithmetic=half", MODEL) as engine:
        assert engine.info.arithmetic == "half"


def test_one_that_shows_nothing_is_refused_in_any_arithmetic(tmp_path: Path) -> None:
    """A callback that is never called was written to the wrong place."""
    with pytest.raises(UsageError, match=r"not what was asked for.*, 0 tensors"):
        open_engine(f"{built(tmp_path, 'SILENT')},arithmetic=half", MODEL)


def test_the_child_imports_nothing_from_where_prill_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of the current folder that has the name of one that is needed is left alone."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    open_engine(built(tmp_path), MODEL).close()


def test_penalties_that_do_something_else_are_not_used(tmp_path: Path) -> None:
    """The arguments of one sampler have changed before: where it does not penalise, what needs it is
    inconclusive."""
    with (
        open_engine(built(tmp_path), MODEL) as engine,
        pytest.raises(MissingCapability, match="penalties are not understood"),
    ):
        engine.generate([1], max_tokens=1, repetition_penalty=1.5)


def test_a_folder_without_a_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder, none in it, a text under its name, a bad option: each ends with 4, in one sentence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "libllama.so").write_text("hello")
    for place, words in (
        ("nosuch", "no such folder"), (".", "no libllama in the folder"), (".,ctx=0", "bad ctx"),
        ("text", "libllama cannot be loaded"), (",ctx=9", "engine spec is incomplete"),
        (".,arithmetic=fast", "unknown arithmetic"),
    ):  # fmt: skip
        done = invoke("bisect", "--engine", f"llamacpp:{place}", "--model", MODEL)
        assert (done.exit_code, done.stdout) == (4, ""), place
        assert re.fullmatch(rf"usage error.*{words}.*\n", done.stderr), done.stderr


# The words of llama_context_params from n_ctx to the types of the cache, as three years had them.
YARN_2025 = [0xBF800000, 0x3F800000, 0x42000000, 0x3F800000]
YARN_2026 = [0xBF800000] * 4
MINUS, DEFRAG = 0xFFFFFFFF, 0xBF800000
LAYOUTS = {
    "June 2025": [512, 2048, 512, 1, 4, 4, *[MINUS] * 3, 0, 0, *YARN_2025, 0, DEFRAG, 0, *[0] * 4, 1, 1],
    "September 2025": [512, 2048, 512, 1, 4, 4, *[MINUS] * 4, 0, 0, *YARN_2025, 0, DEFRAG, *[0] * 4, 1, 1],
    "October 2026": [512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, *[MINUS] * 4, 0, 0, *YARN_2026, 0, DEFRAG, *[0] * 4,
                     1, 1],
}  # fmt: skip
MODEL_WORDS = struct.pack("<6I", 0, 0, 0, 0, 99, 1)


def packed(words: list[int]) -> bytes:
    return struct.pack(f"<{len(words) + 8}I", *words, *[0] * 8)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("June 2025", Layout(4, None, 18, 22)),
        ("September 2025", Layout(4, 9, 18, 22)),
        ("October 2026", Layout(7, 13, 22, 26)),
    ],
)
def test_layouts_are_read_by_their_defaults(when: str, expected: Layout) -> None:
    """Three layouts of llama_context_params, each with its own offsets; without the model's, none."""
    assert Layout.read(packed(LAYOUTS[when]), MODEL_WORDS) == expected
    assert Layout.read(packed(LAYOUTS[when]), bytes(24)) is None


def test_a_pointer_stands_where_pointers_stand() -> None:
    """Without a word before it the callback would stand at four bytes: such a struct has another word to fill
    the place, and is understood only with it."""
    words = LAYOUTS["October 2026"]
    fewer = [*words[:9], *words[10:]]
    assert Layout.read(packed(fewer), MODEL_WORDS) is None
    filled = [*fewer[:21], 0, *fewer[21:]]
    assert Layout.read(packed(filled), MODEL_WORDS) == Layout(7, 12, 22, 26)


@given(st.sampled_from(sorted(LAYOUTS)), st.data())
def test_a_layout_that_is_another_is_none(when: str, data: st.DataObject) -> None:
    """A word too many, too few, or of another value is refused, or moves nothing that is written to."""
    words = LAYOUTS[when]
    known, at = Layout.read(packed(words), MODEL_WORDS), data.draw(st.integers(0, len(words) - 1))
    other = data.draw(st.sampled_from([7, 3, 0x40000000, 0xFFFFFFFE]))
    assert Layout.read(packed([*words[:at], other, *words[at + 1 :]]), MODEL_WORDS) is None
    assert Layout.read(packed([*words[:at], other, *words[at:]]), MODEL_WORDS) is None
    fewer = Layout.read(packed([*words[:at], *words[at + 1 :]]), MODEL_WORDS)
    assert fewer is None or words[at] in (0, 1, MINUS)
    assert known is not None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3))
def test_stretches_are_put_together(lengths: list[int], width: int) -> None:
    """Passes over one stretch after another are the tensors of one pass; what one lacks is in none."""
    rows = np.arange(sum(lengths) * width, dtype=np.float32).reshape(-1, width)
    parts = np.split(rows, np.cumsum(lengths)[:-1])
    chunks = [
        [("a", part), ("a", -part), ("wide", np.ones((len(part), at + 1)))] for at, part in enumerate(parts)
    ]
    chunks[-1].append(("late", parts[-1]))
    made = list(joined(chunks))
    assert [name for name, _ in made[:2]] == ["a", "a"]
    np.testing.assert_array_equal(made[0][1], rows)
    np.testing.assert_array_equal(made[1][1], -rows)
    assert [name for name, _ in made[2:]] == (["wide", "late"] if len(lengths) == 1 else [])


def test_a_refusal_of_the_child_ends_with_its_code(tmp_path: Path) -> None:
    """What a child process refuses ends with 4, as what this process refuses does."""
    done = child("bisect", "--engine", built(tmp_path, "REORDERED"), "--model", MODEL)
    assert (done.returncode, done.stdout) == (4, "")
    assert re.fullmatch("usage error.*no known way.*\n", done.stderr), done.stderr
