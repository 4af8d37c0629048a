"""A script comes in; what it prints in a process with the leak library preloaded goes out."""

from __future__ import annotations

import os
import subprocess
import sys

from prill_harness.leaks.ledgers import build


def preloaded(script: str, *arguments: str) -> str:
    """Run Python code; its standard error is the failure's message."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"LD_PRELOAD": str(build.interposer())},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
