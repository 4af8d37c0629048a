"""What a check claims to kill: a planted fault there is, or the run does not begin."""

from __future__ import annotations

from pathlib import Path

from .test_plugin import ONE, SEEN, evidence, run


def test_a_claim_of_no_planted_fault_is_an_error_at_collection(tmp_path: Path) -> None:
    """A name that nobody can plant: the run ends before its first check, and says which and where to look."""
    wrong = ONE.replace('kills=("rope_pairing",)', 'kills=("rope_pairing", "rope_paring")', 1)
    code, records, text = run(tmp_path, wrong.replace("{body}", SEEN))
    assert code == 4
    assert not evidence(records)
    assert "check one.first claims to kill 'rope_paring', which is no planted fault" in text
    assert "prill faults list" in text
