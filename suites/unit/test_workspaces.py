"""A gate in several folders: shards add up, a model keeps its name, and deciding needs no model file."""

from __future__ import annotations

import json
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from .commandline import child
from .tiny_gguf import tiny

POLICY = """default = "small"
[gates.small]
checklists = ["foundation"]
[[gates.small.plan]]
models = ["fixture:llama-tiny"]
engines = ["numpy"]
suites = ["blocks"]
"""


def gate(folder: Path, *words: str) -> Any:
    """The verdict of a gate in `folder`, and the JUnit beside it."""
    (folder / "gates.toml").write_text(POLICY)
    done = child("gate", "--policy", "gates.toml", "--as-of", "2026-01-31", *words, cwd=folder)
    assert done.returncode in (0, 10), done.stderr
    file = folder / "out" / "verdict.json"
    return json.loads(file.read_text()) if file.exists() else None


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two workspaces with the same two models in them, each of which ran one of two shards."""
    base = tmp_path_factory.mktemp("ci")
    folders = [base / "job", base / "job@2"]
    for number, folder in enumerate(folders, 1):
        (folder / "models").mkdir(parents=True)
        tiny(folder / "models" / "own.gguf", seed=3)
        tiny(folder / "other.gguf", seed=4)
        gate(folder, *MODELS, "--shard", f"{number}/2")
    return folders


MODELS = ("--model", "models/own.gguf", "--model", "other.gguf")


def test_shards_of_two_workspaces_add_up(shards: list[Path], tmp_path: Path) -> None:
    """Decided in a third folder that has no model at all: both cells are complete, under the names given."""
    ledgers = [word for folder in shards for word in ("--from", str(folder / "out" / "ledger.jsonl"))]
    verdict = gate(tmp_path, *MODELS, *ledgers)
    assert {c["cell"]["model"]: c["status"] for c in verdict["cells"]} == {
        "models/own.gguf": "complete",
        "other.gguf": "complete",
    }
    assert len({*verdict["models"].values()}) == 2
    junit = (tmp_path / "out" / "junit.xml").read_text()
    assert not any(str(folder.parent) in text for folder in shards for text in (junit, json.dumps(verdict)))


def test_a_link_is_called_by_its_name_and_its_checks_can_be_repeated(tmp_path: Path) -> None:
    """A link of a cache elsewhere: cells, report and JUnit carry its name, digest beside it; the command to
    reproduce works as printed, in the folder where the gate ran."""
    cache, work = tmp_path / "hub", tmp_path / "work"
    (cache / "snapshots").mkdir(parents=True)
    work.mkdir()
    blob = tiny(cache / ("5e" * 32), seed=3)
    link = cache / "snapshots" / "barley-1b-q8_0.gguf"
    link.symlink_to(blob)
    verdict = gate(work, "--model", str(link))
    assert {c["cell"]["model"] for c in verdict["cells"]} == {"barley-1b-q8_0.gguf"}
    ((name, digest),) = verdict["models"].items()
    assert name == "barley-1b-q8_0.gguf"
    for report in ("report.md", "report.html", "junit.xml"):
        text = (work / "out" / report).read_text()
        assert name in text
        assert digest in text
        assert blob.name not in text
    classes = {c.get("classname") for c in ET.parse(work / "out" / "junit.xml").getroot().iter("testcase")}
    assert classes == {"barley-1b-q8_0_gguf.numpy.cpu", "prill.gate"}
    (command,) = [c["reproduce"] for c in verdict["checks"] if c["check"] == "blocks.all_types"]
    again = child(*shlex.split(command)[1:], cwd=work)
    assert again.returncode == 0, again.stderr
    assert "1 passed" in again.stdout
