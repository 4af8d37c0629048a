"""Waiver files: every field is mandatory, and a malformed or repeated one stops the gate."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from prill_harness.decide.waivers import load_waivers
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_runtime.errors import PolicyError

SOUND = """
[[waivers]]
id = "W-1"
item = "llama.exact"
conditions = { engine = "numpy", device = "cpu" }
check = "tokens.exact"
signature = "KL is above"
owner = "ada"
issue = "https://tracker/17"
reason = "known"
created = 2026-01-01
expires = 2026-03-31
"""
FIELDS = [line.partition(" =")[0] for line in SOUND.strip().splitlines()[1:]]


def write(folder: Path, text: str) -> Path:
    path = folder / "waivers.toml"
    path.write_text(text)
    return path


def test_a_sound_waiver_loads(tmp_path: Path) -> None:
    """All fields arrive with their types."""
    (waiver,) = load_waivers(write(tmp_path, SOUND))
    assert (waiver.id, waiver.expires, waiver.conditions.engine) == ("W-1", dt.date(2026, 3, 31), "numpy")


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_mandatory(tmp_path: Path, field: str) -> None:
    """Without any one of its fields a waiver is malformed: exit 4, naming the field."""
    text = "\n".join(line for line in SOUND.splitlines() if not line.startswith(f"{field} ="))
    with pytest.raises(PolicyError, match=f"missing required field `{field}`") as caught:
        load_waivers(write(tmp_path, text))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('owner = "ada"', 'owner = " "', "owner is empty"),
        ('signature = "KL is above"', 'signature = "a"', "signature is too short"),
        ("expires = 2026-03-31", "expires = 2025-03-31", "expires before it was created"),
        ("expires = 2026-03-31", 'expires = "soon"', "RFC3339|date"),
        ('device = "cpu"', 'device = ""', "engine and device"),
        (', device = "cpu"', "", "missing required field `device`"),
        ('reason = "known"', 'reason = "known"\nseverity = "low"', "unknown field `severity`"),
        ("[[waivers]]", "[[waiver]]", "unknown field `waiver`"),
    ],
)
def test_a_malformed_waiver_is_one_sentence(tmp_path: Path, old: str, new: str, told: str) -> None:
    """Empty, unknown, too broad or out of order: the sentence names the file and the place."""
    assert old in SOUND
    with pytest.raises(PolicyError, match=told) as caught:
        load_waivers(write(tmp_path, SOUND.replace(old, new, 1)))
    assert "waivers.toml" in str(caught.value)


@pytest.mark.parametrize("second", [SOUND.replace("known", "other"), SOUND.replace("W-1", "W-2")])
def test_a_duplicate_waiver_is_refused(tmp_path: Path, second: str) -> None:
    """The same id, or the same failure under another id, is exit 4."""
    with pytest.raises(PolicyError, match="duplicate waiver"):
        load_waivers(write(tmp_path, SOUND + second))


def test_no_file_is_no_waivers_and_a_named_one_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default file may be absent; a file the caller names may not; ci/waivers.toml is found."""
    monkeypatch.chdir(tmp_path)
    assert load_waivers() == ()
    with pytest.raises(PolicyError, match="cannot be read"):
        load_waivers(Path("absent.toml"))
    Path("ci").mkdir()
    write(tmp_path / "ci", SOUND)
    assert [w.id for w in load_waivers()] == ["W-1"]


@pytest.mark.parametrize("status", [Status.PASSED, Status.ERROR, Status.INCONCLUSIVE])
def test_only_a_failure_can_match(tmp_path: Path, status: Status) -> None:
    """Check, place and signature agree: a waiver still covers no status but failed."""
    (waiver,) = load_waivers(write(tmp_path, SOUND))

    def record(status: Status, check: str = "tokens.exact") -> Evidence:
        cell = Cell("m", "numpy", "tokens")
        return Evidence(check, "c", cell, status, 1, "KL is above 1", "oracle", ("fault",), "prill run")

    assert waiver.matches("llama.exact", record(Status.FAILED))
    assert waiver.matches("llama.exact", record(Status.FAILED, "tokens.exact[3]"))
    assert not waiver.matches("llama.exact", record(Status.FAILED, "tokens.exactly"))
    assert not waiver.matches("llama.exact", record(status))
