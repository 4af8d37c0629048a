"""Faults that any engine can have planted are seen through its connector, and a gate counts by that alone."""

from __future__ import annotations

import importlib
from pathlib import Path

import msgspec
import pytest

from prill_harness.engines.base import Capability
from prill_harness.faults.blackbox.answers import ANSWERS
from prill_harness.faults.blackbox.changes import CHANGES
from prill_harness.faults.blackbox.planted import BLACKBOX, own
from prill_harness.faults.catalogue import known
from prill_harness.faults.opening import check_engine, foreign, open_engine, open_oracle
from prill_harness.faults.trial import connector
from prill_harness.faults.trial.connector import ConnectorTrial, Found, Sight
from prill_harness.faults.trial.kills import FaultTrial
from prill_harness.plan.provenance import engine_digest
from prill_harness.records.catalog import check_ids
from prill_harness.records.evidence import Cell, CellStarted, Evidence, Record, Status
from prill_runtime.errors import UsageError

from .commandline import emitted, invoke

MODEL = "fixture:llama-tiny"
SPEC = "py:mine.py:Mine"
IDS = [1, 300, 301, 302, 303, 304, 305, 306]
MINE = """
from prill_harness.faults.opening import open_engine


class Mine:
    arithmetic, version = "float32", "1.5"

    def __init__(self, model):
        type(self).opened = str(model)
        self.engine = open_engine("numpy", model)
        self.tokenize, self.detokenize = self.engine.tokenize, self.engine.detokenize

    def generate(self, ids, max_tokens, ignore_eos=False, **sampling):
        sampling.pop("stop")
        made = self.engine.generate(ids, max_tokens=max_tokens, ignore_eos=ignore_eos, **sampling)
        return dict(ids=list(made.ids), logprobs=list(made.logprobs), finish_reason=made.finish_reason,
                    end_id=made.end_id)
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)


def opened_with() -> Path:
    import sys

    return Path(sys.modules["prill_engine_mine"].Mine.opened)


def seen(check: str, engine: str = SPEC, status: Status = Status.PASSED, **rest: object) -> Evidence:
    cell = Cell(MODEL, engine, check.partition(".")[0])
    run = f"prill run --engine '{engine}' --model ./m.gguf {check}"
    return Evidence(check, "c" * 64, cell, status, 1, "seen", "oracle", ("bug",), run, **rest)  # type: ignore[arg-type]


def sight(*killed_by: str, content: str = "c" * 64, engine: str = SPEC) -> Sight:
    trial = FaultTrial("s", "file", "is wrong", ("numbers",), MODEL, ("numbers",), killed_by)
    return Sight(engine, dict.fromkeys(killed_by, content), {"file_rope_base": trial})


# --- planting -----------------------------------------------------------------------------------------------


def test_each_fault_has_a_name_of_its_own_and_a_check_that_owes_it() -> None:
    """At least 25 files and 15 answers, none named like a fault of prill's own code; each answer's check is
    there."""
    assert len(BLACKBOX) == len(CHANGES) + len(ANSWERS)
    assert len(CHANGES) >= 25
    assert len(ANSWERS) >= 15
    assert not BLACKBOX.keys() & known()
    assert {answer.kills for answer in ANSWERS} <= check_ids().keys()
    assert own(["rope_pairing", "file_rope_base", "answer_seed"]) == ("rope_pairing",)


@pytest.mark.parametrize("engine", [SPEC, "numpy"])
def test_a_changed_file_is_opened_in_place_of_the_right_one(engine: str) -> None:
    """The engine computes by the changed file, is said to have the right one, and the copy goes with it."""
    with open_engine(engine, MODEL) as right, open_engine(f"{engine}+fault:file_rope_base", MODEL) as wrong:
        first, other = (each.generate(IDS, max_tokens=4) for each in (right, wrong))
        assert abs(first.logprobs[0] - other.logprobs[0]) > 1e-3
        assert (wrong.info.model, wrong.info.model_sha256) == (right.info.model, right.info.model_sha256)
        assert wrong.info.capabilities == right.info.capabilities
        copy = opened_with() if engine == SPEC else None
        assert copy is None or copy.exists()
    assert copy is None or not copy.parent.exists()


def test_faults_of_files_and_answers_come_together() -> None:
    """Several in one spec are all planted, with those of prill's own code where the engine is prill's."""
    spec = (
        "numpy+fault:temperature_zero_sampled+fault:file_rope_base+fault:answer_longer+fault:answer_first_id"
    )
    with open_engine("numpy", MODEL) as right, open_engine(spec, MODEL) as wrong:
        assert len(wrong.generate(IDS, max_tokens=3).ids) == 4
        assert wrong.tokenize("The") == right.tokenize("The")[1:]
        assert Capability.LOGITS in wrong.info.capabilities
        assert abs(wrong.logits(IDS) - right.logits(IDS)).max() > 1e-3
        assert wrong.generate(IDS, max_tokens=8).ids[:8] != right.generate(IDS, max_tokens=8).ids


def test_what_a_file_does_not_have_cannot_be_changed() -> None:
    """A fault of a key that the file lacks is refused in one sentence, as is one that nobody has."""
    with pytest.raises(UsageError, match=r"has nothing that this fault changes: .*file_positions"):
        open_engine("numpy+fault:file_positions", MODEL)
    with pytest.raises(UsageError, match="unknown planted fault"):
        check_engine(f"{SPEC}+fault:file_nothing")
    with pytest.raises(UsageError, match=r"a planted fault is one of prill's own code.*rope_pairing"):
        check_engine(f"{SPEC}+fault:rope_pairing")
    check_engine(f"{SPEC}+fault:file_rope_base+fault:answer_seed")


def test_an_engine_that_keeps_its_file_is_judged_by_the_changed_one() -> None:
    """The oracle of an address has the changed file, that of an engine which opens it the right one."""
    http = "http://127.0.0.1:9,arithmetic=float32"
    with (
        open_oracle(http, MODEL) as right,
        open_oracle(f"{http}+fault:file_rope_base", MODEL) as changed,
        open_oracle(f"{SPEC}+fault:file_rope_base", MODEL) as same,
    ):
        assert abs(right.logits(IDS) - changed.logits(IDS)).max() > 1e-3
        assert (right.logits(IDS) == same.logits(IDS)).all()


def test_an_engine_of_others_is_told_by_its_spec() -> None:
    """Every connector, and whatever an installed package offers; none of prill's own."""
    assert all(
        foreign(each) for each in (SPEC, "http://localhost:1", "serve:x {model} {port}", "exec:x", "other")
    )
    assert not any(foreign(each) for each in ("numpy", "emu", "cuda:fast", "numpy+fault:rope_pairing"))


