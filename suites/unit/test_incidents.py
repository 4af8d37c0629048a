"""Incidents: two commits of a real repository tell whether a fix mends what was seen."""

from __future__ import annotations

import datetime as dt
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest

from prill_harness.commands.shared import past
from prill_harness.incidents import log, verify
from prill_harness.records.catalog import check_ids
from prill_harness.records.verdict import IncidentState
from prill_runtime.errors import IncidentError

from .commandline import emitted, invoke

ROOT = Path(__file__).parents[2]
SIGNATURE = "the text repeats"
COMMAND = "sh tests/cancel.sh"
TEST = f'if grep -q broken engine.txt; then echo "{SIGNATURE} after a cancel"; exit 1; fi; echo right\n'
NEW = (
    "incident", "new", "--severity", "critical", "--component", "cache", "--symptom", "text repeats",
    "--signature", SIGNATURE, "--command", COMMAND,
)  # fmt: skip


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(folder: Path, **files: str) -> str:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "change", "--allow-empty")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a broken engine, in which an incident is open; HEAD~1 has no test, HEAD mends it."""
    git(tmp_path, "init", "-q", "-b", "main")
    monkeypatch.chdir(tmp_path)
    assert invoke(*NEW, "--file", "tests/cancel.sh").exit_code == 0
    commit(tmp_path, engine_txt="broken\n")
    commit(tmp_path, engine_txt="mended\n", tests__cancel_sh=TEST)
    return tmp_path


def state(name: str = "0001") -> IncidentState:
    return log.find(log.load(), name).state


def edit(old: str, new: str) -> None:
    file = log.LOCAL / "0001.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


CLOSE = ("incident", "close", "0001", "--root-cause", "a stale slot", "--regression", "tests/cancel.sh")


def test_an_incident_is_closed_when_it_was_seen_before_and_not_after(project: Path) -> None:
    """From new to closed: what was seen at both commits is in the file, comments stay, git is as it was."""
    edit('root_cause = ""', '# ada looks at it\nroot_cause = ""')
    done = invoke("incident", "verify", "0001", "--fix", "HEAD")
    assert done.exit_code == 0, done.stderr
    assert "failed, exit code 1: the text repeats after a cancel" in done.stdout
    assert "passed, exit code 0: right" in done.stdout
    assert state() is IncidentState.FIXED
    done = invoke(*CLOSE)
    assert done.exit_code == 0, done.stderr
    assert state() is IncidentState.CLOSED
    text = (log.LOCAL / "0001.toml").read_text()
    assert "# ada looks at it" in text
    seen = tomllib.loads(text)["seen"]
    head, before = git(project, "rev-parse", "HEAD"), git(project, "rev-parse", "HEAD~1")
    assert [(seen[at]["commit"], seen[at]["outcome"]) for at in ("before", "after")] == [
        (before, "failed"),
        (head, "passed"),
    ]
    assert git(project, "worktree", "list").count("\n") == 0
    assert git(project, "status", "--porcelain", "--", "engine.txt", "tests") == ""
    assert invoke("incident", "list", "--open").stdout.splitlines()[-1] == "0 open, 0 fixed, 0 closed"
    assert "it is closed already" in invoke(*CLOSE).stderr


def test_what_was_not_seen_is_not_closed(project: Path) -> None:
    """Without a look, a root cause or the check that stays: refused, and the file as it was."""
    before = (log.LOCAL / "0001.toml").read_text()
    lacking = [(CLOSE, "the commit that mends it"), (CLOSE[:3], "a root cause")]
    for words, told in lacking:
        done = invoke(*words)
        assert (done.exit_code, done.stdout) == (4, "")
        assert f"cannot be closed: expected {told}" in done.stderr
    assert (log.LOCAL / "0001.toml").read_text() == before
    assert invoke("incident", "verify", "0001", "--fix", "HEAD").exit_code == 0
    assert "expected a regression check" in invoke(*CLOSE[:5]).stderr
    done = invoke(*CLOSE[:-1], "engine.txt")
    assert "a regression check that is what was seen to fail" in done.stderr
    assert state() is IncidentState.FIXED


@pytest.mark.parametrize(
    ("command", "code", "before", "after"),
    [
        ("true", 1, "passed", "passed"),
        (f"echo {SIGNATURE}; exit 1", 1, "failed", "failed"),
        ("no_such_command", 10, "inconclusive", "inconclusive"),
        ("exit 1", 10, "inconclusive", "inconclusive"),
        (f"echo {SIGNATURE}", 10, "inconclusive", "inconclusive"),
        (f"grep -q mended engine.txt && exit 2; echo {SIGNATURE}; exit 1", 10, "failed", "inconclusive"),
        (f"grep -q broken engine.txt || {{ echo {SIGNATURE}; exit 1; }}", 1, "passed", "failed"),
    ],
)
def test_only_the_symptom_before_and_none_after_is_a_fix(
    project: Path, command: str, code: int, before: str, after: str
) -> None:
    """A reproduction that never fails, always fails, cannot start, fails otherwise or prints the symptom and
    exits 0: recorded as what it was, and not closed."""
    edit(COMMAND, command)
    assert invoke("incident", "verify", "0001", "--fix", "HEAD").exit_code == code
    incident = log.find(log.load(), "0001")
    assert incident.seen is not None
    assert (incident.seen.before.outcome, incident.seen.after.outcome) == (before, after)
    assert incident.state is IncidentState.OPEN
    done = invoke(*CLOSE)
    assert done.exit_code == 4
    assert f"seen was {before} before, {after} after" in done.stderr


def test_what_was_seen_is_of_this_reproduction_and_this_fix(project: Path) -> None:
    """Another command, signature or commit afterwards: it has to be looked at again."""
    assert invoke("incident", "verify", "0001", "--fix", "HEAD").exit_code == 0
    kept = (log.LOCAL / "0001.toml").read_text()
    for old, new in ((COMMAND, f"{COMMAND} -x"), (SIGNATURE, "another text")):
        (log.LOCAL / "0001.toml").write_text(kept.replace(old, new, 1))
        assert state() is IncidentState.OPEN
        assert "a look at the reproduction as it is now" in invoke(*CLOSE).stderr
    (log.LOCAL / "0001.toml").write_text(
        kept.replace(f'fix = "{git(project, "rev-parse", "HEAD")}"', 'fix = "0"')
    )
    assert state() is IncidentState.OPEN


def test_a_fix_that_is_not_checked_out_closes_nothing(project: Path) -> None:
    """A mended branch does not mend this one."""
    git(project, "checkout", "-q", "-b", "other", "HEAD~1")
    assert invoke("incident", "verify", "0001", "--fix", "main").exit_code == 0
    (project / "tests").mkdir()
    (project / "tests/cancel.sh").write_text(TEST)
    assert "in the present commit" in invoke(*CLOSE).stderr


@pytest.mark.parametrize(
    ("fix", "told"),
    [("nosuch", "no such commit: got 'nosuch'"), ("HEAD~1", "no commit before it"), ("--all", "no such")],
)
def test_a_commit_that_cannot_be_looked_at_is_one_sentence(project: Path, fix: str, told: str) -> None:
    """Unknown, the first of all, or an option of git's."""
    done = invoke("incident", "verify", "0001", f"--fix={fix}")
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert told in done.stderr


