"""A run of many cells is as long as its cells: what each costs prill does not grow with their number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_large_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """The measurement of `ci/scale_bench.py`, with fewer cells: killed half-way, no cell that had ended runs
    again, and the verdict is a pass of every cell within the limits."""
    words = [sys.executable, str(ROOT / "ci/scale_bench.py"), "--cells", "80", "--jobs", "2"]
    done = subprocess.run([*words, "--folder", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["ran_twice"]) == (True, 0)
    assert found["ended_before_the_kill"] + found["begun_after_it"] == 80
    assert 0 < found["ended_before_the_kill"] < 80
    assert found["verdict"].startswith("gate synthetic passed: 80 checks in 80 cells")
    assert list(tmp_path.iterdir()) == []
