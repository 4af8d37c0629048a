"""The kill matrix: which suites see a fault, what a trial comes to, and how a weakened check is found."""

from __future__ import annotations

import datetime as dt
import os
import shutil
from pathlib import Path

import msgspec
import pytest

import prill_harness
from prill_harness.commands.gates import faults as commands
from prill_harness.decide import gate
from prill_harness.decide.checklist import Checklist, Item
from prill_harness.faults.catalogue import catalogue
from prill_harness.faults.trial import clean, matrix
from prill_harness.faults.trial import forgotten as oblivion
from prill_harness.faults.trial import kills as data
from prill_harness.faults.trial.forgotten import Amount, Forgotten, Kill
from prill_harness.faults.trial.kills import Kills
from prill_harness.faults.trial.matrix import TrialSubject
from prill_harness.plan import plan
from prill_harness.plan.plan import Plan
from prill_harness.plan.policy import Gate, PlanEntry, Policy, default_gate
from prill_harness.planting import faults
from prill_harness.planting.faults import Fault
from prill_harness.records.catalog import packaged, suites
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.records.verdict import Severity, Verdict
from prill_harness.run import executor

from .commandline import child, emitted, invoke

MODEL = "fixture:llama-tiny"
WRONG = "blk.0.act is the first wrong stage: NMSE 0.3"
NAME = "rope_base_default"
EMPTY = Kills()


def fault(name: str = "bug", area: str = "feed-forward", *blames: str) -> Fault:
    return Fault(name, area, blames or ("act",), "is wrong", (MODEL,), lambda: ())


def seen(
    check: str, engine: str = "numpy", status: Status = Status.PASSED, sentence: str = "seen"
) -> Evidence:
    cell = Cell(MODEL, engine, check.partition(".")[0])
    return Evidence(check, "c" * 64, cell, status, 1, sentence, "oracle", ("bug",), "prill run")


# --- planning -----------------------------------------------------------------------------------------------


def test_every_area_has_suites_that_look_at_it() -> None:
    """No area is forgotten, no suite is misnamed, and the order knows every suite there is."""
    assert set(matrix.LOOK) == set(faults.AREAS)
    assert set(suites()) <= set(matrix.ORDER)
    assert {suite for names in matrix.LOOK.values() for suite in names} <= set(matrix.ORDER)


@pytest.mark.parametrize("area", faults.AREAS)
def test_a_subject_is_run_against_at_least_one_suite(area: str) -> None:
    """Even a fault that no check claims is looked for; the suites come in the order of a diagnosis."""
    names = matrix.suites_for(TrialSubject((fault("bug", area),)), {})
    assert names
    assert list(names) == sorted(names, key=matrix.ORDER.index)


def test_suites_that_claim_a_fault_see_it() -> None:
    """A claim brings its suite in."""
    assert "errors" in matrix.suites_for(TrialSubject((fault(),)), {"errors.too_long": ("bug",)})
    assert "errors" not in matrix.suites_for(TrialSubject((fault(),)), {"errors.too_long": ("other",)})
    assert "harness" in matrix.suites_for(TrialSubject((fault("h", "harness"),)), {})


def test_every_trial_has_its_clean_control() -> None:
    """For each model the suites of its trials run on the clean engine too."""
    subjects = [TrialSubject((fault("a"),)), TrialSubject((fault("b", "tokenizer"),))]
    cells = matrix.cells_for(subjects, {})
    trials = {cell for cell in cells if cell.engine != "numpy"}
    assert {cell.engine for cell in trials} == {"numpy+fault:a", "numpy+fault:b"}
    owed = {(cell.model, suite) for cell in trials for suite in cell.suite.split("+")}
    assert owed == {(cell.model, cell.suite) for cell in set(cells) - trials}


def test_a_whole_matrix_runs_the_gate_on_the_clean_engine() -> None:
    """Every cell of the default gate is run without a fault, once, so that amounts are recorded."""
    wanted = default_gate()
    cells = matrix.cells_for([TrialSubject((fault(),))], {}, gate=wanted)
    assert {cell for cell in plan.build(wanted).cells if cell.engine == "numpy"} <= set(cells)
    assert len(set(cells)) == len(cells) > 30
    assert sum(cell.engine != "numpy" for cell in cells) == 1


def test_every_means_all_suites() -> None:
    """What the likely suites did not see is shown to all of them."""
    trial = next(
        c for c in matrix.cells_for([TrialSubject((fault(),))], {}, every=True) if c.engine != "numpy"
    )
    assert set(trial.suite.split("+")) == set(suites())


# --- judging ------------------------------------------------------------------------------------------------


