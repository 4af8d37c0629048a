"""The pytest plugin: every way a check can end, in one process and over xdist, becomes the right evidence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prill_harness.records.evidence import CellEnded, CellStarted, CheckStarted, Evidence, Record, Status
from prill_harness.records.ledger import read

SUITE = """
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from types import SimpleNamespace
from prill_harness.run.checks import check
from prill_harness.engines.base import Capability
from prill_runtime.errors import EngineError, Inconclusive, InvalidParameter, ModelFileError

KILLS = dict(kills=("rope_pairing",))

@pytest.fixture(scope="session")
def engine():
    return SimpleNamespace(info=SimpleNamespace(name="fake", capabilities=frozenset({Capability.LOGITS})))

@pytest.fixture
def broken_model():
    raise ModelFileError("bad magic", where="x.gguf")

@pytest.fixture
def broken_fixture():
    assert False, "the fixture is wrong"

@pytest.fixture
def broken_end():
    yield
    raise OSError("disk full")

@check("demo.good", **KILLS)
def test_good(observe):
    observe.saw(np.int64(3), oracle="numpy64")
    observe.metric("nmse", np.float32(0.5), at_most=np.float64(1))
    observe.note(array=np.arange(2), scalar=np.float32(1.5), text="lone \\ud800", nan=np.float64("nan"))
    observe.seed = np.int64(7)
    observe.digests["ids"] = "ab"
    observe.say("all 3 values agree")

@check("demo.parameter", **KILLS)
@pytest.mark.parametrize("row", [1, 2])
def test_parameter(observe, row):
    observe.saw(row, oracle="numpy64")

@check("demo.silent", **KILLS)
def test_silent():
    pass

@check("demo.no_oracle", **KILLS)
def test_no_oracle(observe):
    observe.observed = 5

@check("demo.bound", **KILLS)
def test_bound(observe):
    observe.saw(1, oracle="numpy64")
    observe.metric("kl", np.float32(2), at_most=1, otherwise="KL 2 is above 1 at blk.0 \\ud800")

@check("demo.assertion", **KILLS)
def test_assertion():
    got = "\\udfff"
    assert got == "a", f"got {got}"

@check("demo.property", **KILLS)
@settings(max_examples=5, database=None)
@given(n=st.integers())
def test_property(n, observe):
    assert n is None, "a property that is false"

@check("demo.candidate", **KILLS)
def test_candidate():
    raise EngineError("out of memory")

@check("demo.model", **KILLS)
def test_model(broken_model):
    pass

@check("demo.fixture", **KILLS)
def test_fixture(broken_fixture):
    pass

@check("demo.teardown", **KILLS)
def test_teardown(observe, broken_end):
    observe.saw(1, oracle="numpy64")

@check("demo.unknown", **KILLS)
def test_unknown():
    {}["key"]

@check("demo.unrecordable", **KILLS)
def test_unrecordable(observe):
    observe.saw(1, oracle="numpy64")
    observe.metrics.append("not a metric")

@check("demo.usage", **KILLS)
def test_usage():
    raise InvalidParameter("wrong", where="temperature")

@check("demo.inconclusive", **KILLS)
def test_inconclusive():
    raise Inconclusive("too noisy")

@check("demo.skipped", **KILLS)
def test_skipped():
    pytest.skip("no GPU")

@pytest.mark.xfail
@check("demo.xfail", **KILLS)
def test_xfail(observe):
    raise ValueError

@pytest.mark.xfail(strict=True)
@check("demo.xpass", **KILLS)
def test_xpass(observe):
    observe.saw(1, oracle="numpy64")

@check("demo.needs", needs=(Capability.LOGITS, Capability.TRACE), **KILLS)
def test_needs(observe):
    observe.saw(1, oracle="numpy64")

@check("demo.offered", needs=(Capability.LOGITS,), **KILLS)
def test_offered(engine, observe):
    observe.saw(1, oracle="numpy64")
"""
EXPECTED = {
    "demo.good": ("passed", "all 3 values agree"),
    "demo.parameter[1]": ("passed", "1 values compared with numpy64"),
    "demo.parameter[2]": ("passed", "2 values compared with numpy64"),
    "demo.silent": ("inconclusive", "the check ended without having observed anything"),
    "demo.no_oracle": ("inconclusive", "the check ended without having observed anything"),
    "demo.bound": ("failed", "KL 2 is above 1 at blk.0 \\ud800"),
    "demo.assertion": ("failed", "got \\udfff"),
    "demo.property": ("failed", "a property that is false"),
    "demo.candidate": ("failed", "engine failed: out of memory"),
    "demo.model": ("failed", "invalid model file in x.gguf: bad magic"),
    "demo.fixture": ("error", "setup broke with AssertionError: the fixture is wrong"),
    "demo.teardown": ("error", "teardown broke with OSError: disk full"),
    "demo.unknown": ("error", "call broke with KeyError: 'key'"),
    "demo.unrecordable": ("error", "the evidence cannot be recorded: "),
    "demo.usage": ("error", "call broke with InvalidParameter: invalid parameter in temperature: wrong"),
    "demo.inconclusive": ("inconclusive", "inconclusive: too noisy"),
    "demo.skipped": ("inconclusive", "skipped: no GPU; a skip is no evidence"),
    "demo.xfail": ("inconclusive", "marked as an expected failure; an xfail is no evidence"),
    "demo.xpass": ("inconclusive", "marked as an expected failure; an xfail is no evidence"),
    "demo.needs": ("inconclusive", "missing capability: engine fake does not offer trace"),
    "demo.offered": ("passed", "1 values compared with numpy64"),
}
ONE = """
import os, signal, pytest
from prill_harness.run.checks import check
@check("one.first", kills=("rope_pairing",))
def test_first(observe):
    observe.saw(1, oracle="numpy64")
