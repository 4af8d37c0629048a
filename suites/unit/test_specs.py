"""A spec of an engine that cannot be opened is refused by every command before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from .commandline import invoke
from .test_foreign import CLASS, MODEL


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("py:", "engine spec is incomplete"),
        ("py:mine", "no class named"),
        ("py:nosuch:Mine", "cannot be imported: got ModuleNotFoundError"),
        ("py:broken.py:Mine", "cannot be imported: got SyntaxError"),
        ("py:leaves.py:Mine", "cannot be imported: got SystemExit"),
        ("py:nosuch.py:Mine", "no such file"),
        ("py:mine.py:Nope", "has no class Nope"),
        ("py:mine.py:Mine,arithmetic=quarter", "unknown arithmetic"),
        ("py:mine.py:Mine,timeout=0", "bad timeout"),
        ("py:mine.py:Mine+fault:rope_pairing", "a planted fault is one of prill's own code"),
        ("exec:", "engine spec is incomplete"),
        ("exec:./nosuch", "no such command"),
        ("exec:'", "bad command"),
        ("http:", "engine spec is incomplete"),
        ("http:,model=a", "engine spec is incomplete"),
        ("http:localhost:80", "bad address"),
        ("http:ftp://localhost", "bad address"),
        ("http://localhost:99999", "bad address"),
        ("http://localhost:80,modell=a", "bad address"),
        ("http://localhost:80,ctx=0", "bad ctx"),
        ("http://localhost:80,pid=999999999", "bad pid"),
        ("https://user:secret@localhost", "an address with a user, a password or a query in it"),
        ("http://localhost/?key=secret,timeout=0", "an address with a user, a password or a query in it"),
        ("http://localhost:80+fault:rope_pairing", "a planted fault is one of prill's own code"),
        ("serve:", "engine spec is incomplete"),
        ("serve:sh", "the command has no {model}"),
        ("serve:sh {model}", "the command has no {port}"),
        ("serve:./nosuch {model} {port}", "no such command"),
        ("serve:sh '{model} {port}", "bad command"),
        ("mine", "unknown engine"),
    ],
)
@pytest.mark.parametrize("command", ["run", "gate", "golden compare", "bisect", "leak", "bench"])
def test_a_wrong_spec_is_one_sentence(
    command: str, spec: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command refuses it before anything runs: exit 4, and no file is left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CLASS)
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "leaves.py").write_text("raise SystemExit(1)")
    there = set(tmp_path.rglob("*"))
    done = invoke(*command.split(), "--engine", spec, "--model", MODEL)
    assert (done.exit_code, done.stdout) == (4, "")
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "secret" not in done.stderr
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == there