def test_a_trial_is_judged_beside_the_clean_engine() -> None:
    """Killed and blamed; what is also red without the fault does not count."""
    subject = TrialSubject((fault(),))
    records = [
        seen("stages.early"), seen("ops.swiglu"), seen("ops.add", status=Status.FAILED),
        *(seen(c, subject.engine, Status.FAILED, WRONG) for c in ("stages.early", "ops.swiglu", "ops.add")),
    ]  # fmt: skip
    (result,) = matrix.judge([subject], records)
    assert (result.killed_by, result.right) == (("ops.swiglu", "stages.early"), True)
    assert result.trial().blamed == ("act",)
    alarms, carried_out = matrix.alarms(records)
    assert ([e.check for e in alarms], carried_out) == (["ops.add"], 3)


def test_a_wrong_blame_is_said() -> None:
    """Killed, but somebody else is blamed: not right, and the sentence names both."""
    subject = TrialSubject((fault("bug", "norm", "attn_norm"),))
    records = [seen("stages.early"), seen("stages.early", subject.engine, Status.FAILED, WRONG)]
    (result,) = matrix.judge([subject], records)
    assert not result.right
    assert "act is blamed, wrongly: it breaks attn_norm" in result.sentence


def test_a_fault_that_nothing_sees_survives() -> None:
    """Passes and crashes kill nothing."""
    subject = TrialSubject((fault(),))
    records = [seen("ops.add"), seen("ops.swiglu"), seen("ops.add", subject.engine)]
    records.append(seen("ops.swiglu", subject.engine, Status.ERROR))
    (result,) = matrix.judge([subject], records)
    assert (result.killed_by, result.blamed, result.right) == ((), None, False)
    assert "survives" in result.sentence


def test_claims_that_were_not_kept_are_named() -> None:
    """Of the faults that were run, those a check claims without killing them; others say nothing."""
    claimed = {"ops.add": ("bug", "other"), "ops.embed": ("bug",), "ops.rope": ("not_run",)}
    assert matrix.unkept(claimed, {"bug": ("ops.add",), "other": ()}) == {
        "ops.add": ("other",),
        "ops.embed": ("bug",),
    }


def test_the_content_of_a_check_is_that_of_the_clean_run() -> None:
    """A fault of the harness may change the checks themselves: their hashes are not taken from its cells."""
    faulty = seen("ops.add", "numpy+fault:bug")
    records = [seen("ops.add"), msgspec.structs.replace(faulty, content="d" * 64)]
    assert matrix.contents(records) == {"ops.add": "c" * 64}


def test_the_longest_cells_come_first() -> None:
    """No core is left alone with one long cell at the end."""
    light, heavy = TrialSubject((fault("a", "rope"),)), TrialSubject((fault("b", "head"),))
    engines = [cell.engine for cell in matrix.cells_for([light, heavy], {}) if cell.engine != "numpy"]
    assert engines == ["numpy+fault:b", "numpy+fault:a"]


def test_a_window_is_a_piece_of_the_text() -> None:
    """Clean runs differ by seed, and take every length."""
    text = list(range(1000))
    pieces = [clean.window(text, seed) for seed in range(60)]
    assert all(piece == text[piece[0] : piece[-1] + 1] for piece in pieces)
    assert len({len(piece) for piece in pieces}) > 30
    assert clean.window([7, 8], 3) == [7, 8]


def test_a_clean_run_is_within_its_bounds_and_a_faulty_one_is_not() -> None:
    """The same judgement alarms as soon as the engine has a fault: zero alarms are not deafness."""
    (found,) = clean.runs(MODEL, [1])
    assert found.alarm == ""
    assert 0 < found.ratio < 1
    open_engine = clean.open_engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            clean, "open_engine", lambda s, m: open_engine(f"{s}+fault:{NAME}" * (s == "numpy") or s, m)
        )
        (found,) = clean.runs(MODEL, [1])
    assert "wrong" in found.alarm or "bound" in found.alarm or "rope" in found.alarm
    assert found.ratio > 1


# --- the command --------------------------------------------------------------------------------------------


def test_list_names_every_fault() -> None:
    """The list is the catalogue, that of a device too, each fault with what it breaks."""
    listed = emitted(invoke("faults", "list", "--json").stdout)["faults"]
    assert [f["name"] for f in listed] == [*catalogue(), *catalogue("emu")]
    assert {f["engine"] for f in listed} == {"numpy", "emu"}
    assert all(f["summary"] and f["area"] in faults.AREAS and f["blames"] and f["models"] for f in listed)


def test_show_prints_the_code() -> None:
    """Summary, code, and how to plant it."""
    text = invoke("faults", "show", NAME).stdout
    assert f"def {NAME}()" in text
    assert f"--engine numpy+fault:{NAME}" in text


