"""docs/SECURITY.md names a test for every line, and every one of them exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "SECURITY.md").read_text(encoding="utf-8")


def test_every_line_of_the_page_names_a_test_that_exists() -> None:
    """A promise without a test is none: each row of the table has files of tests that are there."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| what |")]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)`", row.rsplit("|", 2)[1])
        assert named, row
        for name in named:
            text = (ROOT / "suites" / "unit" / name).read_text(encoding="utf-8")
            assert re.search(r"^def test_", text, re.MULTILINE), name
