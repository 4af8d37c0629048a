"""docs/samples: every format of a report, as prill renders it from the recorded gate, byte by byte."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from prill_harness.commands.shared import reporters
from prill_harness.commands.shared.verdicts import decided
from prill_harness.records.evidence import CellStarted, Status
from prill_harness.records.ledger import audited

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "samples"


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    """`ci/samples.py --check` on a copy of the repository's samples."""
    line = f"import pathlib, samples; samples.FOLDER = f = pathlib.Path({str(folder)!r})\n"
    line += "samples.LEDGER, samples.VERDICT = f / 'ledger.jsonl', f / 'verdict.json'\n"
    line += "samples.POLICY = f / 'gates.toml'; raise SystemExit(samples.main(['--check']))"
    words = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'ci')!r})\n{line}"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_sample_is_what_prill_renders() -> None:
    """All of them, byte by byte; where one is another, `make samples` writes it."""
    done = subprocess.run(
        [sys.executable, "-P", "ci/samples.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), f"{done.stdout}{done.stderr}run make samples"


def test_one_byte_is_seen(tmp_path: Path) -> None:
    """A sample that was changed by hand, and one that nothing renders, are named."""
    subprocess.run(["cp", "-r", FOLDER, tmp_path], check=True)
    (tmp_path / "samples/reports/report.md").write_text("# PASSED\n")
    (tmp_path / "samples/reports/old.xml").write_text("")
    done = checked(tmp_path / "samples")
    assert done.returncode == 1
    assert sorted(line.rsplit("/", 1)[1] for line in done.stdout.splitlines()) == ["old.xml", "report.md"]


def test_every_format_has_its_sample_and_the_page_links_it() -> None:
    """As many files as there are formats, and the other dialect; the page names each."""
    names = {file.name for file in (FOLDER / "reports").iterdir()}
    assert set(reporters.files().values()) <= names
    assert len(names) == len(reporters.installed()) + 1
    linked = set(re.findall(r"\]\(((?:reports|terminal)/[^)]+)\)", (FOLDER / "README.md").read_text("utf-8")))
    there = {file.relative_to(FOLDER).as_posix() for file in FOLDER.glob("*/*")}
    assert linked == there


def test_the_recorded_gate_shows_something() -> None:
    """Ledger and verdict belong together; checks passed and failed, and the cause is named."""
    verdict = decided(FOLDER / "ledger.jsonl")
    assert {Status.PASSED, Status.FAILED} <= {check.status for check in verdict.checks}
    assert verdict.lead is not None
    assert any("divergences" in check.detail for check in verdict.checks)


def test_the_samples_tell_nothing_of_the_machine() -> None:
    """No host but the made-up one, and no absolute path."""
    hosts = {each.host for each in audited(FOLDER / "ledger.jsonl") if isinstance(each, CellStarted)}
    assert hosts == {"sample"}
    for file in FOLDER.rglob("*.*"):
        assert not re.search(r"[\"' =](/home|/root|/tmp|/usr|/work)/", file.read_text("utf-8")), file


@pytest.mark.parametrize("target", ["samples", "schemas"])
def test_make_writes_them(target: str) -> None:
    """The target exists and runs the script that the tests check with."""
    made = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"ci/{target}.py" in made