def test_run_kills_a_planted_fault_through_real_cells() -> None:
    """Exit 0 and one sentence: who killed it, and that the blame is right."""
    done = child("faults", "run", NAME, "-j", "2")
    assert done.returncode == 0, done.stderr
    assert f"{NAME} is killed by" in done.stdout
    assert "q_rope is blamed, rightly" in done.stdout


def test_run_and_matrix_exit_1_when_a_fault_survives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fault that no check fails on is named, and the exit code says it; the written matrix too."""
    engine = f"numpy+fault:{NAME}"
    monkeypatch.setattr(matrix, "run", lambda *a: (seen("ops.rope"), seen("ops.rope", engine)))
    result = invoke("faults", "run", NAME)
    assert result.exit_code == 1
    assert f"{NAME} survives" in result.stdout
    target, page = tmp_path / "kills.json", tmp_path / "FAULTS.md"
    asked = ("faults", "matrix", "--only", NAME, "-o", str(target), "--docs", str(page))
    result = invoke(*asked)
    assert result.exit_code == 1
    assert "0 killed" in result.stdout
    assert data.load(target).faults[NAME].killed_by == ()
    assert "**survives**" in page.read_text()


def alone(monkeypatch: pytest.MonkeyPatch, recorded: Kills = EMPTY) -> None:
    """No check but ops.rope claims the fault, and this is on record."""
    monkeypatch.setattr(matrix, "claims", lambda: {"ops.rope": (NAME,)})
    monkeypatch.setattr(data, "load", lambda path: recorded)


def test_matrix_exits_1_when_a_claim_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another check kills the fault; the one that claims it does not, and is named."""
    engine = f"numpy+fault:{NAME}"
    records = [seen(c, e) for c in ("ops.rope", "ops.add") for e in ("numpy", engine)]
    records[-1] = seen("stages.early", engine, Status.FAILED, WRONG.replace("act", "q_rope"))
    records.append(seen("stages.early"))
    monkeypatch.setattr(matrix, "run", lambda *a: tuple(records))
    alone(monkeypatch)
    result = invoke("faults", "matrix", "--only", NAME)
    assert result.exit_code == 1
    assert "1 killed, 1 blamed rightly" in result.stdout
    assert f"ops.rope claims {NAME} and does not kill it" in result.stdout


