"""The shipped checks are held to their own law: each is listed, names its faults, passes on a sound engine,
and does not pass on a broken one."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from prill_harness.decide.checklist import load_checklists
from prill_harness.faults.trial import kills
from prill_harness.faults.trial.matrix import claims
from prill_harness.plan.plan import cells_of
from prill_harness.plan.policy import load_policy
from prill_harness.records.catalog import check_ids, packaged, suite_file, suites
from prill_harness.records.evidence import Evidence, Status
from prill_harness.records.ledger import read

from .planted_options import FAULTS

ROOT = Path(__file__).resolve().parents[2]
MODEL = "fixture:llama-tiny"
SUITES = (
    "blocks",
    "boundary",
    "cache",
    "contract",
    "cost",
    "errors",
    "file",
    "harness",
    "memory",
    "ops",
    "options",
    "process",
    "properties",
    "requests",
    "sampler",
    "stages",
    "tokenizer",
    "tokens",
    "witness",
)
OTHERS = {"contract": "contract", "boundary": "boundary", "process": "boundary"}
"""Suites of engines that somebody else wrote -> their checklist and their gate."""
ALLOWED = {
    "prill_runtime",
    "prill_harness",
    "prill_fixtures",
    "prill_suites",
    "gguf",
    "msgspec",
    "numpy",
    "psutil",
    "pytest",
}


def marked() -> dict[str, Any]:
    """Every check's function by its id."""
    found = {}
    for name in SUITES:
        module = importlib.import_module(f"prill_suites.{name}")
        for function in vars(module).values():
            for mark in getattr(function, "pytestmark", []):
                if mark.name == "prill_check":
                    assert mark.kwargs["name"] not in found, f"{mark.kwargs['name']} is declared twice"
                    found[mark.kwargs["name"]] = (name, function, mark.kwargs)
    return found


CHECKS = marked()


def run(tmp_path: Path, suite: str, *checks: str, model: str = MODEL) -> dict[str, Evidence]:
    """Run checks of a suite in this process, through the plugin; their evidence by id."""
    ledger = tmp_path / f"{suite}.jsonl"
    options = [f"--prill-model={model}", "--prill-engine=numpy", f"--prill-ledger={ledger}"]
    options += [f"--prill-check={check}" for check in checks]
    plain = [
        "-q",
        "--no-header",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--rootdir={tmp_path}",
    ]
    pytest.main([*plain, *options, "--import-mode=importlib", "-c", "/dev/null", str(suite_file(suite))])
    return {record.check: record for record in read(ledger) if isinstance(record, Evidence)}


def test_every_suite_is_known() -> None:
    """No suite is left out of these tests, and every function marked as a check was found."""
    assert set(suites()) == set(SUITES)
    assert set(check_ids()) == set(CHECKS)


@pytest.mark.parametrize("check", sorted(CHECKS))
def test_a_check_states_its_claim_and_its_faults(check: str) -> None:
    """A check belongs to its file's suite, claims something in words and names faults in snake case."""
    suite, function, marker = CHECKS[check]
    assert check.startswith(f"{suite}.")
    assert (function.__doc__ or "").strip().endswith(".")
    assert marker["kills"]
    for fault in marker["kills"]:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", fault), fault


def test_checklists_and_checks_agree() -> None:
    """Every check proves some item, and every item's checks exist."""
    listed = {check for checklist in load_checklists() for item in checklist.items for check in item.checks}
    assert listed == set(CHECKS)


def test_the_gates_run_every_check() -> None:
    """The default gate holds a cell of every suite and requires every checklist, but those of `contract` and
    `boundary`, the gates of engines that somebody else wrote."""
    policy = load_policy(packaged() / "gates.toml")
    default = policy.gate()
    assert {suite for entry in default.plan for suite in entry.suites} == set(SUITES) - set(OTHERS)
    assert set(default.checklists) == {each.id for each in load_checklists()} - {*OTHERS.values()}
    for name in OTHERS.values():
        gate = policy.gate(name)
        own = {suite for suite, checklist in OTHERS.items() if checklist == name}
        assert {suite for entry in gate.plan for suite in entry.suites} == own
        assert gate.checklists == (name,)


