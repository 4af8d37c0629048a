"""Run one `prill gate` as a process in a folder, and read what it said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRILL = [sys.executable, "-c", "from prill_harness.cli import main; main()"]
LONGEST_S = 900.0


@dataclass(frozen=True)
class FolderGate:
    """One gate.

    Attributes:
        exit_code: -1 if it did not end in time.
        verdict: None if it gave none.
        sentence: the verdict's, or why there is none.
    """

    exit_code: int
    verdict: dict[str, Any] | None
    sentence: str


def gate(folder: Path, *options: str, **environment: str) -> FolderGate:
    """Run a gate of one cell at a time in `folder`, which its evidence goes into.

    Args:
        environment: variables set for it.
    """
    words = [*PRILL, "gate", *options, "-j", "1", "--out", "out"]
    try:
        ran = subprocess.run(
            words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
            timeout=LONGEST_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return FolderGate(-1, None, f"{type(error).__name__}: {error}")
    try:
        verdict = json.loads((folder / "out" / "verdict.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        last = (ran.stderr.strip().splitlines() or [""])[-1]
        return FolderGate(ran.returncode, None, f"{type(error).__name__}: {error}; {last}")
    return FolderGate(ran.returncode, verdict, str(verdict["sentence"]))
