"""Names of models: the same on every machine, apart within a run, and as they were given."""

from __future__ import annotations

import tempfile
from contextlib import chdir
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.plan.given import named

PARTS = st.sampled_from(["a", "b", "c"])
FILES = st.sampled_from(["x.gguf", "y.gguf"])
PATHS = st.tuples(st.lists(PARTS, max_size=3), FILES).map(lambda p: "/".join([*p[0], p[1]]))


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (["own.gguf"], ["own.gguf"]),
        (["./models/../own.gguf"], ["own.gguf"]),
        (["models/own.gguf"], ["models/own.gguf"]),
        (["{here}/deep/own.gguf"], ["own.gguf"]),
        (["/far/away/own.gguf"], ["own.gguf"]),
        (["../own.gguf"], ["own.gguf"]),
        (["/far/q4/own.gguf", "/far/q8/own.gguf"], ["q4/own.gguf", "q8/own.gguf"]),
        (["own.gguf", "/far/own.gguf"], ["own.gguf", "far/own.gguf"]),
        (["/m.gguf", "m.gguf"], ["{up}m.gguf", "m.gguf"]),
        (["deep/own.gguf", "{here}/deep/own.gguf"], ["deep/own.gguf", "deep/own.gguf"]),
        (
            ["fixture:llama-tiny:q4_k", "synth:llama-1b:f16"],
            ["fixture:llama-tiny:q4_k", "synth:llama-1b:f16"],
        ),
    ],
)
def test_a_name_is_what_a_person_would_call_it(
    specs: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path as it was given; of an absolute one the file's name and what tells it apart."""
    monkeypatch.chdir(tmp_path)
    up = "../" * (len(tmp_path.parts) - 1)
    found = named([spec.format(here=tmp_path) for spec in specs])
    assert list(found.values()) == [name.format(up=up) for name in expected]


def test_a_link_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of a cache is called as it was given, not by the digest it leads to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("5e" * 32)
    blob.touch()
    link = tmp_path / "barley-q8_0.gguf"
    link.symlink_to(blob)
    assert named([str(link)]) == {str(link): "barley-q8_0.gguf"}


@settings(max_examples=200, deadline=None)
@given(st.lists(PATHS, min_size=1, max_size=6), st.booleans(), st.randoms(use_true_random=False))
def test_names_are_apart_and_hold_no_machine(paths: list[str], absolute: bool, random: object) -> None:
    """Files that differ have names that differ, whatever the order; no name is absolute or has a workspace's
    folder in it; and two workspaces call the same files the same."""
    found: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        for work in (Path(one).resolve(), Path(two).resolve()):
            specs = [str(work / path) if absolute else path for path in paths]
            random.shuffle(specs)  # type: ignore[attr-defined]
            with chdir(work):
                names = named(specs)
            found.append({spec.removeprefix(f"{work}/"): name for spec, name in names.items()})
            assert not any(name.startswith("/") or work.name in name for name in names.values())
    assert len(set(found[0].values())) == len(set(paths))
    assert found[0] == found[1]
