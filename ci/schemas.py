"""Write docs/schemas/: what every command prints with --json, as JSON Schemas.

`python ci/schemas.py` writes them anew; `--check` only tells whether one is another. The tests hold what
commands really print to them, with no key left over.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import msgspec

from prill_harness.commands.fleet.plan import PlannedCell
from prill_harness.commands.gates.doctor import Preflight
from prill_harness.commands.ledgers.diff import LedgerChange, Shift
from prill_harness.console import SCHEMA
from prill_harness.decide.explained import Explanation
from prill_harness.faults.trial.kills import Clean
from prill_harness.incidents.log import Incident
from prill_harness.leaks.reports.report import LeakReport
from prill_harness.leaks.selftest.examination import Examination
from prill_harness.measure.baseline import Baseline
from prill_harness.measure.bench import BenchResult
from prill_harness.measure.filediff import Side
from prill_harness.measure.vram import Account
from prill_harness.numbers.lanes import Figures
from prill_harness.records.evidence import Evidence, Status
from prill_harness.records.verdict import (
    IncidentState,
    ItemResult,
    SpeedResult,
    Verdict,
    WaiverResult,
)

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schemas"
BASE = "https://github.com/prill-dev/prill/blob/main/docs/schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
Fields = dict[str, Any]
Number = float | None
Infinite = float | str | None
"""A number, or "inf", "-inf" or "nan", which JSON has no numbers for."""

RENDERED: Fields = {"format": str, "file": str | None, "text": str | None, "status": Status}
GOLDEN: Fields = {
    "name": str, "type": str, "model_sha256": str, "oracle": str, "versions": dict[str, str],
    "margins": dict[str, Any], "floors": dict[str, dict[str, Any]],
}  # fmt: skip
FAULT: Fields = {
    "name": str, "area": str, "summary": str, "blames": list[str], "needs": list[str], "lacks": list[str],
    "models": list[str],
}  # fmt: skip
TRIED: Fields = {
    "name": str, "killed_by": list[str], "blamed": list[str], "blames": list[str], "right": bool,
    "sentence": str, "because": [{"check": str, "sentence": str}, None],
}  # fmt: skip
KINDS = ("adapter", "engine", "gate", "suite")  # of what `prill new` begins
FILE: Fields = {"path": str, "sha256": str}
TENSOR: Fields = {
    "name": str, "type": str, "shape": list[int], "nbytes": int, "offset": int, "part?": int, "sha256?": str,
}  # fmt: skip
DIFFERENCE: Fields = {
    "name": str, "a": Side | None, "b": Side | None, "same": bool, "nmse": Infinite, "largest": Infinite,
    "note": str,
}  # fmt: skip
STEP: Fields = {
    "step": str, "ok": bool, "status": Status, "sentence": str, "observed": int, "inconclusive": bool,
    "figures": Figures | None, "bounds": Figures | None, "detail": dict[str, Any],
}  # fmt: skip

LOGGED: Fields = {
    **{field.name: field.type for field in msgspec.structs.fields(Incident)},
    "state": IncidentState, "due": str, "lacking": str, "reproduce": str,
}  # fmt: skip

PRINTED: dict[str, dict[str, Any]] = {
    "engines": {
        "bench": [
            {"result": BenchResult, "budget": Number, "over": list[str]},
            {"baseline": Baseline},
            {
                "speeds": list[SpeedResult], "budget": float, "status": Status, "noise": float,
                "now": Baseline,
            },
        ],
        "bisect": {
            "candidate": str, "against": str, "model": str, "lane": str, "ids": list[int], "sentence": str,
            "observed": int, "missing": list[str],
            "findings": [
                {
                    "stages": list[str], "nmse": Number, "where": str, "explanation": str | None,
                    "sentence": str,
                }, ...
            ],
            "stages": [{"stage": str, "free": Number, "isolated": Number, "bound": Number, "ok": bool}, ...],
        },
        "generate": {
            "text": str, "ids": list[int], "logprobs": list[Number], "finish_reason": str,
            "ended_by": [{"id": int, "text": str, "by": str}, None], "prompt_ids": list[int],
            "first_token_s": Number, "tokens_per_s": Number,
        },
        "golden compare": {"engine": str, "model": str, "findings": [STEP, ...]},
        "golden record": {"file": str, "prompts": int, "tokens?": int, **GOLDEN},
        "golden show": {**GOLDEN, "prompts": [
            {
                "text": str, "ids": list[int], "tokens": list[int], "continuation": str,
                "first_eos": int | None,
            }, ...
        ]},
        "inspect": [
            {
                **FILE, "parts?": int, "version": int, "architecture": str, "alignment": int,
                "features": list[str] | None, "metadata": dict[str, Any], "tensors": [TENSOR, ...],
                "bytes_by_type": dict[str, int],
                "assumptions": [{"key": str, "assumed": str, "why": str}, ...],
            },
            {
                "a": FILE, "b": FILE, "same": bool, "nmse": Infinite, "tensors": [DIFFERENCE, ...],
                "metadata": [{"key": str, "a": Any, "b": Any, "first_difference": int | None}, ...],
            },
        ],
        "judged": {
            "page": str, "judged": list[str], "changed": list[str], "rows": list[str], "found": list[str],
        },
        "leak": [LeakReport, Examination],
        "trace": {
            "engine": str | None, "model": str | None, "ids": list[int], "file": str | None,
            "stages": [
                {"stage": str, "shape": str, "rms": Any, "largest": Any, "named?": str, "op?": str}, ...
            ],
        },
        "vram": Account,
    },
    "fleet": {
        "merge": {"ledger": str, "cells": list[str], "checks": int},
        "plan": {
            "gate": str, "cells": list[PlannedCell], "jobs": int, "run": int, "expected_s": float,
            "unknown": int,
        },
    },
    "gates": {
        "checklist": [
            {"file": str, "items": int},
            {
                "status": Status, "counts": dict[str, int], "ledger": str, "items": list[ItemResult],
                "left_out": dict[str, dict[str, int]],
            },
        ],
        "completion": {"shell": str, "script": str},
        "doctor": {"ready": bool, "findings": list[Preflight]},
        "explain": {"explanation": Explanation, "reproduce": str, "see_it_fail": str},
        "faults list": {"faults": [FAULT | {"engine": str}, ...]},
        "faults matrix": [
            {
                "faults": [TRIED, ...], "alarms": list[str], "unkept_claims": dict[str, list[str]],
                "owed": dict[str, Any], "fell": list[str], "clean": Clean,
            },
            {
                "file": str, "unkept_claims": dict[str, list[str]], "alarms": list[str],
                "killed_by": dict[str, list[str]],
            },
            {"engine": str, "faults": [{
                "name": str, "model": str, "killed_by": list[str], "blamed": str, "right": bool,
                "unsaid": str, "sentence": str,
            }, ...]},
        ],
        "faults run": {"faults": [TRIED, ...]},
        "faults show": {**FAULT, "source": str, "killed_by": list[str], "blamed": list[str]},
        "gate": [
            Verdict,
            {"ledger": str, "cells": list[str], **{f"{status}?": int for status in (*Status, "missing")}},
        ],
        **{f"new {kind}": {"files": list[str], "next": list[str]} for kind in KINDS},
        "report": RENDERED,
        "requests": {"file": str, "requests": dict[str, int]},
        "run": {
            "evidence": list[Evidence], "lost": list[tuple[str, str]], "counts": dict[str, int],
            "exit_code": int,
        },
    },
    "incidents": {
        **{f"incident {verb}": LOGGED for verb in ("close", "show", "verify")},
        "incident list": {"incidents": [LOGGED, ...]},
        "incident new": {"id": str, "file": str, "lacking": str},
        "waive add": {"id": str, "file": str, "covers": str},
        "waive check": {"waivers": list[WaiverResult]},
        "waive prune": {"removed": list[WaiverResult]},
    },
    "ledgers": {
        "badge": RENDERED,
        "diff": {"changes": list[LedgerChange], "figures": list[Shift], "inputs": list[str], "same": int},
        "show": {
            "shown": [{"evidence": Evidence, "attempts": list[Evidence]}, ...],
            "others": [{"cell": str, "check": str, "status": Status}, ...],
        },
    },
}  # fmt: skip
"""Room -> command -> its data: a type; the fields of an object, those with `?` optional; [x, ...] for a list
of x; any other list for alternatives."""


def typed(shape: Any, name: str) -> Any:
    """A shape of the table as a type, or as a tuple of types that are alternatives."""
    if isinstance(shape, dict):
        fields = {
            key.rstrip("?"): NotRequired[inner] if key.endswith("?") else inner
            for key, value in shape.items()
            if (inner := typed(value, f"{name} {key.rstrip('?')}")) is not None
        }
        return TypedDict(name.title().replace(" ", ""), fields)  # type: ignore[operator]
    if isinstance(shape, list) and shape[-1] is ...:
        return list[typed(shape[0], name)]  # type: ignore[misc]
    if isinstance(shape, list) and shape[-1] is None:
        return typed(shape[0], name) | None
    return shape


def anything(kind: type) -> dict[str, Any]:
    """The schema of `object`, which evidence uses for whatever JSON holds."""
    if kind is object:
        return {"description": "any JSON value"}
    raise NotImplementedError(kind)


def schema(command: str, shape: Any) -> dict[str, Any]:
    """The schema of all that a command prints."""
    alternatives = shape if isinstance(shape, list) else [shape]
    types = [typed(each, f"{command} {number or ''}".strip()) for number, each in enumerate(alternatives)]
    found, defs = msgspec.json.schema_components(types, ref_template="#/$defs/{name}", schema_hook=anything)
    file = command.replace(" ", "-")
    return {
        "$schema": DIALECT,
        "title": f"prill {command} --json",
        "type": "object",
        "properties": {
            "prill": {"type": "string", "description": "version of prill"},
            "schema": {"const": f"{file}/{SCHEMA}"},
            "command": {"const": command},
            "data": found[0] if len(found) == 1 else {"anyOf": list(found)},
        },
        "required": ["prill", "schema", "command", "data"],
        "$defs": defs,
    }


def files() -> dict[Path, str]:
    """Path -> text of every schema."""
    made = {}
    for room, commands in PRINTED.items():
        for command, shape in commands.items():
            name = f"{room}/{command.replace(' ', '-')}.json"
            document = {"$id": f"{BASE}/{name}"} | schema(command, shape)
            made[FOLDER / name] = json.dumps(document, indent=1) + "\n"
    return made


def main(words: list[str]) -> int:
    wanted = files()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    stale += [path for path in FOLDER.rglob("*.json") if path not in wanted]
    for path in stale:
        print(path.relative_to(FOLDER.parent.parent))
        if "--check" not in words:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], "utf-8") if path in wanted else path.unlink()
    return 1 if stale and "--check" in words else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
