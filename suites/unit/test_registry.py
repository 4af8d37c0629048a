"""Other packages bring architectures; one that is broken is one sentence and stops its own files alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

import prill_runtime
from prill_fixtures import path as fixture_path
from prill_harness import open_engine
from prill_harness.plan import provenance
from prill_harness.witness import naive as witness
from prill_runtime.errors import DescriptionError, ModelFileError, UnsupportedModel
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import registry
from prill_runtime.models.load import describe
from prill_suites import witness as suite

from .commandline import invoke
from .test_models import STRING, key
from .tiny_gguf import tiny

Install = Callable[..., None]
# A Llama by another name: it hands the file's keys on to prill's own description.
SOUND = """
from dataclasses import replace
from prill_runtime.models.architectures import llama
def model(keys):
    return replace(llama.model(keys), architecture="jay")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Lays a package's module and its dist-info beside each other, as pip does, in a folder on sys.path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def installed(source: str, *points: str, package: str = "jays", module: str = "jays") -> None:
        (site / f"{module}.py").write_text(source, "utf-8")
        folder = site / f"{package}-2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\n", "utf-8")
        (folder / "entry_points.txt").write_text("\n".join(["[prill.architectures]", *points]), "utf-8")
        forget()

    yield installed
    forget()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(site)):
            del sys.modules[name]


def forget() -> None:
    """What was installed is looked up anew: a process that is not a test asks once."""
    for asked in (registry.installed, witness._installed, provenance.brought, provenance._points):
        asked.cache_clear()


def file_of(architecture: str, tmp_path: Path) -> Path:
    """A tiny Llama under another architecture's name."""

    def renamed(writer: gguf.GGUFWriter) -> None:
        for shard in writer.kv_data:
            for name in [name for name in shard if name.startswith("llama.")]:
                shard[f"{architecture}.{name.removeprefix('llama.')}"] = shard.pop(name)
        key("general.architecture", architecture, STRING)(writer)

    return tiny(tmp_path / f"{architecture}.gguf", metadata=renamed)


def refusal(path: Path) -> str:
    """The sentence with which a file's description is refused."""
    with open_gguf(path) as file, pytest.raises(DescriptionError) as caught:
        describe(file)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_an_installed_architecture_runs(install: Install, tmp_path: Path) -> None:
    """Unknown before, it computes a Llama's very logits once its package is there; nothing was declared."""
    jay, llama, ids = file_of("jay", tmp_path), tiny(tmp_path / "llama.gguf"), [5, 300, 7, 261]
    with (
        open_gguf(jay) as file,
        pytest.raises(UnsupportedModel, match=r"expected gemma2 .* or qwen3moe, got 'jay'"),
    ):
        describe(file)
    install(SOUND, "jay = jays:model")
    assert "jay" in registry.names()
    with open_engine("numpy", str(jay)) as got, open_engine("numpy", str(llama)) as expected:
        assert got.info.config["architecture"] == "jay"
        assert np.array_equal(got.logits(ids), expected.logits(ids))