def test_without_a_repository_or_a_commit_nothing_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert invoke(*NEW).exit_code == 0
    assert "no commit is known to mend it" in invoke("incident", "verify", "0001").stderr
    with pytest.raises(IncidentError, match="rev-parse"):
        verify.repository(Path("/proc/self"))


def test_a_reproduction_that_hangs_is_ended(project: Path) -> None:
    """It and what it started: the look is inconclusive, and says so."""
    own = log.Reproduction(SIGNATURE, command="sleep 60 & sleep 60")
    seen = verify.look(project, git(project, "rev-parse", "HEAD"), own, timeout_s=0.2)
    assert (seen.outcome, seen.exit_code, seen.said) == ("inconclusive", 124, "it was ended after 0.2 s")


def test_a_check_is_run_as_prill_runs_it(project: Path) -> None:
    """By its own command, with engine and model; what it prints is looked at: that no such check could be run
    is neither a failure nor a pass, though the signature is there."""
    own = log.Reproduction(
        "is the first wrong", check="tokens.greedy", engine="numpy", model="fixture:llama-tiny"
    )
    assert own.shell == "prill run --engine numpy --model fixture:llama-tiny tokens.greedy"
    broken = msgspec.structs.replace(own, check="file.nosuch", signature="no such suite or check")
    seen = verify.look(project, git(project, "rev-parse", "HEAD"), broken)
    assert (seen.outcome, seen.exit_code) == ("inconclusive", 5)
    assert "no such suite or check" in seen.said


# --- the log ----------------------------------------------------------------------------------------------

SOUND = """
id = "0001"
severity = "high"
component = "cache"
symptom = "text repeats"
opened = 2026-01-31
[reproduction]
command = "sh t.sh"
signature = "the text repeats"
"""
CLOSED = """
root_cause = "a stale slot"
fix = "abc"
regression = "t.sh"
closed = 2026-02-01
[reproduction]"""
DIGEST = log.Reproduction("the text repeats", command="sh t.sh").digest("abc")
SEEN = f"""
[seen]
at = 2026-02-01
reproduction = "{DIGEST}"
before = {{ commit = "b", outcome = "failed", exit_code = 1 }}
after = {{ commit = "abc", outcome = "passed", exit_code = 0 }}
"""