@check("one.second", kills=("rope_pairing",))
def test_second(observe):
    {body}
@check("one.third", kills=("rope_pairing",))
def test_third(observe):
    observe.saw(1, oracle="numpy64")
"""
SEEN = 'observe.saw(1, oracle="numpy64")'


def run(folder: Path, source: str, *options: str, model: bool = True) -> tuple[int, tuple[Record, ...], str]:
    """Run `source` as a suite in a child pytest: exit code, ledger, what it printed."""
    suite = folder / "demo.py"
    suite.write_text(source)
    ledger = folder / "ledger.jsonl"
    ledger.unlink(missing_ok=True)
    asked = ["--prill-model", "none.gguf", "--prill-ledger", str(ledger)] if model else []
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"
    }
    command = [sys.executable, "-m", "pytest", "-p", "prill_harness.plugin", "-p", "xdist.plugin"]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder), str(suite)]
    done = subprocess.run(
        [*command, *asked, *options], cwd=folder, env=env, capture_output=True, text=True, errors="replace"
    )
    return done.returncode, read(ledger) if ledger.exists() else (), done.stdout + done.stderr


def evidence(records: tuple[Record, ...]) -> dict[str, Evidence]:
    return {r.check: r for r in records if isinstance(r, Evidence)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, tuple[Record, ...], str]:
    return run(tmp_path_factory.mktemp("alone"), SUITE)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, tuple[Record, ...], str]:
    return run(tmp_path_factory.mktemp("spread"), SUITE, "-n", "2")


@pytest.mark.parametrize("check", EXPECTED)
def test_every_ending_has_its_status_and_sentence(
    alone: tuple[int, tuple[Record, ...], str], check: str
) -> None:
    """Each way a check can end becomes the status and the sentence that the contract names."""
    status, sentence = EXPECTED[check]
    found = evidence(alone[1])[check]
    assert (found.status, found.sentence[: len(sentence)]) == (status, sentence)


def test_nothing_is_lost_and_the_run_fails(alone: tuple[int, tuple[Record, ...], str]) -> None:
    """Planned, started and evidenced checks are the same set, framed by the cell's records; exit code 1."""
    code, records, _ = alone
    started, ended = records[0], records[-1]
    assert isinstance(started, CellStarted)
    assert isinstance(ended, CellEnded)
    assert set(started.planned) == set(EXPECTED) == set(evidence(records))
    assert {r.check for r in records if isinstance(r, CheckStarted)} == set(EXPECTED)
    assert (code, ended.exit_code, started.host) == (1, 1, os.uname().nodename)
    assert {"prill", "numpy", "model_sha256", "code_sha256"} <= set(started.versions)


def test_evidence_is_written_before_the_next_check_starts(alone: tuple[int, tuple[Record, ...], str]) -> None:
    """Every start record is followed at once by that check's evidence."""
    body = alone[1][1:-1]
    for start, found in zip(body[::2], body[1::2], strict=True):
        assert isinstance(start, CheckStarted)
        assert isinstance(found, Evidence)
        assert start.check == found.check


def test_evidence_holds_builtins_and_the_command_that_reproduces_it(
    alone: tuple[int, tuple[Record, ...], str],
) -> None:
    """NumPy scalars, arrays and lone surrogates reach the ledger as JSON; `reproduce` is a shell command."""
    good = evidence(alone[1])["demo.good"]
    assert (good.observed, good.seed, good.digests) == (3, 7, {"ids": "ab"})
    assert good.detail == {"array": [0, 1], "scalar": 1.5, "text": "lone \\ud800", "nan": "nan"}
    assert [(m.name, m.value, m.bound) for m in good.metrics] == [("nmse", 0.5, 1.0)]
    assert good.reproduce == "prill run --engine numpy --model none.gguf demo.good"
    assert len(good.content) == 64


def test_two_workers_give_the_same_evidence_as_none(
    alone: tuple[int, tuple[Record, ...], str], spread: tuple[int, tuple[Record, ...], str]
) -> None:
    """-n 2 and -n 0 leave equal evidence (times apart) and equal exit codes; surrogates do not lose one."""

    def timeless(records: tuple[Record, ...]) -> dict[str, dict[str, object]]:
        found = {k: json.loads(json.dumps(_plain(v))) for k, v in evidence(records).items()}
        return {k: {f: v for f, v in e.items() if f not in ("at", "duration_s")} for k, e in found.items()}

    assert "INTERNALERROR" not in spread[2]
    assert timeless(spread[1]) == timeless(alone[1])
    assert spread[0] == alone[0] == 1
    assert isinstance(spread[1][0], CellStarted)
    assert isinstance(spread[1][-1], CellEnded)