# --- what a gate counts -------------------------------------------------------------------------------------


def test_a_check_counts_only_where_it_was_seen_to_kill() -> None:
    """A pass through a connector counts by the record, with the code that the check has now; else it is
    inconclusive, with the command that shows it. A failure stays one."""
    passed, failed = seen("contract.tokens"), seen("contract.seeds", status=Status.FAILED)
    assert connector.counted([passed, failed], {SPEC: sight("contract.tokens")}) == [passed, failed]
    for record in (Sight(SPEC), sight("contract.logprobs"), sight("contract.tokens", content="d" * 64)):
        first, second = connector.counted([passed, failed], {SPEC: record})
        assert isinstance(first, Evidence)
        assert first.status is Status.INCONCLUSIVE
        assert first.sentence == (
            "not seen to kill through this connector, so it counts for nothing; see it with "
            f"`prill faults matrix --engine {SPEC} --model ./m.gguf --suite contract`"
        )
        assert second == failed


def test_what_a_run_saw_itself_counts_for_its_engine_alone() -> None:
    """The checks that put faults before the engine note what was found, and count themselves."""
    sees = seen("contract.sees_answers", detail={"killed": {"contract.tokens": ["answer_token"]}})
    tokens, other = seen("contract.tokens"), seen("contract.tokens", "py:other.py:Other")
    counted = connector.counted([sees, tokens, other], {SPEC: Sight(SPEC), other.cell.engine: Sight("x")})
    assert [each.status.value for each in counted] == ["passed", "passed", "inconclusive"]  # type: ignore[union-attr]


