"""The pytest plugin among others: their fixtures stay theirs, and one may wrap prill's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_plugin import ONE, SEEN, run

THEIRS = """
def test_theirs(engine, golden):
    assert (engine, golden) == ("a database, a medal", "a medal")
"""


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("order", [("strange", "prill_harness.plugin"), ("prill_harness.plugin", "strange")])
def test_a_strangers_fixtures_are_not_hidden(tmp_path: Path, asked: bool, order: tuple[str, str]) -> None:
    """Another plugin has fixtures of the same names: its tests get its own, in a run that does not use prill
    and in one that does, whichever plugin comes first; and a check gets prill's, or its suite's."""
    (tmp_path / "strange.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef golden(): return 'a medal'\n"
        "@pytest.fixture\ndef engine(golden): return f'a database, {golden}'\n"
    )
    check = ONE.format(body=f"assert model_spec == 'none.gguf'; {SEEN}")
    check = check.replace("test_second(observe)", "test_second(observe, model_spec)")
    (tmp_path / "test_theirs.py").write_text(THEIRS)
    (tmp_path / "test_checks.py").write_text(check)
    words = [word for name in order for word in ("-p", name)]
    words += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    files = ["test_theirs.py", "test_checks.py"] if asked else ["test_theirs.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *files, *(["--prill-model", "none.gguf"] if asked else [])],
        cwd=tmp_path, env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{1 + 3 * asked} passed" in done.stdout


def test_a_fixture_may_wrap_prills(tmp_path: Path) -> None:
    """A conftest that asks for what it replaces gets prill's, in tests that are no checks too."""
    (tmp_path / "conftest.py").write_text(
        "import pytest\n@pytest.fixture\ndef model_spec(model_spec): return f'my {model_spec}'\n"
    )
    source = "def test_mine(model_spec): assert model_spec == 'my none.gguf'\n"
    code, _, said = run(tmp_path, source, "--prill-model", "none.gguf", model=False)
    assert (code, "1 passed" in said) == (0, True), said