BROKEN = {
    "no such module": (SOUND, "jay = nowhere:model", "ModuleNotFoundError: No module named 'nowhere'"),
    "no such function": (SOUND, "jay = jays:other", "no attribute 'other'"),
    "no function": ("model = 7", "jay = jays:model", "TypeError: model cannot be called"),
    "not Python": ("def model(keys:\n", "jay = jays:model", "SyntaxError: .*jays.py, line 1"),
    "breaks on import": ("\n\n1 / 0\n", "jay = jays:model", "ZeroDivisionError: .*jays.py, line 3"),
    "breaks on a file": (
        "def model(keys):\n    return keys.integer(7)\n", "jay = jays:model", "TypeError: .*jays.py, line 2",
    ),
    "no network": ("def model(keys):\n    return 7\n", "jay = jays:model", "returns no Network but int"),
    "no entry point": (SOUND, "jay = jays model", "jays model of jays 2.0"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_one_is_one_sentence(broken: str, install: Install, tmp_path: Path) -> None:
    """It names the package, the mistake, its line and what to do; a Llama opens beside it as ever."""
    source, point, said = BROKEN[broken]
    install(source, point)
    sentence = refusal(file_of("jay", tmp_path))
    assert "of jays 2.0" in sentence
    assert "correct or uninstall it" in sentence
    assert re.search(said, sentence), sentence
    with open_gguf(fixture_path("llama-tiny", "f16")) as file:
        assert describe(file).architecture == "llama"


def test_nothing_of_it_is_imported_before_its_file_is_opened(install: Install, tmp_path: Path) -> None:
    """Opening a Llama, or naming the architectures of an unknown file, runs no line of a package's."""
    install(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{SOUND}", "jay = jays:model")
    with open_gguf(fixture_path("llama-tiny", "f16")) as file:
        describe(file)
    with (
        open_gguf(file_of("wren", tmp_path)) as file,
        pytest.raises(UnsupportedModel, match="or jay or"),
    ):
        describe(file)
    assert not (tmp_path / "ran").exists()
    with open_gguf(file_of("jay", tmp_path)) as file:
        describe(file)
    assert (tmp_path / "ran").exists()


def test_a_second_description_is_refused(install: Install, tmp_path: Path) -> None:
    """Of prill's own architecture or of another package's: neither wins in silence, and both are named."""
    install(SOUND, "jay = jays:model", "llama = jays:model")
    assert "prill's own and jays:model of jays 2.0" in refusal(tiny(tmp_path / "m.gguf"))
    jay = file_of("jay", tmp_path)
    with open_gguf(jay) as file:
        describe(file)
    install(SOUND, "jay = rooks:model", package="rooks", module="rooks")
    sentence = refusal(jay)
    assert "jays:model of jays 2.0" in sentence
    assert "rooks:model of rooks 2.0" in sentence


def test_a_refusal_of_the_file_stays_what_it_is(install: Install, tmp_path: Path) -> None:
    """What an installed description says of a file is said of the file, with its path."""
    install(SOUND.replace("return", "keys.integer('no_such_key')\n    return"), "jay = jays:model")
    with (
        open_gguf(file_of("jay", tmp_path)) as file,
        pytest.raises(ModelFileError, match=r"jay\.no_such_key"),
    ):
        describe(file)


def test_a_package_brings_a_second_reading(install: Install, tmp_path: Path) -> None:
    """It is asked about its own architecture, evidence names it, and prill's own readings stay prill's."""
    jay, llama = (witness.read(path) for path in (file_of("jay", tmp_path), tiny(tmp_path / "llama.gguf")))
    expected = witness.logits(llama, [5, 300, 7])
    assert not witness.knows(jay)
    source = "from prill_harness.witness.naive import llama\ndef wrong(reading, ids):\n    return 0\n"
    install(source, "[prill.witnesses]", "jay = jays:llama", "llama = jays:wrong")
    assert witness.knows(jay)
    assert np.array_equal(witness.logits(jay, [5, 300, 7]), expected)
    assert suite.second_of(jay).startswith("the witness jays:llama of jays 2.0:")
    assert np.array_equal(witness.logits(llama, [5, 300, 7]), expected)
    assert suite.second_of(llama) == suite.SECOND


def test_evidence_says_which_description_it_is_of(install: Install, tmp_path: Path) -> None:
    """A cell records its sources, so that `--resume` takes nothing from another description; prill's own is
    in the digest of prill's code."""
    jay, suite = str(file_of("jay", tmp_path)), tmp_path / "suite.py"
    suite.write_text("", "utf-8")
    install(SOUND, "jay = jays:model")
    name = "prill.architectures jays:model"
    before = provenance.describe(jay, suite)
    (tmp_path / "site" / "jays.py").write_text(f"{SOUND}\n# another\n", "utf-8")
    forget()
    after = provenance.describe(jay, suite)
    assert {key for key in before if before[key] != after[key]} == {name}
    assert set(before) == set(after) == {*provenance.describe("fixture:llama-tiny", suite), name}


def test_the_words_of_a_description_have_one_door() -> None:
    """`prill_runtime` offers each by its name, whatever room it is in, and nothing else."""
    homes = [name for names in prill_runtime.HOMES.values() for name in names]
    assert sorted(homes) == sorted(prill_runtime.__all__)
    assert [getattr(prill_runtime, name).__name__ for name in homes] == homes
    with pytest.raises(AttributeError, match="no attribute 'Nest'"):
        prill_runtime.Nest  # noqa: B018


def test_the_doctor_names_them(install: Install) -> None:
    """A sound one is ok; a broken one is said, and does not stop the gate."""
    install(SOUND, "jay = jays:model", "wren = jays:other")
    said = invoke("doctor").output
    rows = [line for line in said.splitlines() if line.startswith("architecture ")]
    assert [row.split()[1:3] for row in rows] == [["jay", "ok"], ["wren", "missing"]]
    assert "needed by files of wren alone" in rows[1]
    assert "the default gate can run" in said
