"""The package's version, and the commit it was built from."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
STAMP = "commit.txt"  # written by ci/build_commit.py into builds from a checkout
UNKNOWN = "unknown"


@cache
def version() -> str:
    """The installed version of prill, read once."""
    return metadata.version("prill")


def commit(package: Path = HERE) -> str:
    """The commit that the code in `package` comes from: stamped by a build, or else from git.

    A checkout with changes has `+changes` appended; `unknown` if there is neither a stamp nor git.
    """
    try:
        return (package / STAMP).read_text(encoding="ascii").strip() or UNKNOWN
    except (OSError, UnicodeDecodeError):
        return _of_checkout(package.parents[1]) if package.parent.name == "harness" else UNKNOWN


def _of_checkout(root: Path) -> str:
    """The commit of the checkout `root`; `unknown` if `root` only lies inside another project's checkout."""
    if not (root / ".git").exists():
        return UNKNOWN
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if head and changed else "") or UNKNOWN


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