@pytest.mark.parametrize("what", ["kill", "amount"])
def test_matrix_exits_1_when_less_is_seen_than_is_on_record(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A lost kill, or a tenth of an amount: named, still owed in what is written, and settled by a line."""
    engine, cell = f"numpy+fault:{NAME}", f"{MODEL}/numpy/ops/cpu"
    monkeypatch.setattr(matrix, "run", lambda *a: (seen("ops.rope"), seen("ops.rope", engine, Status.FAILED)))
    lost = data.FaultTrial("", "rope", "", ("q_rope",), MODEL, ("q_rope",), ("ops.rope", "stages.late"))
    recorded, line = Kills({NAME: lost}), Forgotten((Kill(NAME, "stages.late", "so"),))
    if what == "amount":
        recorded = Kills(observed={cell: {"ops.rope": 10}})
        line = Forgotten(observed=(Amount(cell, "ops.rope", 1, "so"),))
    alone(monkeypatch, recorded)
    target = tmp_path / "kills.json"
    asked = ("faults", "matrix", "--only", NAME, "-o", str(target))
    result = invoke(*asked)
    assert result.exit_code == 1
    assert "forgotten.toml gives no reason" in result.stdout
    written = msgspec.json.decode(target.read_bytes(), type=Kills)
    owed = written.owed.get(NAME) or written.observed[cell]["ops.rope"]
    assert owed == (10 if what == "amount" else ("stages.late",))
    monkeypatch.setattr(oblivion, "load", lambda: line)
    assert invoke(*asked).exit_code == 0


def test_matrix_exits_1_when_a_clean_engine_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed fault does not make up for a check that is red without it."""
    engine = f"numpy+fault:{NAME}"
    records = [seen("ops.rope"), seen("ops.rope", engine, Status.FAILED)]
    monkeypatch.setattr(matrix, "run", lambda *a: tuple(records))
    alone(monkeypatch)
    assert invoke("faults", "matrix", "--only", NAME).exit_code == 0
    records.append(seen("ops.add", status=Status.FAILED, sentence="wrong"))
    result = invoke("faults", "matrix", "--only", NAME)
    assert result.exit_code == 1
    assert "ops.add alarms on the clean engine" in result.stdout


@pytest.mark.parametrize("args", [("run", "no_such"), ("show", "no_such"), ("matrix", "--only", "no_such")])
def test_an_unknown_fault_is_a_usage_error(args: tuple[str, ...]) -> None:
    """One sentence, exit 4."""
    result = invoke("faults", *args)
    assert result.exit_code == 4
    assert "no_such" in result.stderr


def test_a_name_and_an_area_select() -> None:
    """--only takes both; nothing selects all."""
    assert commands._selected((NAME,)) == (NAME,)
    assert set(commands._selected(("rope",))) == {n for n, f in catalogue().items() if f.area == "rope"}
    assert commands._selected(()) == tuple(catalogue())


# --- weakening a check --------------------------------------------------------------------------------------

CHECK = "stages.early"
WEAKENED = {
    "returning early": (
        "suites/prill_suites/stages.py",
        "    compare_stages(observe, engine, oracle, golden, model_path, early, [range(len(early))])",
        "    observe.saw(1, oracle='the oracle')",
    ),
    "comparing a value with itself": (
        "suites/prill_suites/stages.py",
        "apart = [nmse(expected[part], got[part]) for _, part in parts]",
        "apart = [nmse(expected[part], expected[part]) for _, part in parts]",
    ),
    "widening a bound tenfold": (
        "suites/prill_suites/stages.py",
        "bounds(lane, golden.floor_of(lane.name)).nmse",
        "bounds(lane, golden.floor_of(lane.name)).nmse * 10",
    ),
    "widening a lane tenfold": (
        "harness/prill_harness/numbers/lanes.py",
        "EXACT_RATIO = 100.0",
        "EXACT_RATIO = 1000.0",
    ),
}


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of the suites and the harness, which cells then run instead of the originals."""
    for room, package in (("suites", packaged()), ("harness", Path(prill_harness.__file__).parent)):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, tmp_path / room / package.name, ignore=ignored)
    paths = [str(tmp_path / room) for room in ("suites", "harness")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return tmp_path


@pytest.fixture(scope="module")
def seen_kills(tmp_path_factory: pytest.TempPathFactory) -> Kills:
    """What the check, as it is, is seen to kill: one planted fault beside the clean engine."""
    subject = TrialSubject((catalogue()[NAME],))
    suite = CHECK.partition(".")[0]
    cells = [Cell(MODEL, engine, suite) for engine in (matrix.ENGINE, subject.engine)]
    records = matrix.run(cells, tmp_path_factory.mktemp("kills"), 2)
    (result,) = matrix.judge([subject], records)
    assert CHECK in result.killed_by
    # The one that was planted stands for all that the check claims.
    return Kills(dict.fromkeys(matrix.claims()[CHECK], result.trial()), matrix.contents(records))


def decided(out: Path, seen: Kills) -> Verdict:
    """The check in a cell of its own, and a gate that requires it and nothing else."""
    entry = PlanEntry((MODEL,), ("numpy",), (CHECK.partition(".")[0],))
    wanted = Gate("demo", ("demo",), ("demo",), frozenset(), (entry,), Severity.LOW, 1, 0, 0)
    policy = Policy(Path("gates.toml"), "0" * 64, "demo", {"demo": wanted})
    item = Item("demo.stages", "Stages", "so", Severity.CRITICAL, (CHECK,))
    lists = (Checklist("demo", "Demo", (item,), Path("demo.toml"), (1,)),)
    work = Plan("demo", plan.cells_of(wanted), checks=(CHECK,))
    records = executor.run(work, out, jobs=2)
    today = dt.date(2026, 1, 1)
    return gate.decide(policy, work, records, checklists=lists, kills=seen, as_of=today)


def test_the_check_as_it_is_passes_the_gate(seen_kills: Kills, copies: Path) -> None:
    """The control: run from the copies, unchanged, the check passes and its kill is current."""
    found = decided(copies / "out", seen_kills)
    assert found.status is Status.PASSED, found.sentence


@pytest.mark.parametrize("how", WEAKENED)
def test_a_weakened_check_makes_the_gate_inconclusive(how: str, seen_kills: Kills, copies: Path) -> None:
    """The weakened check passes on the engine, but not through the gate, which names it and the remedy."""
    file, before, after = WEAKENED[how]
    text = (copies / file).read_text("utf-8")
    assert text.count(before) == 1
    (copies / file).write_text(text.replace(before, after), "utf-8")
    found = decided(copies / "out", seen_kills)
    assert [(c.check, c.status) for c in found.checks] == [(CHECK, Status.PASSED)]
    assert (found.status, found.exit_code) == (Status.INCONCLUSIVE, 10)
    assert f"{CHECK} was not seen to kill" in found.sentence
    assert "with its present code" in found.sentence
    assert "prill faults matrix --only" in found.sentence


def test_a_matrix_that_is_not_there_stops_the_gate_before_it_runs(tmp_path: Path) -> None:
    """--kills names a file that has to exist: one sentence, exit 4, and nothing written."""
    result = invoke("gate", "--kills", str(tmp_path / "absent.json"), "--out", str(tmp_path / "out"))
    assert result.exit_code == 4
    assert "no such kill matrix" in result.stderr
    assert not (tmp_path / "out").exists()