def test_what_asks_no_engine_and_whose_engine_is_prills_counts_by_the_catalogue() -> None:
    """Nothing is asked of checks of the harness, nor of an engine in which faults of the code are planted."""
    records = [seen("harness.specimens"), seen("contract.tokens", "numpy")]
    assert connector.counted(records, {SPEC: Sight(SPEC)}) == records


def test_checks_of_libraries_and_processes_count_by_the_example() -> None:
    """Nothing can be planted in somebody's library: the catalogue's defects are those of an example that the
    same connector reaches. A server is reached by another; other suites are asked of the engine itself."""
    by_example = [
        seen("boundary.freed", "capi:./libmine.so"),
        seen("process.requests", "exec:./mine {model}"),
        seen("process.requests", "capi:./libmine.so"),
    ]
    others = [
        seen("process.requests", "serve:mine {model} {port}"),
        seen("boundary.freed", "exec:./mine {model}"),
        seen("contract.tokens", "capi:./libmine.so"),
    ]
    nothing = {each.cell.engine: Sight(each.cell.engine) for each in (*by_example, *others)}
    assert connector.counted(by_example, nothing) == by_example
    counted = connector.counted(others, nothing)
    assert {each.status for each in counted if isinstance(each, Evidence)} == {Status.INCONCLUSIVE}


def test_a_record_is_kept_by_spec_and_grows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is seen later is added; a kill by a check's former code goes; a damaged record proves nothing."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    assert connector.load(SPEC) == Sight(SPEC)
    connector.keep(SPEC, sight("contract.tokens", "contract.seeds"))
    later = msgspec.structs.replace(
        sight("contract.stops"), checks={"contract.stops": "c" * 64, "contract.seeds": "d" * 64}
    )
    later = msgspec.structs.replace(later, faults={"answer_stops": later.faults["file_rope_base"]})
    file = connector.keep(SPEC, later)
    found = connector.load(SPEC)
    assert [found.counts(seen(f"contract.{name}"), "") for name in ("tokens", "stops", "seeds")] == [
        True,
        True,
        False,
    ]
    assert connector.load("py:other.py:Other").faults == {}
    file.write_bytes(file.read_bytes().replace(b"contract.stops", b"contract.seeds"))
    assert connector.load(SPEC) == Sight(SPEC)


def built(version: str, files: str = "f" * 64) -> list[Record]:
    """A cell's records of an engine that is this."""
    evidence = seen("contract.tokens", digests={"engine_version": version})
    return [CellStarted(evidence.cell, (evidence.check,), 0.0, {"engine_sha256": files}), evidence]


def test_what_was_seen_in_another_build_counts_for_nothing() -> None:
    """Kills of an engine whose files or version are others are none of this one, nor those of a run in which
    it changed; what is not known of it is the same as ever."""
    (build,) = connector.builds(built("1.5")).values()
    assert build == f"engine_sha256 {'f' * 64}; engine_version 1.5"
    record = {SPEC: msgspec.structs.replace(sight("contract.tokens"), build=build)}

    def counts(records: list[Record]) -> list[bool]:
        counted = [each for each in connector.counted(records, record) if isinstance(each, Evidence)]
        others = [each for each in counted if each.status is not Status.PASSED]
        assert all(each.sentence.startswith("not seen to kill in this build of the") for each in others)
        return [each.status is Status.PASSED for each in counted]

    assert counts(built("1.5")) == [True]
    assert counts(built("1.6")) == counts(built("1.5", "e" * 64)) == counts(built("", "")) == [False]
    assert counts([*built("1.5"), *built("1.6")]) == [False, False]
    unknown = built("", "")
    assert connector.counted(unknown, {SPEC: sight("contract.tokens")}) == unknown


