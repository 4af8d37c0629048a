"""What --json prints: one envelope for every command, and a published schema for each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import jsonschema
import pytest

from prill_harness import cli
from prill_harness.commands.gates import faults
from prill_harness.console import Console
from prill_harness.version import version

from .commandline import SCHEMAS, closed_schema, emitted, invoke
from .sample import laid

ROOT = SCHEMAS.parents[1]


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command with its words, those of groups included."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


ALL = dict(commands(cli.cli))


def test_every_command_has_its_schema() -> None:
    """Each command that takes --json has one file, whose name is the command's; there are no others."""
    with_json = {words for words, each in ALL.items() if any("--json" in p.opts for p in each.params)}
    assert with_json == set(ALL)
    files = [file.stem for file in SCHEMAS.rglob("*.json")]
    assert sorted(files) == sorted(words.replace(" ", "-") for words in with_json)


def test_the_schemas_are_those_of_the_code() -> None:
    """`python ci/schemas.py` would write nothing else; where it would, it has to be run."""
    done = subprocess.run(
        [sys.executable, "-P", "ci/schemas.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("command", sorted(ALL))
def test_a_schema_is_sound_and_refuses(command: str) -> None:
    """Each is a JSON Schema that names its command, and takes neither a bare result nor another's."""
    schema = closed_schema(command).schema
    assert schema["$id"].endswith(f"/{command.replace(' ', '-')}.json")
    assert set(schema["required"]) == {"prill", "schema", "command", "data"}
    named = {"prill": version(), "schema": f"{command.replace(' ', '-')}/1", "command": command}
    checker = jsonschema.Draft202012Validator(schema)
    for wrong in ({}, {"data": {}}, named, named | {"data": 1}, named | {"command": "x", "data": {}}):
        assert not checker.is_valid(wrong), wrong


def test_the_envelope_is_the_same_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Version, schema, command and data, in that order, and nothing without --json."""
    Console(json=True, command="golden compare").emit({"x": 1})
    document = json.loads(capsys.readouterr().out)
    assert list(document.items()) == [
        ("prill", version()), ("schema", "golden-compare/1"), ("command", "golden compare"),
        ("data", {"x": 1}),
    ]  # fmt: skip
    Console(command="gate").emit({"x": 1})
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laid(tmp_path_factory.mktemp("laid")).parent


LAID = {
    "badge": "badge --ledger {0}/ledger.jsonl",
    "report": "report --ledger {0}/ledger.jsonl --format in-toto",
    "show": "show stages.trace --ledger {0}/ledger.jsonl",
    "diff": "diff {0} {0}",
    "checklist": "checklist foundation --ledger {0}/ledger.jsonl",
    "completion": "completion bash",
    "faults show": "faults show rope_pairing",
    "explain": "explain cache.size",
    "new engine": "new engine py mine --into {0}/new",
    "golden show": "golden show fixture:gpt-oss-tiny",
    "generate": "generate --model fixture:gpt-oss-tiny --prompt The --max-tokens 2",
    "trace": "trace --model fixture:gpt-oss-tiny --tokens 3",
}
"""Commands that are quick; what the others print, their own tests hold to their schemas, by `emitted`."""


@pytest.mark.parametrize("command", LAID)
def test_what_is_printed_follows_its_schema(folder: Path, command: str) -> None:
    """The real output, in its envelope, with every key known to the schema."""
    result = invoke(*LAID[command].format(folder).split(), "--json")
    assert result.exit_code in (0, 10), result.stderr
    assert emitted(result.stdout)
    assert json.loads(result.stdout)["command"] == command


def test_a_key_that_the_schema_lacks_is_seen(folder: Path) -> None:
    """The tests' reading of a schema is closed: one more key anywhere is an error."""
    printed = json.loads(invoke("diff", str(folder), str(folder), "--json").stdout)
    printed["data"]["surplus"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surplus"):
        emitted(json.dumps(printed))


def test_a_trial_is_described_as_published() -> None:
    """What `faults run` prints of a trial, which itself takes minutes, follows the schema, blamed or not."""
    blamed = SimpleNamespace(parts=("rope",), check="stages.early", sentence="NMSE 1")
    subject = SimpleNamespace(name="rope_pairing", blames=frozenset({"rope"}))
    for found in (blamed, None):
        trial = SimpleNamespace(subject=subject, killed_by=("a",), blamed=found, right=True, sentence="seen")
        described = faults._described(trial)  # type: ignore[arg-type]
        document = {"prill": version(), "schema": "faults-run/1", "command": "faults run"}
        assert emitted(json.dumps(document | {"data": {"faults": [described]}}))["faults"][0]["right"]