def written(folder: Path, text: str, name: str = "0001") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('severity = "high"', 'severity = "fatal"', "Invalid enum value 'fatal'"),
        ('component = "cache"', 'component = " "', "component is empty"),
        ('symptom = "text repeats"', "", "missing required field `symptom`"),
        ('id = "0001"', 'id = "0002"', "id and file name differ: expected '0001', got '0002'"),
        ('command = "sh t.sh"', "", "a check or a command"),
        ('command = "sh t.sh"', 'command = "sh t.sh"\ncheck = "tokens.greedy"', "a check or a command"),
        ('"the text repeats"', '"text"', "signature is too short"),
        ("[reproduction]", "closed = 2026-02-01\n[reproduction]", "closed without a root cause"),
        ("[reproduction]", CLOSED, "closed without a reproduction that was seen to fail"),
        ("[reproduction]", "closed = 2025-02-01\n[reproduction]", "closed before it was opened"),
        ("opened = 2026-01-31", "opened = 2026-01-31\nprio = 1", "unknown field `prio`"),
    ],
)
def test_a_malformed_incident_is_one_sentence(tmp_path: Path, old: str, new: str, told: str) -> None:
    """A file that says less than it must, or that somebody closed by hand, stops the gate: exit 4."""
    assert old in SOUND
    with pytest.raises(IncidentError, match=told) as caught:
        log.load(written(tmp_path, SOUND.replace(old, new, 1)))
    assert "0001.toml" in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_closed_incident_asks_for_its_regression_check_for_ever(tmp_path: Path) -> None:
    """With its test file it is part of the verdict; without, the gate is told."""
    folder = written(tmp_path / "ci/incidents", SOUND.replace("[reproduction]", CLOSED) + SEEN)
    (tmp_path / "t.sh").write_text("exit 0")
    (result,) = past.incidents(folder, ())
    assert (result.state, result.regression, result.closed) == ("closed", "t.sh", "2026-02-01")
    (tmp_path / "t.sh").unlink()
    with pytest.raises(IncidentError, match="its regression check is gone"):
        past.incidents(folder, ())
    named = SOUND.replace("[reproduction]", CLOSED).replace('"t.sh"', '"t.sh::cancelled"')
    whole = SEEN.replace(
        DIGEST, log.Reproduction("the text repeats", command="sh t.sh::cancelled").digest("abc")
    )
    folder = written(tmp_path / "ci/incidents", named.replace("sh t.sh", "sh t.sh::cancelled") + whole)
    (tmp_path / "t.sh").write_text("cancelled() { exit 0; }")
    assert len(past.incidents(folder, ())) == 1
    (tmp_path / "t.sh").write_text("another() { exit 0; }")
    with pytest.raises(IncidentError, match=r"its regression check is gone: expected t\.sh::cancelled"):
        past.incidents(folder, ())
    check = SOUND.replace('command = "sh t.sh"', 'check = "tokens.gone"')
    with pytest.raises(IncidentError, match="names an unknown check"):
        past.incidents(written(tmp_path / "b/ci/incidents", check), ("tokens.greedy",))


def test_the_list_is_in_the_order_in_which_they_are_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open before closed, critical before high before medium before low, older before newer; and when."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.sh").write_text("")
    entries = (
        ("a", "low", "01-02"),
        ("b", "critical", "01-03"),
        ("c", "high", "01-04"),
        ("d", "critical", "01-01"),
    )
    for name, severity, day in entries:
        text = SOUND.replace("0001", name).replace("high", severity).replace("2026-01-31", f"2026-{day}")
        written(log.LOCAL, text, name)
    closed = SOUND.replace("0001", "e").replace("high", "critical").replace("[reproduction]", CLOSED) + SEEN
    written(log.LOCAL, closed, "e")
    found = emitted(invoke("incident", "list", "--json").stdout)["incidents"]
    assert [(i["id"], i["due"]) for i in found] == [
        ("d", "fix immediately"), ("b", "fix immediately"), ("c", "fix this sprint"),
        ("a", "document for later"), ("e", ""),
    ]  # fmt: skip
    shown = invoke("incident", "show", "d").stdout
    assert "lacks: a root cause" in shown
    assert (
        "no such incident: expected a or b or c or d or e, got 'f'" in invoke("incident", "show", "f").stderr
    )
    assert dt.date.fromisoformat(found[0]["opened"]) == dt.date(2026, 1, 1)


def test_the_log_of_this_repository_holds() -> None:
    """Every incident is sound, and what is closed has its regression check still."""
    assert any(i.state == "closed" for i in past.incidents(ROOT / log.LOCAL, check_ids()))


def test_no_log_is_no_incident_and_a_named_one_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default folder may be absent; one that somebody names may not."""
    monkeypatch.chdir(tmp_path)
    assert log.load() == ()
    assert invoke("incident", "list").exit_code == 0
    with pytest.raises(IncidentError, match="no such folder"):
        log.load(Path("absent"))
