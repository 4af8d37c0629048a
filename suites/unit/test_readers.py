"""JUnit and CTRF as readers take them that services are built on: they count what the verdict counts.

`make test-readers` installs the readers from npm; without them, or without node, these tests say so and skip.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import AttemptResult, Verdict
from prill_reports.cases import of_gate
from prill_reports.formats import ctrf, junit

from .sample import VERDICT

SCRIPT = Path(__file__).parent / "readers" / "read.mjs"
INSTALLED = Path(sys.prefix) / "readers"
NODE = shutil.which("node")
pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not installed, so no reader of JUnit can be asked"),
    pytest.mark.skipif(
        not (INSTALLED / "node_modules").is_dir(), reason="the readers are not installed: make test-readers"
    ),
]
TRIED = tuple(AttemptResult(n, s, "seen", 0.1) for n, s in enumerate((Status.FAILED, Status.PASSED), 1))
FLAKY = msgspec.structs.replace(
    VERDICT,
    checks=tuple(
        msgspec.structs.replace(r, attempts=TRIED) if r.status is Status.FAILED else r for r in VERDICT.checks
    ),
)
GREEN = msgspec.structs.replace(
    VERDICT, status=Status.PASSED, exit_code=0, rules=(), cells=(), waivers=(), items=(),
    checks=tuple(r for r in VERDICT.checks if r.status is Status.PASSED),
)  # fmt: skip


def read(folder: Path, verdict: Verdict, dialect: str = "default", report: str = "") -> dict[str, Any]:
    """What each reader makes of a verdict's files."""
    options = {"dialect": dialect, "folder": "out"}
    (folder / "junit.xml").write_text(junit.render(verdict, options=options), "utf-8")
    (folder / "ctrf.json").write_text(report or ctrf.render(verdict, options={}), "utf-8")
    words = [NODE, SCRIPT, INSTALLED, folder / "junit.xml", folder / "ctrf.json"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("dialect", junit.DIALECTS)
@pytest.mark.parametrize("verdict", [VERDICT, FLAKY, GREEN], ids=["failed", "flaky", "green"])
def test_every_reader_counts_what_the_verdict_counts(tmp_path: Path, dialect: str, verdict: Verdict) -> None:
    """Cases, red ones and skips, in both dialects, whether there are attempts or not; and CTRF is valid."""
    own = [said for said in of_gate(verdict) if said.status is not Status.PASSED]
    waived = sum(r.status is Status.WAIVED for r in verdict.checks)
    red = sum(r.status not in (Status.PASSED, Status.WAIVED) for r in verdict.checks) + len(own)
    total = len(verdict.checks) + len(list(of_gate(verdict)))
    found = read(tmp_path, verdict, dialect)
    assert found.pop("ctrf") == {"valid": True, "errors": []}
    assert len(found) == 3
    for name, counts in found.items():
        assert counts == {"tests": total, "failed": red, "skipped": waived}, name


def test_a_wrong_report_is_refused(tmp_path: Path) -> None:
    """The validator of CTRF's own package can say no."""
    broken = ctrf.render(VERDICT, options={}).replace('"tests": [', '"test": [')
    found = read(tmp_path, VERDICT, report=broken)["ctrf"]
    assert not found["valid"]
    assert found["errors"]
