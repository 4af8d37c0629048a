"""Write docs/samples/: a report of every format, of one small gate that was recorded.

`python ci/samples.py` renders them anew from the recorded ledger and its verdict; `--check` only tells
whether one is another; `--record` runs the gate of docs/samples/gates.toml first and names its host `sample`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
from click.testing import CliRunner

from prill_harness import cli
from prill_harness.commands.shared import reporters
from prill_harness.plan.provenance import file_digest
from prill_harness.records import ledger
from prill_harness.records.evidence import CellStarted, Record
from prill_harness.records.verdict import Verdict

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "samples"
LEDGER, VERDICT, POLICY = FOLDER / "ledger.jsonl", FOLDER / "verdict.json", FOLDER / "gates.toml"
DAY = "2026-11-30"
PRILL = [sys.executable, "-c", "from prill_harness.cli import main; main()"]
NAMES = {
    "badge": "badge.svg", "shields": "badge.json", "checklist": "checklist.md",
    "github-summary": "github-summary.md", "sprint": "sprint.md",
}  # fmt: skip
"""Files of formats that no gate writes; those of others are NAME.txt."""
STRICT = "junit-strict.xml"
PRINTED = {
    "show.txt": ["show", "tokens.greedy"],
    "show.json": ["show", "cache.exactly_full", "--json"],
}


def decided() -> Verdict:
    """The recorded verdict, sealed as this prill seals it: a field that is new has its default in it."""
    verdict = msgspec.json.decode(VERDICT.read_bytes(), type=Verdict)
    return verdict.sealed(file_digest(LEDGER))


def rendered() -> dict[Path, str]:
    """Path -> text of every sample that follows from the ledger and the verdict."""
    verdict, place = decided(), {"folder": "out"}
    made = {VERDICT: msgspec.json.format(msgspec.json.encode(verdict), indent=1).decode() + "\n"}
    for name, reporter in reporters.installed().items():
        file = reporter.file or NAMES.get(name, f"{name}.txt")
        made[FOLDER / "reports" / file] = reporters.render(name, verdict, place)
    strict = reporters.render("junit", verdict, place | {"dialect": "jenkins-strict"})
    made[FOLDER / "reports" / STRICT] = strict
    for file, words in PRINTED.items():
        made[FOLDER / "terminal" / file] = (
            CliRunner().invoke(cli.cli, [*words, "--ledger", str(LEDGER)]).stdout
        )
    return made


def record() -> None:
    """Run the gate, take this machine's name out of its ledger, and decide on that."""
    with tempfile.TemporaryDirectory() as folder:
        gate = [*PRILL, "gate", "--policy", str(POLICY), "--as-of", DAY]
        subprocess.run([*gate, "--out", f"{folder}/run"], cwd=folder, check=False)
        records = [_unnamed(each) for each in ledger.read(f"{folder}/run/ledger.jsonl")]
        kept = Path(folder, "kept.jsonl")
        kept.write_bytes(ledger.lines(records))
        subprocess.run([*gate, "--from", str(kept), "--out", f"{folder}/out"], cwd=folder, check=False)
        for file in (LEDGER, VERDICT):
            file.write_bytes(Path(folder, "out", file.name).read_bytes())


def _unnamed(each: Record) -> Record:
    return msgspec.structs.replace(each, host="sample") if isinstance(each, CellStarted) else each


def main(words: list[str]) -> int:
    if "--record" in words:
        record()
    wanted = rendered()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    kept = {*wanted, LEDGER, POLICY, FOLDER / "README.md"}
    stale += [path for path in FOLDER.rglob("*") if path.is_file() and path not in kept]
    for path in stale:
        print(path.relative_to(FOLDER.parent.parent))
        if "--check" not in words:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], "utf-8") if path in wanted else path.unlink()
    return 1 if stale and "--check" in words else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
