"""The templates for CI services: right by the public schema of each format, and by what they run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from ruamel.yaml import YAML

from prill_harness import cli

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "ci" / "templates"
SCHEMAS = {
    "github.yml": "vendor.github-workflows",
    "gitlab.yml": "vendor.gitlab-ci",
    "buildkite.yml": "vendor.buildkite",
}
# A line of each that its schema must refuse, so that a validation is known to look.
SLIPS = {
    "github.yml": ("runs-on:", "runs_on:"),
    "gitlab.yml": ("parallel: 4", "parallel: many"),
    "buildkite.yml": ("parallelism: 4", "parallelism: many"),
}
ALL = (*SCHEMAS, "Jenkinsfile")


def text(name: str) -> str:
    return (TEMPLATES / name).read_text("utf-8")


def valid(schema: str, file: Path) -> bool:
    words = [sys.executable, "-P", "-m", "check_jsonschema", "--builtin-schema", schema, str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode == 0


def test_every_template_is_tested() -> None:
    """No file lies in the folder that the cases below do not look at."""
    assert sorted(ALL) == sorted(file.name for file in TEMPLATES.iterdir())


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_template_is_valid_by_its_public_schema(tmp_path: Path, name: str) -> None:
    """By the schema that SchemaStore, GitLab or Buildkite publishes; with one slip it is refused."""
    assert valid(SCHEMAS[name], TEMPLATES / name)
    slipped = tmp_path / name
    slipped.write_text(text(name).replace(*SLIPS[name], 1))
    assert not valid(SCHEMAS[name], slipped)


# --- declarative pipelines of Jenkins: blocks in braces, each with the sections its kind may have ----------

SECTIONS = {
    "pipeline": {"agent", "options", "stages", "post", "environment", "parameters", "triggers", "tools"},
    "stages": {"stage"},
    "stage": {
        "agent",
        "steps",
        "stages",
        "matrix",
        "parallel",
        "post",
        "when",
        "options",
        "environment",
        "tools",
    },
    "matrix": {"agent", "axes", "excludes", "stages", "post", "when", "environment", "tools"},
    "axes": {"axis"},
    "axis": {"name", "values"},
    "post": {
        "always",
        "changed",
        "failure",
        "success",
        "unstable",
        "aborted",
        "cleanup",
        "fixed",
        "regression",
    },
}
NEEDED = {"pipeline": {"agent", "stages"}, "axis": {"name", "values"}, "matrix": {"axes", "stages"}}
BODIES = {"steps", "stages", "matrix", "parallel"}


def blocks(source: str) -> Iterator[tuple[str, list[str]]]:
    """(kind of a block, the first words of its statements), outer blocks after inner ones.

    Raises:
        AssertionError: braces, parentheses or quotes that do not match.
    """
    code = re.sub(r"^\s*//.*$", "", source, flags=re.M)
    code = re.sub(r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'", "S", code)
    assert not set("\"'") & set(code), "a string does not end"
    assert code.count("(") == code.count(")")
    open_blocks: list[tuple[str, list[str]]] = [("file", [])]
    for line in filter(None, map(str.strip, code.splitlines())):
        if line == "}":
            assert len(open_blocks) > 1, "a brace too many"
            yield open_blocks.pop()
            continue
        word = re.match(r"\w+", line)
        assert word, line
        open_blocks[-1][1].append(word[0])
        if line.endswith("{"):
            open_blocks.append((word[0], []))
    assert len(open_blocks) == 1, "a brace is missing"
    yield open_blocks.pop()


def look(source: str) -> None:
    """Hold a Jenkinsfile to the grammar of declarative pipelines."""
    found = list(blocks(source))
    assert found[-1] == ("file", ["pipeline"])
    for kind, words in found:
        if kind in SECTIONS:
            assert set(words) <= SECTIONS[kind], f"{kind} has no {set(words) - SECTIONS[kind]}"
        assert NEEDED.get(kind, set()) <= set(words)
        if kind == "stage":
            assert len(BODIES & set(words)) == 1, "a stage has one of steps, stages, matrix and parallel"
        if kind not in ("file", "stages", "steps", "axes", "always"):
            assert len(words) == len(set(words)), f"{kind} repeats a section"


def test_the_jenkinsfile_is_a_declarative_pipeline() -> None:
    """Sections stand where the grammar has them; what breaks it is refused."""
    sound = text("Jenkinsfile")
    look(sound)
    for old, new in (
        ("agent none", ""), ("steps {", "step {"), ("axes {", "axis {"), ("post {", "posts {"), ("}\n", "\n"),
        ("'Judge'", "'Judge"), ("any\n            steps {", "any\n            parallel {\n}\nsteps {"),
    ):  # fmt: skip
        assert old in sound
        with pytest.raises(AssertionError):
            look(sound.replace(old, new, 1))


# --- what they run --------------------------------------------------------------------------------------


def commands(name: str) -> list[list[str]]:
    """The words of every prill command line of a template, without its redirections."""
    found = re.findall(r"(?:^|[ /'\"])prill ((?:plan|gate|merge|report)\b[^'\n|]*)", text(name))
    lines = (re.sub(r"\s(?:>>|\|\|).*$", "", line.replace("$$", "$")) for line in found)
    lines = (re.sub(r"\$\(find [^)]*\)", "a/ledger.jsonl", line) for line in lines)
    lines = (re.sub(r"\$\{\{[^}]*\}\}|\$\(\(.*?\)\)|\$\w+", "1", line) for line in lines)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", ALL)
def test_every_command_of_a_template_exists(name: str) -> None:
    """Run a shard, merge, decide, report: each line's command, options and values are prill's own."""
    found = commands(name)
    assert [words[0] for words in found[:4]] == ["plan", "gate", "merge", "gate"]
    for first, *rest in found:
        command = cli.cli.get_command(click.Context(cli.cli), first)
        assert command is not None
        command.make_context(first, [word.rstrip(";") for word in rest], resilient_parsing=False)


def test_this_repositorys_workflow_is_the_template() -> None:
    """Line by line, but for where prill comes from and the sentence that says so."""
    own = (ROOT / ".github/workflows/prill.yml").read_text("utf-8").splitlines()
    pairs = [(a, b) for a, b in zip(text("github.yml").splitlines(), own, strict=True) if a != b]
    assert len(pairs) == 3
    assert pairs[0][0].startswith("# prill in GitHub Actions")
    install = ("      - run: python -m pip install prill", "      - run: python -m pip install .")
    assert pairs[1:] == [install, install]


SUITE = """
from prill_harness.run.checks import check

