"""Every check says what it sees and what its failure means, by commands that work; shells get words."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prill_harness.decide.checklist import load_checklists
from prill_harness.decide.explained import explain
from prill_harness.decide.templates import shown_id
from prill_harness.faults.trial import kills
from prill_harness.records import catalog

from .commandline import PRILL, child, emitted, invoke


def test_every_check_explains_itself() -> None:
    """What it observes, the mistakes that it was seen to find, and the items it proves: exactly those of the
    kill matrix and of the checklists."""
    matrix, lists = kills.load(), load_checklists()
    for check in catalog.check_ids():
        found = explain(check)
        assert found.observes.endswith("."), check
        assert {m.fault for m in found.mistakes} == set(matrix.killed_by(check)), check
        assert {p.item for p in found.proves} == {
            shown_id(each, i) for each in lists for i in each.items if check in i.checks
        }
        file, line = catalog.check_ids()[check]
        assert Path(found.file).name == file.name
        assert found.line == line
    known = set(matrix.checks) & set(catalog.check_ids())
    assert sum(bool(explain(check).mistakes) for check in known) > 0.9 * len(matrix.checks)


def test_the_most_telling_mistake_comes_first() -> None:
    """What hardly any other check finds says most about this one."""
    others = [mistake.others for mistake in explain("stages.early").mistakes]
    assert others == sorted(others)


def test_explain_says_what_a_person_asks() -> None:
    """The docstring, the item with its reason, the planted mistakes, and both commands; a parameter in
    brackets is left aside."""
    text = invoke("explain", "cache.size[x]").stdout
    assert "observes: A cache takes 2 x layers x cache heads x head size x capacity values" in text
    assert "proves foundation.cache.size (critical)" in text
    assert "a capacity that counts only new tokens writes past its end" in text
    assert "a failure usually means one of these" in text
    assert "A cache of a float32 engine keeps its rows in float64" in text
    assert invoke("explain", "cache.sizes").exit_code == 4
    assert "did you mean 'cache.size'?" in invoke("explain", "cache.sizes").stderr


def test_the_commands_of_an_explanation_do_what_they_say(tmp_path: Path) -> None:
    """One passes, and the one with a planted mistake fails in that very check."""
    told = emitted(invoke("explain", "cache.size", "--json").stdout)
    for command, code in ((told["reproduce"], 0), (told["see_it_fail"], 1)):
        prill, *words = shlex.split(command)
        assert prill == "prill"
        done = child(*words, "-j", "1", cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        assert ("failed  cache.size" in done.stdout) == bool(code)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_words(shell: str, tmp_path: Path) -> None:
    """The script is for that shell, and what it then asks is answered: commands, options, suites, checks."""
    script = child("completion", shell).stdout
    assert f"{shell}_complete" in script
    assert "prill" in script
    for line, expected in (
        ("prill expl", {"explain"}),
        ("prill run cache.si", {"cache.size"}),
        ("prill explain stages.ear", {"stages.early"}),
        ("prill gate --resu", {"--resume"}),
    ):
        words = line.split()
        asked = " ".join(words) if shell != "fish" else " ".join(words[:-1])
        current = str(len(words) - 1) if shell != "fish" else words[-1]
        environment = {"_PRILL_COMPLETE": f"{shell}_complete", "COMP_WORDS": asked, "COMP_CWORD": current}
        done = subprocess.run(
            PRILL, env=os.environ | environment, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert expected <= set(re.split(r"[,\s]", done.stdout)), (line, done.stdout, done.stderr)


def test_bash_completes_with_the_printed_script(tmp_path: Path) -> None:
    """The script as bash reads it: the function that it defines fills in the one check that begins so."""
    script = child("completion", "bash").stdout
    ask = "\nCOMP_WORDS=(prill run cache.si)\nCOMP_CWORD=2\n_prill_completion prill\necho ${COMPREPLY[@]}\n"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script + ask], env=os.environ | {"PATH": path}, capture_output=True, text=True,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.split() == ["cache.size"], done.stderr


def test_an_unknown_shell_is_one_sentence() -> None:
    result = invoke("completion", "tcsh")
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1)