def test_a_new_build_begins_a_new_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was seen in another build is forgotten, though its checks have the same code."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    for build, check in (("one", "contract.tokens"), ("one", "contract.seeds"), ("two", "contract.stops")):
        before = msgspec.structs.replace(sight(check), build=build)
        connector.keep(SPEC, msgspec.structs.replace(before, faults={check: before.faults["file_rope_base"]}))
        if check == "contract.seeds":
            assert connector.load(SPEC).checks.keys() == {"contract.tokens", "contract.seeds"}
    found = connector.load(SPEC)
    assert (found.build, [*found.checks], [*found.faults]) == ("two", ["contract.stops"], ["contract.stops"])


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        (SPEC, "mine.py"),
        ("py:bag.mine:Mine,arithmetic=half", "bag/other.py"),
        ("exec:./engine --fast {model},adapter=text", "engine"),
        ("serve:sh serve.sh {model} {port}", "serve.sh"),
        ("capi:./libmine.so", "libmine.so"),
        ("llamacpp:build", "build/bin/libllama.so.0"),
    ],
)
def test_an_engine_is_told_from_its_next_build_by_the_files_that_its_spec_names(spec: str, file: str) -> None:
    """The digest follows the file, and nothing beside it; a planted fault does not make it another engine."""
    for each in (file, "bag/__init__.py", "bag/mine.py"):
        Path(each).parent.mkdir(parents=True, exist_ok=True)
        Path(each).touch()
    importlib.invalidate_caches()
    before = engine_digest(spec)
    Path("beside.py").write_text("x = 1")
    assert engine_digest(f"{spec}+fault:file_rope_base") == engine_digest(spec) == before != ""
    Path(file).write_text("# the next one\n")
    assert engine_digest(spec) not in ("", before)


@pytest.mark.parametrize("spec", ["", "numpy", "cuda:1", "http://localhost:8080", "exec:./nothing {model}"])
def test_of_an_engine_without_files_nothing_is_known(spec: str) -> None:
    """Prill's own, an address, and a command that is not here."""
    assert engine_digest(spec) == ""


def test_a_secret_of_a_spec_is_not_written() -> None:
    """A key or token on a server's command line is left out of the record and of its name."""
    spec = "serve:srv --api-key s3cret --port {port} -m {model} TOKEN=abc,timeout=9"
    assert connector.masked(spec) == "serve:srv --api-key *** --port {port} -m {model} TOKEN=***,timeout=9"
    assert connector.masked(SPEC) == SPEC


# --- the matrix ---------------------------------------------------------------------------------------------


def judged(fault: str, *seen_there: Evidence, sound: tuple[Evidence, ...] = ()) -> Found:
    trial = ConnectorTrial(BLACKBOX[fault], SPEC, MODEL, ("contract", "tokens"))
    there = [msgspec.structs.replace(e, cell=replace_engine(e, trial.cell.engine)) for e in seen_there]
    checks = {e.check for e in seen_there}
    (found,) = connector.judge([trial], [*there, *(sound or [seen(check) for check in sorted(checks)])])
    return found


def replace_engine(evidence: Evidence, engine: str) -> Cell:
    return msgspec.structs.replace(evidence.cell, engine=engine)


def test_a_changed_file_is_blamed_by_what_fails_first() -> None:
    """Wrong ids explain wrong tokens, and wrong numbers wrong requests, but not the other way round."""
    failed = [seen(f"contract.{name}", status=Status.FAILED) for name in ("seeds", "tokens", "tokenization")]
    for fault, count, part, right in (
        ("file_merges", 3, "tokenizer", True), ("file_rope_base", 3, "tokenizer", False),
        ("file_rope_base", 2, "numbers", True), ("file_rope_base", 1, "requests", False),
    ):  # fmt: skip
        found = judged(fault, *failed[:count])
        assert (found.blamed, found.right) == (part, right)
        assert ("rightly" in found.sentence) is right
    assert not judged("file_rope_base", seen("contract.tokens")).right


