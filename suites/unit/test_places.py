"""Where a report says that something stands: in the repository, and never on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from prill_harness.records.catalog import packaged, shown


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a policy in `engine/ci`; the current folder is `engine`."""
    root = tmp_path / "theirs"
    (root / "engine" / "ci").mkdir(parents=True)
    (root / ".git").mkdir()
    monkeypatch.chdir(root / "engine")
    return root


def test_a_file_is_named_from_the_root_of_its_repository(repository: Path) -> None:
    """A forge marks `engine/ci/gates.toml`; from the folder where prill was started it would find nothing."""
    assert shown(Path("ci/gates.toml")) == "engine/ci/gates.toml"
    assert shown(repository / "README.md") == "README.md"


def test_a_worktree_has_a_file_for_its_git_folder(repository: Path) -> None:
    """`git worktree` writes a file of that name."""
    (repository / ".git").rmdir()
    (repository / ".git").write_text("gitdir: elsewhere\n")
    assert shown(Path("ci/gates.toml")) == "engine/ci/gates.toml"


def test_outside_of_any_it_is_named_from_the_current_folder(repository: Path) -> None:
    """Without a repository the current folder is all that is known."""
    (repository / ".git").rmdir()
    assert shown(Path("ci/gates.toml")) == "ci/gates.toml"


def test_what_lies_elsewhere_has_no_absolute_path(repository: Path, tmp_path: Path) -> None:
    """Prill's own files are named from their package, others by the folder that holds them."""
    assert shown(packaged() / "gates.toml") == "prill_suites/gates.toml"
    assert shown(tmp_path / "far" / "gates.toml") == "far/gates.toml"
