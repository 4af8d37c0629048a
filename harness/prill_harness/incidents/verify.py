"""Run an incident's reproduction at the commit before its fix and at the fix, in work trees of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from prill_harness.incidents.log import Reproduction, Sighting
from prill_harness.records.evidence import Status
from prill_harness.run.children import prill
from prill_harness.run.outcomes import one_line
from prill_runtime.errors import IncidentError

TIMEOUT_S = 900.0
OUTPUT = 1 << 20  # bytes of its end that are looked at
LONGEST = 300  # characters that are kept of a line


def repository(folder: Path) -> Path:
    """The root of the git repository that holds the log.

    Raises:
        IncidentError: there is no git, or no repository.
    """
    there = next(each for each in (folder, *folder.resolve().parents) if each.is_dir())
    return Path(_git(there, "rev-parse", "--show-toplevel"))


def commits(root: Path, fix: str) -> tuple[str, str]:
    """The commit before the fix, and the fix itself, as whole hashes.

    Raises:
        IncidentError: no such commit, or it has no parent.
    """
    name = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{fix}^{{commit}}", told=fix)
    parents = _git(root, "rev-list", "--parents", "-n", "1", name).split()[1:]
    if not parents:
        raise IncidentError("the fix has no commit before it", where=str(root), got=fix)
    return parents[0], name


def holds(root: Path, commit: str) -> bool:
    """Whether the commit is part of what is checked out."""
    return _git(root, "merge-base", commit, "HEAD") == commit


def look(
    root: Path, commit: str, reproduction: Reproduction, *, fix: str = "", timeout_s: float = TIMEOUT_S
) -> Sighting:
    """What the reproduction does at a commit.

    Args:
        fix: the commit whose `files` are laid over this one, where they came with it; empty for none.

    Raises:
        IncidentError: the commit cannot be checked out, or the fix has no such file.
    """
    with _worktree(root, commit) as tree:
        if fix and reproduction.files:
            _git(tree, "checkout", "--quiet", fix, "--", *reproduction.files)
        code, lines = _carry_out(_command(reproduction), tree, timeout_s)
    return _judged(commit, code, lines, reproduction.signature)


def _command(reproduction: Reproduction) -> Sequence[str]:
    if reproduction.command:
        return ["sh", "-c", reproduction.command]
    return prill(*reproduction.words)


def _judged(commit: str, code: int, lines: Sequence[str], signature: str) -> Sighting:
    """It failed only where the symptom shows: a command that cannot start fails as well, and says nothing."""
    shows = next((line for line in lines if signature in line), "")
    last = shows or (lines[-1] if lines else "it printed nothing")
    outcome = Status.INCONCLUSIVE
    if code == 1 and shows:
        outcome = Status.FAILED
    elif code == 0 and not shows:
        outcome = Status.PASSED
    return Sighting(commit, outcome, code, one_line(last)[:LONGEST])


def _carry_out(command: Sequence[str], tree: Path, timeout_s: float) -> tuple[int, list[str]]:
    """Exit code, and the lines of what was printed; what it started and left behind is ended."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command, cwd=tree, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env=_environment(), start_new_session=True,
        )  # fmt: skip
        late = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        out.seek(max(0, out.seek(0, os.SEEK_END) - OUTPUT))
        lines = out.read().decode("utf-8", "backslashreplace").splitlines()
    if late:
        return 124, [f"it was ended after {timeout_s:g} s"]
    return code, [line for line in lines if line.strip()]


@contextlib.contextmanager
def _worktree(root: Path, commit: str) -> Iterator[Path]:
    """The files of a commit in a temporary folder, which git forgets afterwards."""
    with tempfile.TemporaryDirectory(prefix="prill-incident-") as folder:
        tree = Path(folder, "tree")
        _git(root, "worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _environment() -> dict[str, str]:
    """The caller's, without what a hook of git sets: it names the caller's own repository."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def _git(folder: Path, *arguments: str, told: str = "") -> str:
    """What git prints, stripped.

    Raises:
        IncidentError: it failed, or there is none.
    """
    command = ["git", "-c", f"core.hooksPath={os.devnull}", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True,
            encoding="utf-8", errors="backslashreplace", check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise IncidentError("git is not there", where=str(folder), hint="install git") from None
    if done.returncode:
        if told:
            raise IncidentError("no such commit", where=str(folder), got=repr(told))
        said = one_line(done.stderr) or f"exit code {done.returncode}"
        raise IncidentError(f"`git {' '.join(arguments[:2])}` failed", where=str(folder), got=said)
    return done.stdout.strip()
