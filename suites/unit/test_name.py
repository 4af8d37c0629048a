"""The product has one name, and says which version and commit it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from prill_harness import version

from .commandline import child

ROOT = Path(__file__).resolve().parents[2]
FORMER = "cup" + "el"  # what the product was called until 29 November 2026
OF_THE_PAST = re.compile(r"docs/hardware/2026-11-2[48][.-]")


def git(*words: str, cwd: Path = ROOT) -> str:
    """What a git command prints; -c keeps the user's own settings out."""
    done = subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=n@example.com", *words],
        cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.fixture
def checkout() -> Path:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    return ROOT


def test_the_former_name_stands_in_one_line_and_in_accounts_of_the_past(checkout: Path) -> None:
    """Contents and file names: the CHANGELOG says it once, two hardware accounts keep what they recorded."""
    counts = [line.rsplit(":", 1) for line in git("grep", "-aic", FORMER).splitlines()]
    found = {name: int(count) for name, count in counts}
    now = {name: count for name, count in found.items() if not OF_THE_PAST.match(name)}
    assert now == {"CHANGELOG.md": 1}
    assert len(found) > 1, "the accounts of the past hold the former name, so the search can see it"
    assert not [name for name in git("ls-files").splitlines() if FORMER in name.lower()]


def test_version_says_version_and_commit(checkout: Path) -> None:
    """From a checkout: the version of pyproject.toml and the commit that git names."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    said = child("--version")
    head = git("rev-parse", "--short=12", "HEAD").strip()
    assert said.returncode == 0
    assert re.fullmatch(rf"prill {re.escape(declared)}, commit {head}(\+changes)?\n", said.stdout)


def test_a_stamp_counts_for_more_than_a_checkout(tmp_path: Path) -> None:
    """What a build stamped is said; without stamp or checkout the commit is unknown, not somebody else's."""
    package = tmp_path / "site" / "prill_harness"
    package.mkdir(parents=True)
    git("init", "-q", cwd=tmp_path)
    git("commit", "-q", "--allow-empty", "-m", "another project", cwd=tmp_path)
    assert version.commit(package) == version.UNKNOWN
    (package / version.STAMP).write_text("0123456789ab\n")
    assert version.commit(package) == "0123456789ab"


def test_a_changed_checkout_says_so(tmp_path: Path) -> None:
    """The commit of a checkout whose tracked files were changed is not said as if it were its own."""
    package = tmp_path / "harness" / "prill_harness"
    package.mkdir(parents=True)
    (package / "a.py").write_text("")
    git("init", "-q", cwd=tmp_path)
    git("add", ".", cwd=tmp_path)
    git("commit", "-q", "-m", "first", cwd=tmp_path)
    head = git("rev-parse", "--short=12", "HEAD", cwd=tmp_path).strip()
    assert version.commit(package) == head
    (package / "a.py").write_text("1")
    assert version.commit(package) == f"{head}+changes"


def test_the_distribution_says_who_and_where() -> None:
    """URLs, authors, keywords, classifiers, licence; the script and the entry points carry the name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "prill"
    assert project["license"] == "Apache-2.0"
    assert project["authors"] == [{"name": "the prill developers"}]
    assert {"Homepage", "Issues", "Documentation", "Changelog"} <= set(project["urls"])
    assert len(project["keywords"]) > 3
    assert "Framework :: Pytest" in project["classifiers"]
    assert list(project["scripts"]) == ["prill"]
    groups = ["pytest11", *(group for group in project["entry-points"] if group != "pytest11")]
    assert list(project["entry-points"]["pytest11"]) == ["prill"]
    assert all(group.startswith("prill.") for group in groups[1:])
