"""`prill waive`: each waiver must still see the failure that it was written for."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from prill_harness.decide.waivers import LOCAL, load_waivers
from prill_harness.records.evidence import Cell, CellEnded, CellStarted, Evidence, Record, Status
from prill_harness.records.ledger import lines

from .commandline import emitted, invoke

CHECK, ITEM = "tokens.teacher_forced", "llama.tokens.exact"
CELL = Cell("fixture:llama-tiny", "numpy", "tokens")
DAY = "2026-06-01"
FILE = """# Who answers for what.
[[waivers]]
id = "W-1"
item = "llama.tokens.exact"  # the one that matters
conditions = { engine = "numpy", device = "cpu" }
check = "tokens.teacher_forced"
signature = "regressed in lane"
owner = "ada"
issue = "17"
reason = "known"
created = 2026-01-01
expires = 2026-12-31
"""


def seen(status: Status, sentence: str) -> list[Record]:
    kept = Evidence(CHECK, "c", CELL, status, 1, sentence, "numpy64", ("rope_pairing",), "prill run")
    code = 0 if status is Status.PASSED else 1
    return [CellStarted(CELL, (CHECK,), 0.0), kept, CellEnded(CELL, code, 0.1, 1.0)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a waiver, and with a ledger in which it covers a failure."""
    monkeypatch.chdir(tmp_path)
    LOCAL.parent.mkdir()
    LOCAL.write_text(FILE)
    Path("out").mkdir()
    saw(Status.FAILED, "regressed in lane exact")
    return tmp_path


def saw(status: Status, sentence: str) -> None:
    Path("out/ledger.jsonl").write_bytes(lines(seen(status, sentence)))


def check(as_of: str = DAY) -> tuple[int, list[str]]:
    done = invoke("waive", "check", "--json", "--as-of", as_of)
    return done.exit_code, [w["state"] for w in emitted(done.stdout)["waivers"]]


def test_each_waiver_must_still_see_its_signature(place: Path) -> None:
    """Used while the failure is there; unused once it passes or fails otherwise; expired after its day;
    unseen where no cell has evidence of the check there, which is no reason to drop it."""
    assert check() == (0, ["used"])
    assert check("2027-01-01") == (1, ["expired"])
    saw(Status.FAILED, "another failure")
    assert check() == (1, ["unused"])
    saw(Status.PASSED, "seen")
    assert check() == (1, ["unused"])
    LOCAL.write_text(FILE.replace('device = "cpu"', 'device = "cpu", model = "fixture:gpt2-tiny"'))
    assert check() == (10, ["unseen"])
    assert "no cell of the ledger has evidence" in invoke("waive", "check", "--as-of", DAY).stdout


def test_an_item_on_the_never_list_is_refused(place: Path) -> None:
    """By the policy of the gate that is named."""
    item = 'item = "foundation.kernels.blocks"'
    LOCAL.write_text(FILE.replace(f'item = "{ITEM}"', item).replace(CHECK, "blocks.all_types"))
    done = invoke("waive", "check", "--as-of", DAY)
    assert (done.exit_code, "may never be waived" in done.stdout) == (1, True), done.stderr


def test_prune_takes_out_what_covers_nothing(place: Path) -> None:
    """Expired and unused ones go, others stay with every comment; the last one leaves an empty list."""
    second = FILE[FILE.index("[[") :].replace("W-1", "W-2").replace("in lane", "in logits")
    unseen = FILE[FILE.index("[[") :].replace("W-1", "W-3").replace('"numpy"', '"emu"')
    LOCAL.write_text(f"{FILE}\n{second}\n{unseen}")
    done = invoke("waive", "prune", "--as-of", DAY)
    assert (done.exit_code, done.stdout.count("removed W-")) == (0, 1), done.stderr
    assert [w.id for w in load_waivers()] == ["W-1", "W-3"]
    assert LOCAL.read_text().startswith(FILE.rstrip())
    assert "2 waivers removed" in invoke("waive", "prune", "--as-of", "2027-01-01").stdout
    assert load_waivers() == ()
    assert "# Who answers for what." in LOCAL.read_text()
    assert "0 waivers removed" in invoke("waive", "prune").stdout


ADD = ("waive", "add", "--item", ITEM, "--check", CHECK, "--engine", "numpy", "--owner", "ada", "--issue",
       "18", "--reason", "known", "--expires", "2999-01-01", "--signature")  # fmt: skip


def test_add_writes_what_covers_a_failure_that_was_seen(place: Path) -> None:
    """Under the next number, behind those that are there, with the comments of the file as they were."""
    done = invoke(*ADD, "lane exact")
    assert done.exit_code == 0, done.stderr
    assert "covers 1 failures" in done.stdout
    first, second = load_waivers()
    assert (first.id, second.id, second.issue, second.conditions.model) == ("W-1", "W-2", "18", "")
    assert second.created == dt.datetime.now(dt.UTC).date()
    assert "# the one that matters" in LOCAL.read_text()
    assert check("2998-01-01") == (1, ["expired", "used"])


@pytest.mark.parametrize("start", ["", "waivers = []\n", "# nothing\nwaivers = []\n"])
def test_add_begins_a_file(place: Path, start: str) -> None:
    """One that is not there, or that has an empty list."""
    LOCAL.unlink()
    if start:
        LOCAL.write_text(start)
    assert invoke(*ADD, "lane exact").exit_code == 0
    assert [w.id for w in load_waivers()] == ["W-1"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((*ADD, "another failure"), "waives nothing that was seen"),
        ((*ADD, "lane"), "signature is too short"),
        ((*ADD, "regressed in lane"), "duplicate waiver"),
        ((*ADD[:3], "llama.nosuch", *ADD[4:], "lane exact"), "unknown item"),
        ((*ADD[:7], "emu", *ADD[8:], "lane exact"), "waives nothing that was seen"),
        ((*ADD[:-2], "2020-01-01", ADD[-1], "lane exact"), "expires before it was created"),
        ((*ADD, "lane exact", "--ledger", "absent.jsonl"), "no such ledger"),
    ],
)
def test_add_refuses_what_a_gate_would_not_count(place: Path, words: tuple[str, ...], told: str) -> None:
    """One sentence, exit 4, and the file as it was."""
    done = invoke(*words)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (4, "", 1), done.stderr
    assert told in done.stderr
    assert LOCAL.read_text() == FILE