@check("mine.one", kills=("rope_pairing",))
def test_one(observe):
    observe.saw(1, oracle="numpy64")
"""
POLICY = """default = "mine"
suites = "../checks"
[gates.mine]
checklists = ["mine"]
[[gates.mine.plan]]
models = ["fixture:llama-tiny", "fixture:gpt2-tiny", "fixture:llama-window", "fixture:gemma3-tiny"]
engines = ["numpy"]
suites = ["mine"]
"""
CHECKLIST = """id = "mine"
title = "Mine"
[[items]]
id = "mine.one"
title = "One"
why = "so"
severity = "critical"
checks = ["mine.one"]
"""


def test_the_steps_of_a_workflow_end_in_one_verdict(tmp_path: Path) -> None:
    """The template's own lines, run by a shell, without the service's actions: one shard of four is there
    when ledgers are merged; the cells of the others are missing, and the gate does not say that it passed."""
    (tmp_path / "ci").mkdir()
    (tmp_path / "checks/checklists").mkdir(parents=True)
    (tmp_path / "ci/gates.toml").write_text(POLICY)
    (tmp_path / "checks/mine.py").write_text(SUITE)
    (tmp_path / "checks/checklists/mine.toml").write_text(CHECKLIST)
    jobs = YAML(typ="safe").load(text("github.yml"))["jobs"]
    shard, verdict = (
        [step["run"] for step in jobs[job]["steps"] if step.get("run", "").startswith("prill")]
        for job in ("shard", "verdict")
    )
    script = [
        "set -u",
        "SHARDS=4",
        "GITHUB_STEP_SUMMARY=summary.md",
        f"PATH={Path(sys.executable).parent}:$PATH",
    ]
    script += [line.replace("${{ matrix.shard }}", "3") for line in shard if " gate " in line]
    script += ["mv out shards", *verdict[:2], "code=$?", *verdict[2:], "exit $code"]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 10, done.stdout + done.stderr
    assert "3 of 4 cells not complete" in done.stdout
    assert "::error" in done.stdout
    assert "3 of 4 cells not complete" in (tmp_path / "summary.md").read_text("utf-8")