def test_the_gates_build_on_one_another() -> None:
    """foundation, architectures, adapters, release: each holds all of the one before, and asks for more; the
    last runs every suite on every model that any gate runs, and its documents are in this repository."""
    policy = load_policy(packaged() / "gates.toml")
    chain = [policy.gate(name) for name in ("foundation", "architectures", "adapters", "release")]
    for before, after in pairwise(chain):
        assert set(cells_of(before)) < set(cells_of(after))
        assert set(before.checklists) <= set(after.checklists)
        assert before.minimum_executed < after.minimum_executed
    release = chain[-1]
    assert {cell for gate in policy.gates.values() for cell in cells_of(gate)} == set(cells_of(release))
    assert set(release.checklists) == {each.id for each in load_checklists()}
    assert (release.leak_budget, release.performance_budget) == (0, 10.0)
    assert release.documents
    assert all((ROOT / name).read_text("utf-8").strip() for name in release.documents)


def test_a_checkout_judges_by_the_packaged_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CI runs at the top of the repository names no policy, and decides by the one that is installed."""
    monkeypatch.chdir(ROOT)
    assert load_policy().path == packaged() / "gates.toml"
    own = [file for folder in ("ci", ".ci") for file in (ROOT / folder).rglob("*") if file.is_file()]
    scripts = [file.read_bytes() for file in (*own, ROOT / "Makefile") if file.suffix != ".pyc"]
    assert scripts
    assert not any(b"--policy ci/" in text or b"ci/gates.toml" in text for text in scripts)


def test_suites_import_nothing_else() -> None:
    """A suite needs only the rooms below it, and what prill already depends on."""
    seen = 0
    for file in packaged().glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in (name.split(".")[0] for name in names):
                seen += 1
                assert top in ALLOWED or top in sys.stdlib_module_names, f"{file.name} imports {top}"
    assert seen > 50


@pytest.mark.parametrize("suite", SUITES)
def test_a_sound_engine_passes(suite: str, tmp_path: Path) -> None:
    """Every check of the suite passes on the embedded engine, and says what it saw."""
    evidence = run(tmp_path, suite)
    assert {record.base for record in evidence.values()} == {c for c in CHECKS if c.startswith(f"{suite}.")}
    wrong = {check: r.sentence for check, r in evidence.items() if r.status is not Status.PASSED}
    assert not wrong
    assert all(record.observed and record.sentence for record in evidence.values())


@pytest.mark.parametrize(
    ("fault", "suite"),
    [(f, s) for f, (_, cs) in FAULTS.items() for s in sorted({c.split(".")[0] for c in cs})],
)
def test_a_broken_engine_fails(
    fault: str, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks that must see a planted fault fail under it."""
    plant, checks = FAULTS[fault]
    wanted = [check for check in checks if check.startswith(f"{suite}.")]
    with monkeypatch.context() as patch:
        plant(patch)
        evidence = run(tmp_path, suite, *wanted)
    by_base: dict[str, set[Status]] = {}
    for record in evidence.values():
        by_base.setdefault(record.base, set()).add(record.status)
    assert set(by_base) == set(wanted)
    blind = {check: {e.sentence for e in evidence.values() if e.base == check}
             for check, statuses in by_base.items() if Status.FAILED not in statuses}  # fmt: skip
    assert not blind


def test_every_check_has_seen_a_fault() -> None:
    """No check is without a broken engine on which it is seen to fail; those of engines that somebody else
    wrote, seconds each, were seen to by the matrix: each killed what it claims."""
    seen = {check for _, checks in FAULTS.values() for check in checks}
    by_matrix = {check for check in CHECKS if check.split(".")[0] in OTHERS}
    assert seen == set(CHECKS) - by_matrix
    recorded = kills.load().faults
    for check in by_matrix:
        assert claims()[check], check
        assert all(check in recorded[fault].killed_by for fault in claims()[check]), check


def test_a_flipped_weight_in_a_packaged_fixture_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One changed byte of a committed model fails the digest check with both digests in the sentence."""
    from prill_fixtures import store

    data = bytearray((store.MODELS / "llama-tiny.gguf").read_bytes())
    data[-1000] ^= 1
    (tmp_path / "llama-tiny.gguf").write_bytes(data)
    (tmp_path / "digests.json").write_bytes((store.MODELS / "digests.json").read_bytes())
    monkeypatch.setattr(store, "MODELS", tmp_path)
    (evidence,) = run(tmp_path, "file", "file.digest").values()
    assert evidence.status is Status.FAILED
    assert "sha256 expected" in evidence.sentence
