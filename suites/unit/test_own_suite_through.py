"""A suite of the user's own, before faults that any engine can have planted: its kills count in its gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .commandline import emitted
from .test_new import CHECK, ENGINE, MODEL, begun, prill

SPEC = ("--engine", "py:own.py:Own", "--model", MODEL)


@pytest.mark.engines
def test_a_suite_of_ones_own_is_seen_through_a_connector(tmp_path: Path) -> None:
    """A changed file is found by the user's check, which names no part; the gate of the same folder counts it
    then, until the engine is another."""
    begun(tmp_path, "suite", "mine")
    folder = tmp_path / "mine"
    (folder / "checks" / "mine.py").write_text(CHECK, encoding="utf-8")
    engine = folder / "own.py"
    engine.write_text(f"class Own:\n    arithmetic = 'float32'\n{ENGINE}")
    asked = (*SPEC, "--suite", "mine", "--only", "file_rope_base", "--json")
    said, _ = json.JSONDecoder().raw_decode(prill(folder, "faults", "matrix", *asked, code=0))
    (found,) = emitted(json.dumps(said))["faults"]
    assert (found["killed_by"], found["blamed"], found["right"]) == (["mine.first"], "", True)
    assert found["sentence"] == "file_rope_base is killed by mine.first"
    assert counted(folder) == ("passed", "4096 values compared with numpy64 on the same file")
    engine.write_text(engine.read_text("utf-8") + "\n# the next version\n")
    status, said = counted(folder)
    assert (status, said.partition(",")[0]) == (
        "inconclusive",
        "not seen to kill in this build of the engine",
    )
    assert said.endswith("--suite mine`")


def counted(folder: Path) -> tuple[str, str]:
    """Status and sentence of the check as a gate counts it, which asks for kills of prill's own, too."""
    prill(folder, "gate", *SPEC, code=10)
    (check,) = json.loads((folder / "out" / "verdict.json").read_bytes())["checks"]
    return check["status"], check["sentence"]