def test_a_spoiled_answer_is_owed_by_the_check_that_is_about_it() -> None:
    """Another check's failure is no kill of it; what the engine cannot be asked is said."""
    assert judged("answer_seed", seen("contract.seeds", status=Status.FAILED)).right
    assert not judged("answer_seed", seen("contract.tokens", status=Status.FAILED)).right
    lacking = judged("answer_seed", seen("contract.seeds", status=Status.INCONCLUSIVE))
    assert (lacking.right, lacking.sentence) == (
        False,
        "answer_seed: nothing can be said, contract.seeds: seen",
    )
    wrong = seen("contract.seeds", status=Status.FAILED)
    assert "contract.seeds fails without it" in judged("answer_seed", wrong, sound=(wrong,)).unsaid


def test_the_command_plants_them_and_a_gate_reads_its_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through a class of the user's: a changed file, a spoiled answer, one that cannot be put before it. The
    checks that were seen count then, and no others."""
    words = [f"--only={name}" for name in ("file_bos_flag", "answer_first_id", "answer_untold")]
    asked = ("faults", "matrix", "--engine", SPEC, "--model", MODEL, "--suite", "contract", *words)
    monkeypatch.setattr("prill_harness.commands.gates.through.check_ids", lambda *_: dict.fromkeys(CHECKED))
    result = invoke(*asked, "--json", "-j", "2", "-o", str(tmp_path / "seen.json"))
    said = {each["name"]: each for each in emitted(result.stdout)["faults"]}
    assert result.exit_code == 0, result.stderr
    assert said["file_bos_flag"]["right"]
    assert said["file_bos_flag"]["blamed"] == "tokenizer"
    assert said["answer_first_id"]["killed_by"] == ["contract.round_trip", "contract.tokenization"]
    assert "does not take on_token" in said["answer_untold"]["unsaid"]
    record = connector.load(SPEC)
    assert msgspec.json.decode((tmp_path / "seen.json").read_bytes(), type=Sight) == record
    contents = record.checks
    for check, counts in (("contract.tokenization", True), ("contract.streaming", False)):
        evidence = msgspec.structs.replace(seen(check), content=contents[check])
        assert record.counts(evidence, record.build) is counts
        assert not record.counts(evidence, "")
    assert record.build == f"engine_sha256 {engine_digest(SPEC)}; engine_version 1.5"
    Path("mine.py").write_text(MINE.replace("float32", "float64"))
    assert engine_digest(SPEC) not in record.build


CHECKED = ("contract.tokenization", "contract.round_trip", "contract.streaming")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--engine", SPEC, "--only", "rope_pairing"), "no such fault for any engine"),
        (("--engine", SPEC, "--suite", "contrct"), "did you mean 'contract'"),
        (("--model", MODEL), "--model and --suite go with --engine"),
        (("--engine", "mine"), "unknown engine"),
    ],
)
def test_a_matrix_that_cannot_be_is_refused_before_anything_runs(
    words: tuple[str, ...], sentence: str
) -> None:
    """One sentence and exit code 4 for a fault, a suite, a model or an engine that does not fit."""
    result = invoke("faults", "matrix", *words)
    assert (result.exit_code, result.stdout) == (4, "")
    assert sentence in result.stderr


def test_a_matrix_without_a_fault_says_so() -> None:
    """Where the model has nothing that the fault changes, nothing was selected: exit code 5."""
    result = invoke("faults", "matrix", "--engine", SPEC, "--model", MODEL, "--only", "file_positions")
    assert result.exit_code == 5
    assert "no fault can be put before this engine" in result.stderr
