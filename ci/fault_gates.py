"""Gate one model file on an engine with each planted fault that can show in it: red, by the stage to blame.

    python ci/fault_gates.py model.gguf --out FILE

The faults are those in the code of a stage that need a feature of a model, of which the file has all, and
those that are named with --also, as NAME, or as NAME:STAGE where they are blamed on no stage. A gate has the
suites stages, tokens and witness; the last gate is that of the engine itself, and has properties and requests
too, which items of the checklist need. What a gate says is one of

    red      a check failed, and the first wrong stage that the gate names is one that the fault is blamed on
    other    red, and it names another stage or none
    quiet    nothing failed: the file cannot show the fault, or nobody sees it
    broken   the gate gave no verdict

and of the engine itself green, stale or alarm, as in sound_gates.py. Exit code: 0 if the engine is green and
every fault red, but for those of --but, of which the gate has to say that word; 10 if the engine is stale;
else 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gated
from sound_gates import said

from prill_harness.faults.catalogue import catalogue
from prill_harness.planting.faults import COMMON, Fault
from prill_harness.stages.table import KINDS, OUTER
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models import walks
from prill_runtime.models.load import describe

POLICY = """default = "model"

[gates.model]
checklists = ["model"]
blocks_at = "medium"
minimum_executed = 14

[[gates.model.plan]]
models = [{model}]
engines = ["numpy"]
suites = {suites}
"""
SUITES, REST = ("stages", "tokens", "witness"), ("properties", "requests")
FIRST = re.compile(r"(?:blk\.\d+\.)?(\w+) is the first wrong stage")


@dataclass(frozen=True)
class Gated:
    """What one gate said: the word for it, its exit code, and the check and stage that it names first."""

    fault: str
    word: str
    exit_code: int
    check: str
    stage: str

    @property
    def row(self) -> str:
        fault = f"`{self.fault}`" if self.fault else "none"
        return f"| {fault} | {self.word} | {self.exit_code} | {self.check} | {self.stage} |"


def shown_by(model: Path) -> list[Fault]:
    """The faults in the code of a stage that need features, of which the file has all."""
    with open_gguf(model) as file:
        features = walks.features(describe(file))
    stages = {*KINDS, *OUTER}
    return [
        fault for fault in catalogue().values()
        if fault.needs and features.issuperset(fault.needs) and not features & set(fault.lacks)
        and fault.area != COMMON and fault.engine == "numpy" and stages & set(fault.blames)
    ]  # fmt: skip


def judged(fault: str, blames: Sequence[str], exit_code: int, verdict: dict[str, Any]) -> Gated:
    """What a verdict says of the engine with a fault, or of the engine itself if it has none."""
    if not fault:
        return Gated(fault, said(verdict), exit_code, "-", "-")
    failed = [each for each in verdict["checks"] if each["status"] == "failed"]
    named = [(each, match) for each in failed if (match := FIRST.search(each["sentence"]))]
    named.sort(key=lambda each: each[0]["check"] != "stages.early")
    if named:
        check, stage = named[0][0]["check"], named[0][1]
        right = stage[1] in blames and exit_code == 1
        return Gated(fault, "red" if right else "other", exit_code, check, stage[0].split()[0])
    if failed:
        return Gated(fault, "other", exit_code, failed[0]["check"], "-")
    return Gated(fault, "quiet", exit_code, "-", "-")


def gate(model: Path, named: str) -> Gated:
    """Run one gate, of the engine with a fault (NAME or NAME:STAGE), or of the engine itself."""
    fault, _, stage = named.partition(":")
    suites = SUITES if fault else SUITES + REST
    blames = (stage,) if stage else catalogue()[fault].blames if fault else ()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "gates.toml").write_text(
            POLICY.format(model=json.dumps(str(model)), suites=json.dumps(suites)), "utf-8"
        )
        engine = f"numpy+fault:{fault}" if fault else "numpy"
        ran = gated.gate(folder, "--policy", "gates.toml", "--engine", engine)
    if ran.verdict is None:
        return Gated(fault, "broken", -1, "-", "-")
    return judged(fault, blames, ran.exit_code, ran.verdict)


def code(found: Sequence[Gated], otherwise: Mapping[str, str]) -> int:
    """The exit code; `otherwise`: fault -> the word owed in place of red."""
    words = {each.fault: each.word for each in found}
    engine = {"green": 0, "stale": 10}.get(words.pop("", ""), 1)
    owed = all(word == otherwise.get(fault, "red") for fault, word in words.items())
    return engine if owed and words else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--also", action="append", default=[], metavar="FAULT[:STAGE]")
    parser.add_argument("--only", action="append", default=[], metavar="FAULT", help="nothing but these")
    parser.add_argument(
        "--but", action="append", default=[], metavar="FAULT=WORD", help="owed instead of red"
    )
    parser.add_argument("--jobs", type=int, default=2, help="gates at a time")
    parser.add_argument("--out", type=Path, help="a file for the table, besides standard output")
    asked = parser.parse_args(arguments)
    names = asked.only or [*asked.also, *(fault.name for fault in shown_by(asked.model))]
    with ThreadPoolExecutor(asked.jobs) as pool:
        found = []
        for each in pool.map(lambda named: gate(asked.model.resolve(), named), [*names, ""]):
            found.append(each)
            print(each.row, file=sys.stderr, flush=True)
    table = "\n".join(
        [
            "| fault | gate | exit code | check | first wrong stage |",
            "|---|---|---|---|---|",
            *(s.row for s in found),
        ]
    )
    print(table)
    if asked.out:
        asked.out.write_text(f"{table}\n", "utf-8")
    return code(found, dict(each.split("=") for each in asked.but))


if __name__ == "__main__":
    sys.exit(main())
