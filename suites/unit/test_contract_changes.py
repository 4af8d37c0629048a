"""The changed files that are put before an engine: each can be made, and is another file."""

from __future__ import annotations

from pathlib import Path

from prill_harness.engines.models import resolve_model
from prill_harness.faults.blackbox import changed
from prill_harness.faults.blackbox.changes import CHANGES

FAMILIES = ("llama-tiny", "gpt2-tiny", "llama-window", "gpt-oss-tiny", "gemma3-tiny", "llama-tiny:q8_0")


def test_every_change_is_of_some_packaged_file_and_changes_bytes(tmp_path: Path) -> None:
    """Each fault of the table can be planted in a packaged model, and the copy is another file."""
    assert len({change.name for change in CHANGES}) == len(CHANGES) >= 25
    left = {change.name: change for change in CHANGES}
    for name in FAMILIES:
        model = resolve_model(f"fixture:{name}")
        for change in list(left.values()):
            if (copy := changed.planted(change, model, tmp_path)) is not None:
                assert copy.read_bytes() != model.read_bytes(), change.name
                assert copy.stat().st_size == model.stat().st_size
                del left[change.name]
                copy.unlink()
    assert not left