def _plain(found: Evidence) -> dict[str, object]:
    import msgspec

    plain: dict[str, object] = msgspec.to_builtins(found)
    return plain


@pytest.mark.parametrize("death", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_killed_worker_leaves_an_error_and_a_failing_run(tmp_path: Path, death: str) -> None:
    """A worker that dies in a check is an error with the check's id, and the run cannot exit 0."""
    code, records, printed = run(tmp_path, ONE.format(body=death), "-n", "2")
    found = evidence(records)
    assert set(found) == {"one.first", "one.second", "one.third"}, printed
    assert found["one.second"].status is Status.ERROR
    assert "died in the check" in found["one.second"].sentence
    assert found["one.first"].status is found["one.third"].status is Status.PASSED
    assert code == 3


def test_a_check_that_never_ran_is_an_error(tmp_path: Path) -> None:
    """-x ends the run early; the check that was planned and left out becomes an error, not an absence."""
    body = "assert False, 'wrong'"
    code, records, _ = run(tmp_path, ONE.format(body=body), "-x")
    assert evidence(records)["one.third"].status is Status.ERROR
    assert "left no evidence" in evidence(records)["one.third"].sentence
    assert code == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [(SEEN, 0), ("assert False", 1), ("1 / 0", 3), ("pass", 10), ("pytest.skip('no')", 10)],
)
def test_the_exit_code_is_zero_only_when_every_check_passed(tmp_path: Path, body: str, expected: int) -> None:
    """0 only for passed evidence; failed 1, error 3, inconclusive or skipped 10."""
    code, records, printed = run(tmp_path, ONE.format(body=body))
    assert code == expected, printed
    assert isinstance(records[-1], CellEnded)
    assert records[-1].exit_code == expected


def test_selection_by_check_id(tmp_path: Path) -> None:
    """--prill-check runs one check alone; an id that matches nothing exits 5."""
    code, records, _ = run(tmp_path, ONE.format(body="1 / 0"), "--prill-check", "one.first")
    assert (code, set(evidence(records))) == (0, {"one.first"})
    assert run(tmp_path, ONE.format(body="pass"), "--prill-check", "one.fourth")[0] == 5


def test_a_suite_that_does_not_import_is_an_error_with_its_cause(tmp_path: Path) -> None:
    """A collection error leaves evidence of status error that quotes the cause; exit 3."""
    code, records, _ = run(tmp_path, "import nowhere_to_be_found", "--prill-suite", "demo")
    found = evidence(records)["demo.collection"]
    assert (code, found.status, found.reproduce[-5:]) == (3, Status.ERROR, " demo")
    assert "No module named 'nowhere_to_be_found'" in found.sentence


def test_an_unmarked_test_and_a_repeated_id_are_refused(tmp_path: Path) -> None:
    """A ledger run refuses what would leave no evidence of its own; exit 4."""
    code, records, printed = run(tmp_path, ONE.format(body=SEEN) + "\ndef test_plain(): pass\n")
    assert (code, records) == (4, ())
    assert "not marked with @check" in printed
    code, records, printed = run(tmp_path, ONE.format(body=SEEN).replace("one.third", "one.first"))
    assert (code, records) == (4, ())
    assert "used twice" in printed


def test_the_oracles_own_error_is_not_blamed_on_the_candidate() -> None:
    """An engine error that passed through the oracle's methods is an error, through another's a finding."""
    from prill_harness.run import outcomes
    from prill_runtime.errors import NotANumber

    class Fake:
        def logits(self) -> None:
            raise NotANumber("NaN in logits")

    oracle, candidate = Fake(), Fake()
    for engine, status in ((oracle, Status.ERROR), (candidate, Status.FAILED)):
        with pytest.raises(NotANumber) as caught:
            engine.logits()
        assert outcomes.raised(caught.value, phase="call", oracle=oracle)[0] is status


def test_the_plugin_is_inert_without_its_options(tmp_path: Path) -> None:
    """A run that does not ask for prill passes as ever, prints nothing of prill and loads no recorder."""
    source = (
        "import sys\n"
        "def test_plain():\n"
        "    assert not {'prill_harness.recording', 'prill_harness.run', 'msgspec'} & set(sys.modules)\n"
    )
    code, records, printed = run(tmp_path, source, model=False)
    assert (code, records) == (0, ()), printed
    assert "prill" not in printed.partition("collected")[2]


def test_checks_without_a_model_are_refused(tmp_path: Path) -> None:
    """prill's suites in a bare pytest run exit 4 and say which option is missing."""
    code, _, printed = run(tmp_path, ONE.format(body=SEEN), model=False)
    assert code == 4
    assert "--prill-model" in printed
